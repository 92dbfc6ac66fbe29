"""What a person meets first: imports, versions, pins, presets, the layer rule, file sizes."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

import advjax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
PRESETS = sorted((ROOT / "launch" / "presets").glob("*.flags"))
LAUNCHERS = sorted(p for p in (ROOT / "launch").glob("*.py") if not p.stem.startswith("_"))


def launcher_of(preset: pathlib.Path) -> str | None:
    """The launcher that its comment names: `# python launch/evasion.py --flagfile=...`."""
    match = re.search(r"^#.*\blaunch/(\w+)\.py\b", preset.read_text(), re.MULTILINE)
    return match and match[1]


def run(*command: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def test_import_advjax_is_light():
    heavy = {"flax", "optax", "orbax", "chex", "tensorflow", "tensorflow_datasets", "matplotlib"}
    heavy |= {"sklearn", "PIL", "rich", "torch", "foolbox", "torchattacks", "art"}
    program = "import sys, jax; before = set(sys.modules); import advjax; "
    program += "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert "advjax" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


def test_every_public_module_loads():
    for name in advjax.__all__:
        assert getattr(advjax, name) is not None, name


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert advjax.__version__ == PYPROJECT["project"]["version"] == citation["version"]


def test_changelog_has_a_place_for_the_next_entry():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog.count("\n## [Unreleased]\n") == 1


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_names_and_versions_only(path):
    pin = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!]*(\s*;[^@]*)?")
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not pin.fullmatch(line)] == []
    assert "http" not in path.read_text()


def test_constraints_pin_every_direct_dependency_for_every_python():
    classifiers = PYPROJECT["project"]["classifiers"]
    pythons = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert [path.stem.removeprefix("python") for path in CONSTRAINTS] == pythons
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = PYPROJECT["project"]["dependencies"] + extras["test"] + extras["notebooks"]
    names = {re.split(r"[\[<>=!~;]", need)[0].lower().replace("_", "-") for need in wanted}
    for path in CONSTRAINTS:
        pinned = {line.partition("==")[0].lower() for line in path.read_text().splitlines()}
        assert names - pinned == set(), path.name


@pytest.mark.study
@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_rejects_an_unknown_flag_in_one_sentence(path):
    done = run(sys.executable, str(path), "--no_such_flag=1")
    assert done.returncode != 0
    assert "no_such_flag" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_presets_name_only_flags_that_their_launcher_knows(path):
    presets = [preset for preset in PRESETS if launcher_of(preset) == path.stem]
    # All in one call: the last one wins, but a flag that is not known stops at any of them.
    done = run(
        sys.executable, str(path), *(f"--flagfile={preset}" for preset in presets),
        "--only_check_args",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_presets_name_their_launcher():
    stems = {path.stem for path in LAUNCHERS}
    assert [path.name for path in PRESETS if launcher_of(path) not in stems] == []


def test_no_large_file_is_tracked():
    done = run("git", "ls-files", "-z")
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    large = [path.name for path in paths if path.is_file() and path.stat().st_size > 1_500_000]
    assert large == []


def lint_imports(folder: pathlib.Path, *files: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs our contracts on a skeleton of advjax with `files` (path, text) in it."""
    packages = ["", "core", "models", "data", "training", "attacks", "evaluation", "defenses"]
    for package in packages:
        (folder / "advjax" / package).mkdir(parents=True, exist_ok=True)
        (folder / "advjax" / package / "__init__.py").touch()
    for path, text in files:
        (folder / "advjax" / path).write_text(text)
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    return run(*command, "--no-cache", cwd=folder)


def test_layer_rule_allows_what_the_design_page_allows(tmp_path):
    done = lint_imports(
        tmp_path,
        ("attacks/__init__.py", "import advjax.core\nfrom advjax import models\n"),
        ("defenses/__init__.py", "from advjax import attacks, evaluation\nimport jax\n"),
        ("training/__init__.py", "from advjax import data\n"),
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/up.py", "import advjax.models"),
        ("models/across.py", "from advjax import data"),
        ("training/up.py", "import advjax.attacks"),
        ("attacks/across.py", "from advjax import evaluation"),
        ("attacks/back.py", "import advjax.defenses"),
        ("data/peer.py", "def load():\n    import tensorflow"),
        ("evaluation/peer.py", "import torch.nn"),
        ("nowhere.py", ""),
    ],
)
def test_layer_rule_catches(path, line, tmp_path):
    done = lint_imports(tmp_path, (path, line + "\n"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout or "nowhere" in done.stdout, done.stdout + done.stderr
