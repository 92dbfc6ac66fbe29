"""Writes constraints/python3.11.txt and python3.12.txt: the newest versions that work together.

Run it with `make constraints`. It resolves pyproject.toml with all extras but `gpu` for Linux, in a
scratch environment of its own, and keeps names and versions only: no address, no hash, no local
version label (`torch==2.13.0`, not `torch==2.13.0+cpu`).
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
EXTRAS = ("test", "notebooks", "peers")
# Installed beside the `peers` extra without dependencies (see pyproject.toml), so pinned here.
WITHOUT_DEPENDENCIES = ("byzfl", "torchattacks")
# Held back: the peers are measured against this version, and it has CPU builds for both Pythons.
HELD = ("torch==2.13.0",)
# torch itself pins its CUDA libraries to the digit; a CPU build has none.
LEFT_OUT = re.compile(r"^(nvidia-|cuda-|triton$)")
HEADER = """\
# Python {python}: the core and the extras {extras}. Written by `make constraints`.
#   pip install -c constraints/python{python}.txt -e '.[test,notebooks]'
"""
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s+;]+)(\+\S+)?(?P<marker>\s*;.*)?$")


def compile_pins(uv: str, python: str, *arguments: str) -> list[str]:
    """Returns `name==version` lines, in the order uv prints them (by name)."""
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", "linux", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    pins = []
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        match = PIN.match(line)
        if match is None:
            raise SystemExit(f"constraints: cannot read the resolver's line {line!r}.")
        if not LEFT_OUT.match(match["name"]):
            pins.append(f"{match['name']}=={match['version']}{match['marker'] or ''}")
    return pins


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        command = [f"{scratch}/bin/python", "-m", "pip", "install", "-qq", "uv"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        for python in PYTHONS:
            uv = f"{scratch}/bin/uv"
            held = pathlib.Path(scratch, "held.txt")
            held.write_text("\n".join(HELD) + "\n")
            extras = [argument for extra in EXTRAS for argument in ("--extra", extra)]
            pins = compile_pins(uv, python, "pyproject.toml", "--constraint", str(held), *extras)
            alone = pathlib.Path(scratch, "alone.in")
            alone.write_text("\n".join(WITHOUT_DEPENDENCIES) + "\n")
            pins += compile_pins(uv, python, "--no-deps", str(alone))
            path = ROOT / "constraints" / f"python{python}.txt"
            path.parent.mkdir(exist_ok=True)
            header = HEADER.format(python=python, extras=", ".join(EXTRAS))
            path.write_text(header + "\n".join(sorted(pins, key=str.lower)) + "\n")
            print(f"{path.relative_to(ROOT)}: {len(pins)} pins", file=sys.stderr)


if __name__ == "__main__":
    main()
