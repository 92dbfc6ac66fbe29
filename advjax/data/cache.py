"""Decoded base splits as npz files: written atomically, never pickled, refused when damaged."""

import hashlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from advjax.core import io

Key = Mapping[str, str | int | list[int]]


def default_dir() -> pathlib.Path:
    """`$ADVJAX_CACHE_DIR`, or `~/.cache/advjax/data`."""
    return pathlib.Path(os.environ.get("ADVJAX_CACHE_DIR") or "~/.cache/advjax/data").expanduser()


def path_of(cache_dir: pathlib.Path, key: Key) -> pathlib.Path:
    """The file that holds the base split `key` describes.

    Args:
      cache_dir: the folder of the cache.
      key: all that the decoded arrays depend on; `name` and `split` also stand in the file name.
    """
    digest = hashlib.sha256(_encode(key).encode()).hexdigest()[:16]
    return cache_dir / f"{key['name']}-{key['split']}-{digest}.npz"


def write(path: pathlib.Path, key: Key, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes a base split; another process may do the same at the same time."""
    with io.atomic_write(path) as temporary:
        np.savez(temporary, key=np.array(_encode(key)), images=images, labels=labels)


def read(path: pathlib.Path, key: Key) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads a base split.

    Returns:
      Images uint8[n, h, w, c] and labels int32[n], or None where there is no such file.

    Raises:
      ValueError: the file is truncated, damaged, or holds something else.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found, images, labels = str(arrays["key"]), arrays["images"], arrays["labels"]
    # What NumPy and zipfile raise for files cut short, altered or of another kind.
    except (
        AttributeError,
        EOFError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"data.load: the cache file {path} is truncated or foreign; delete it to decode again."
        ) from error
    is_ours = (
        found == _encode(key)
        and images.dtype == np.uint8
        and labels.dtype == np.int32
        and images.shape == (labels.size, *key["image_shape"])  # type: ignore[misc]
    )
    if not is_ours:
        raise ValueError(
            f"data.load: the cache file {path} holds another data set; delete it to decode again."
        )
    return images, labels


def _encode(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)
