"""Every test of this folder compiles quickly."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def everything_quickly(quick_compilation):
    """Programs here run once or twice, on few and short updates."""
