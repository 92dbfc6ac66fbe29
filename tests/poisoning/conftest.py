"""Programs compiled quickly, where it does not matter how fast they run."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
