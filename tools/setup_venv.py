"""Brings a virtual environment up to date with pyproject.toml and constraints/.

    python tools/setup_venv.py .venv test,notebooks [--no-deps=PACKAGE] [--this-python]

The Makefile runs it before every target. It needs only the standard library. What it promises:

- A fingerprint of the inputs in VENV/.advjax-installed says that the environment is whole. When it
  matches, nothing is run and no network is touched.
- While pip works, VENV/.advjax-installing stands in its place. An environment that still has that
  file was killed half-way and is built anew; pip cannot see files missing from a package.
- Two calls at once wait for each other.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time
import tomllib
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent


def python_of(environment: pathlib.Path) -> str | None:
    """The `major.minor` of the environment's interpreter, or None if it does not run."""
    command = [str(environment / "bin" / "python"), "-c"]
    command += ["import sys, pip; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def constraints_for(python: str) -> pathlib.Path:
    path = ROOT / "constraints" / f"python{python}.txt"
    if not path.exists():
        known = ", ".join(p.stem.removeprefix("python") for p in path.parent.glob("python*.txt"))
        sys.exit(f"setup_venv: need Python {known} (constraints/), got Python {python}.")
    return path


def fingerprint(extras: str, no_deps: str, constraints: pathlib.Path) -> str:
    """What the environment is made from: not the settings of ruff and others in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tables = [project["build-system"], project["project"], project["tool"]["setuptools"]]
    inputs = [extras, no_deps, str(ROOT), tables, constraints.read_text()]
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    return f"{constraints.stem} {digest.hexdigest()}\n"


def create(environment: pathlib.Path, unfinished: pathlib.Path) -> None:
    """Makes an empty environment; whenever it is killed, what is left reads as unfinished."""
    if environment.exists():
        (environment / "bin" / "python").unlink(missing_ok=True)
        for path in environment.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "pyvenv.cfg":
                path.unlink()
    venv.create(environment, with_pip=False, symlinks=True)
    unfinished.touch()
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "ensurepip", "--default-pip"], check=True, capture_output=True)


def install(python: str, constraints: pathlib.Path, *arguments: str) -> None:
    command = [python, "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check"]
    command += ["-c", str(constraints), *arguments]
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        sys.exit(
            "setup_venv: pip could not install the packages (its own words are above); the first "
            "run needs the internet. Run the same command again: it starts from a clean folder."
        )


def set_up(environment: pathlib.Path, extras: str, no_deps: str, this_python: bool) -> None:
    asked_for = "%d.%d" % sys.version_info[:2]
    filled = environment.exists() and any(environment.iterdir())
    if filled and not (environment / "pyvenv.cfg").exists():
        sys.exit(f"setup_venv: {environment} is no virtual environment; it is left as it is.")
    whole, unfinished = environment / ".advjax-installed", environment / ".advjax-installing"
    python = None if unfinished.exists() else python_of(environment)
    if this_python and python != asked_for:
        python = None
    if python is not None and whole.exists():
        wanted = fingerprint(extras, no_deps, constraints_for(python))
        if whole.read_text() == wanted:
            return

    start = time.monotonic()
    constraints = constraints_for(python or asked_for)
    packages = f"advjax[{extras}]" + (f" and {no_deps}" if no_deps else "")
    print(
        f"Installing {packages} into {environment} for Python {python or asked_for} "
        "(a minute or two, needs the internet) ...",
        flush=True,
    )
    if python is None:
        create(environment, unfinished)
    unfinished.touch()
    whole.unlink(missing_ok=True)
    environment_python = str(environment / "bin" / "python")
    install(environment_python, constraints, "-e", f".[{extras}]")
    if no_deps:
        install(environment_python, constraints, "--no-deps", *no_deps.split(","))
    unfinished.write_text(fingerprint(extras, no_deps, constraints))
    unfinished.rename(whole)
    print(f"Installed in {time.monotonic() - start:.0f} s.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("environment", type=pathlib.Path, help="folder, made if it is missing")
    parser.add_argument("extras", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--no-deps", default="", help="packages to add without dependencies")
    parser.add_argument(
        "--this-python",
        action="store_true",
        help="rebuild an environment whose Python is another version than the one running this",
    )
    arguments = parser.parse_args()
    environment = arguments.environment.absolute()
    environment.parent.mkdir(parents=True, exist_ok=True)
    lock = environment.with_name(environment.name + ".lock")
    with contextlib.closing(lock.open("w")) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        set_up(environment, arguments.extras, arguments.no_deps, arguments.this_python)


if __name__ == "__main__":
    main()
