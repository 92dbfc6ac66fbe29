"""What all tests share: eight virtual CPU devices, a compilation cache, hypothesis, folders."""

import hashlib
import os
import pathlib

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _machine() -> str:
    """Names the kind of CPU: what was compiled for another kind may not run on this one."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        kind = repr(os.uname())
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


# In the environment, before jax is imported, so that what a test starts (a launcher) does the same.
# What is set already stays: JAX_PLATFORMS=cuda runs the tests on a GPU, an empty
# JAX_COMPILATION_CACHE_DIR runs them without the cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax" / _machine()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# With a limit on its size jax also locks the folder, which two pytest workers need.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(1 << 30))

import jax

# Only here, not in the environment: what a test starts sees one device, like a user.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _folder(variable: str, name: str, what: str) -> pathlib.Path:
    path = pathlib.Path(os.environ.get(variable) or ROOT.parent / "shared" / name).expanduser()
    if not path.is_dir():
        pytest.skip(f"{what} not found at {path}; {variable} can name another folder")
    return path


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
    """Prepared tensorflow-datasets: TFDS_DATA_DIR, else shared/tfds beside the checkout."""
    return _folder("TFDS_DATA_DIR", "tfds", "prepared data sets")


@pytest.fixture(scope="session")
def reference_dir() -> pathlib.Path:
    """Reference networks: ADVJAX_REFERENCE_DIR, else shared/reference beside the checkout."""
    return _folder("ADVJAX_REFERENCE_DIR", "reference", "reference networks")
