"""What all tests share: eight virtual CPU devices, a compilation cache, hypothesis, folders."""

import contextlib
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import time

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
# What the tests cost is compiling. jaxlib 0.10 has XLA's older code generator too, which takes half
# as long; 0.12 has only the new one, and ends a program that names the choice. Leaving out most
# optimisations halves that once more. An empty XLA_FLAGS and JAX_DISABLE_MOST_OPTIMIZATIONS=0
# compile as users do: so do `make test-slow` and `make test-studies`, which compute more than they
# compile, the launchers and the notebooks.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

import jax

# What tracing leaves behind is looked through so often that it is a sixth of all the time.
gc.freeze()
gc.set_threshold(200_000, 20, 100)

# Only here, not in the environment: what a test starts sees one device, like a user.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_runtest_setup(item):
    """Skips a slow test that would begin after `ADVJAX_TESTS_UNTIL`, in seconds since 1970."""
    until = os.environ.get("ADVJAX_TESTS_UNTIL")
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip("the time given by ADVJAX_TESTS_UNTIL is over")


@contextlib.contextmanager
def _compiling(*, quickly: bool):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compilation():
    """Leaves out most optimisations, as `make test` does, in the slow tests and studies of a file.

    For files of programs that run once or twice, by `pytestmark`.
    """
    with _compiling(quickly=True):
        yield


@pytest.fixture(scope="module")
def full_compilation():
    """Keeps all optimisations in a file, in `make test` too.

    For files whose point is what the optimiser makes of the numbers, such as whether a projection
    ends exactly in the ball.
    """
    with _compiling(quickly=False):
        yield


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
def launcher(root):
    """`launcher(name)(*flags, **environment)` runs launch/NAME.py as a person would."""

    def named(name):
        def run(*flags, **environment):
            return subprocess.run(
                [sys.executable, str(root / "launch" / f"{name}.py"), *flags],
                capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
                env=os.environ | environment,
            )  # fmt: skip

        return run

    return named


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
    """Prepared tensorflow-datasets: TFDS_DATA_DIR, else shared/tfds beside the checkout."""
    return _folder("TFDS_DATA_DIR", "tfds", "prepared data sets")


@pytest.fixture(scope="session")
def reference_dir() -> pathlib.Path:
    """Reference networks: ADVJAX_REFERENCE_DIR, else shared/reference beside the checkout."""
    return _folder("ADVJAX_REFERENCE_DIR", "reference", "reference networks")
