"""Where the real sets lie."""

import os
import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "tfds"


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
    """The folder with the prepared real sets, or a skip that says what is missing."""
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or SHARED)
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no prepared data sets in {folder}; set TFDS_DATA_DIR")
    return folder
