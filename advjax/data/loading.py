"""`load` and `info`: from a name to arrays."""

import os
import pathlib
import warnings
from typing import NamedTuple

import numpy as np

from advjax.data import cache, catalogue, digits, download, prepared, splits
from advjax.data.dataset import Dataset

PathLike = str | os.PathLike[str]


class Info(NamedTuple):
    """What is known of a data set without reading it."""

    image_shape: tuple[int, int, int]
    num_classes: int


def info(name: str, *, image_size: int | None = None) -> Info:
    """Shape and number of classes of a data set, from a table.

    Args:
      name: one of `data.NAMES`.
      image_size: as in `load`.

    Returns:
      `Info(image_shape, num_classes)`.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> from advjax import data
      >>> data.info("gtsrb")
      Info(image_shape=(32, 32, 3), num_classes=43)
    """
    spec = catalogue.spec_of(name, image_size)
    return Info(spec.image_shape, len(spec.class_names))


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: PathLike | None = None,
    cache_dir: PathLike | None = None,
    download: bool = True,
    image_size: int | None = None,
) -> Dataset:
    """Loads a data set into memory.

    All but the digits are read through tensorflow-datasets, from where they lie prepared or else
    from the official files. A base split is decoded once, whole, and cached; any slice of it then
    comes from the cache.

    Args:
      name: one of `data.NAMES`.
      split: in tensorflow-datasets' syntax: `"train"`, `"test[:80%]"`, `"train[:1000]+test"`.
        `imagenet10` has `train` and `validation`; there, `test` means `validation`.
      data_dir: the tensorflow-datasets folder; default `$TFDS_DATA_DIR`, then
        `~/tensorflow_datasets`.
      cache_dir: where decoded splits are kept; default `$ADVJAX_CACHE_DIR`, then
        `~/.cache/advjax/data`.
      download: whether a set that is not in `data_dir` may be downloaded to there.
      image_size: the side of the square images, for `imagenet10` only; default 224.

    Returns:
      The images, upright, and labels, in the order in which they are stored.

    Raises:
      ValueError: an unknown name or split, a damaged cache file or download.
      FileNotFoundError: the set is not in `data_dir` and `download` is false.
      ConnectionError: the set is not in `data_dir` and the official files cannot be reached.

    Example:
      >>> from advjax import data
      >>> digits = data.load("digits", "train[:10%]")
      >>> digits.images.shape, digits.images.dtype, digits.num_classes
      ((144, 8, 8, 1), dtype('uint8'), 10)
    """
    spec = catalogue.spec_of(name, image_size)
    parts = tuple(
        part._replace(name=spec.aliases.get(part.name, part.name)) for part in splits.parse(split)
    )
    splits.check_names(parts, spec.splits, name)
    if name == "digits":
        arrays = digits.load_digits()
        sizes = {base: len(labels) for base, (_, labels) in arrays.items()}
        intervals = splits.resolve(parts, sizes)
    else:
        source = _source(
            spec, pathlib.Path(data_dir or prepared.default_dir()).expanduser(), download
        )
        splits.check_names(parts, tuple(source.sizes), f"{name} in {source.path}")
        intervals = splits.resolve(parts, source.sizes)
        folder = pathlib.Path(cache_dir or cache.default_dir()).expanduser()
        arrays = {
            base: _base_split(source, spec, base, folder)
            for base in dict.fromkeys(interval.name for interval in intervals)
        }
    images, labels = (
        _join([arrays[base][field][start:stop] for base, start, stop in intervals])
        for field in (0, 1)
    )
    return Dataset(images, labels, len(spec.class_names), name, split, spec.class_names)


def _source(spec: catalogue.Spec, data_dir: pathlib.Path, may_download: bool) -> prepared.Source:
    source = prepared.find(spec, data_dir)
    if source is None:
        if not may_download:
            raise FileNotFoundError(
                f"data.load: {spec.name} is not prepared in {data_dir}; point TFDS_DATA_DIR or "
                "--data_dir at a folder that holds it, or allow the download."
            )
        download.prepare(spec, data_dir)
        source = prepared.find(spec, data_dir)
        assert source is not None
    return source


def _base_split(
    source: prepared.Source, spec: catalogue.Spec, split: str, cache_dir: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    key: cache.Key = {
        "format": 1,
        "name": spec.name,
        "version": source.version,
        "split": split,
        "image_shape": list(spec.image_shape),
        "source": str(source.path),
        "fingerprint": source.fingerprint,
    }
    path = cache.path_of(cache_dir, key)
    arrays = cache.read(path, key)
    if arrays is None:
        arrays = prepared.decode(source, spec, split)
        try:
            cache.write(path, key, *arrays)
        except OSError as error:
            # A full or read-only disk costs time at the next load, not this run.
            warnings.warn(f"data.load: could not cache {path} ({error}).", stacklevel=3)
    return arrays


def _join(pieces: list[np.ndarray]) -> np.ndarray:
    # One piece stays a view: copying a whole split would double the memory.
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
