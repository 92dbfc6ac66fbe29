"""Sets that tensorflow-datasets has prepared: finding, describing and decoding them."""

import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from advjax.data import catalogue

if TYPE_CHECKING:
    import PIL.Image

# Records read at a time: faster than one by one, and small enough that the bar moves.
_BATCH = 256


class Source(NamedTuple):
    """A prepared set on disk.

    Args:
      path: its version folder.
      version: the name of that folder.
      sizes: the number of examples of each base split.
      fingerprint: changes when the set is prepared anew in another way.
    """

    path: pathlib.Path
    version: str
    sizes: dict[str, int]
    fingerprint: str


def default_dir() -> pathlib.Path:
    """`$TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find(spec: catalogue.Spec, data_dir: pathlib.Path) -> Source | None:
    """Finds the newest prepared version of a set.

    Returns:
      The set, or None where there is none.

    Raises:
      ValueError: it is there, but not as array_record files or not whole.
    """
    found = []
    for path in (data_dir / spec.folder).glob("*/dataset_info.json"):
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name):
            found.append((tuple(map(int, path.parent.name.split("."))), path))
    if not found:
        return None
    _, path = max(found)
    content = path.read_bytes()
    try:
        info = json.loads(content)
        file_format = info.get("fileFormat", "tfrecord")
        sizes = {
            split["name"]: sum(map(int, split.get("shardLengths", ()))) for split in info["splits"]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data.load: {path} is not what tensorflow-datasets writes.") from error
    if file_format != "array_record":
        raise ValueError(
            f"data.load: {path.parent} holds {file_format} files, which only TensorFlow reads; "
            "prepare the set with file_format='array_record' in another folder."
        )
    digest = hashlib.sha256(content)
    # Re-encoded shards of equal counts differ in size.
    for shard in sorted(path.parent.glob("*.array_record*")):
        digest.update(f"{shard.name} {shard.stat().st_size}".encode())
    folder = path.parent.resolve()
    return Source(folder, folder.name, sizes, digest.hexdigest())


def decode(source: Source, spec: catalogue.Spec, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one whole base split, with a progress bar on a terminal.

    Args:
      source: where it lies.
      spec: the shape to bring the images to; Imagenette's are cut to their middle and resized.
      split: the base split.

    Returns:
      Images uint8[n, h, w, c], upright, and labels int32[n].

    Raises:
      ValueError: the stored files are damaged or hold something else.
    """
    import tqdm

    size = source.sizes[split]
    images = np.empty((size, *spec.image_shape), np.uint8)
    labels = np.empty(size, np.int32)
    try:
        # disable=None: no bar where stderr is not a terminal.
        with tqdm.tqdm(total=size, desc=f"decode {spec.name} {split}", disable=None) as bar:
            for index, (picture, label) in enumerate(_records(source, split)):
                images[index] = _to_array(picture, spec)
                labels[index] = label
                bar.update()
    # array_record raises RuntimeError, PIL OSError.
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"data.load: the files of {split!r} in {source.path} are damaged or missing; "
            f"prepare {spec.name} again ({' '.join(str(error).split())})."
        ) from error
    if size and not 0 <= labels.min() <= labels.max() < len(spec.class_names):
        raise ValueError(
            f"data.load: need labels of {spec.name} in 0 ... {len(spec.class_names) - 1}, got "
            f"{labels.min()} ... {labels.max()} in {source.path}."
        )
    if spec.is_transposed:
        images = np.ascontiguousarray(images.swapaxes(1, 2))
    return images, labels


def _records(source: Source, split: str) -> Iterator[tuple["PIL.Image.Image", int]]:
    import PIL.Image
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(source.path)
    # features.json is missing, cut short or of another program.
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"data.load: {source.path} is not what tensorflow-datasets writes; prepare it again "
            f"({' '.join(str(error).split())})."
        ) from error
    # The pictures come encoded: PIL alone is twice as fast as the features around it.
    records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    for start in range(0, len(records), _BATCH):
        for record in records.__getitems__(range(start, min(start + _BATCH, len(records)))):
            with PIL.Image.open(io.BytesIO(record["image"])) as picture:
                yield picture, record["label"]


def _to_array(picture: "PIL.Image.Image", spec: catalogue.Spec) -> np.ndarray:
    from PIL import Image, ImageOps

    height, width, channels = spec.image_shape
    picture = picture.convert("L" if channels == 1 else "RGB")
    if spec.is_resized:
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    elif picture.size != (width, height):
        raise ValueError(
            f"data.load: need {spec.name} images of {width}x{height} pixels, "
            f"got {picture.width}x{picture.height}."
        )
    return np.asarray(picture).reshape(height, width, channels)
