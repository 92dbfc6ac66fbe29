"""The official archives, read in place: nothing is unpacked to disk and nothing is unpickled.

Each reader yields `(key, example)`: a key that is unique in its split, and a dictionary with
`image` (a uint8 array or, where the archive holds encoded pictures, their bytes) and `label`.
"""

import csv
import gzip
import io
import pathlib
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

Examples = Iterator[tuple[str, dict[str, Any]]]

_IDX_IMAGES = 0x00000803
_IDX_LABELS = 0x00000801
_IMAGE_HEADER = struct.Struct(">4I")
_LABEL_HEADER = struct.Struct(">2I")


def idx_pair(images: IO[bytes], labels: IO[bytes]) -> Examples:
    """Reads MNIST's format: a file of images and a file of labels, both gzipped.

    Raises:
      ValueError: the files are not of this format, or do not belong together.
    """
    with gzip.open(images) as image_file, gzip.open(labels) as label_file:
        header = image_file.read(_IMAGE_HEADER.size).ljust(_IMAGE_HEADER.size)
        magic, count, height, width = _IMAGE_HEADER.unpack(header)
        header = label_file.read(_LABEL_HEADER.size).ljust(_LABEL_HEADER.size)
        label_magic, label_count = _LABEL_HEADER.unpack(header)
        values = label_file.read()
        if (magic, label_magic) != (_IDX_IMAGES, _IDX_LABELS):
            raise ValueError(
                f"idx_pair: need files of kind {_IDX_IMAGES} and {_IDX_LABELS}, "
                f"got {magic} and {label_magic}."
            )
        if not count == label_count == len(values):
            raise ValueError(
                f"idx_pair: need as many images as labels, got {count} and {len(values)}."
            )
        for index, label in enumerate(values):
            pixels = np.frombuffer(image_file.read(height * width), np.uint8)
            yield str(index), {"image": pixels.reshape(height, width, 1), "label": label}


def idx_pair_in_zip(archive: pathlib.Path, images: str, labels: str) -> Examples:
    """Reads two gzipped MNIST files that lie in a zip archive, as EMNIST's do."""
    with (
        zipfile.ZipFile(archive) as members,
        members.open(images) as image_file,
        members.open(labels) as label_file,
    ):
        yield from idx_pair(image_file, label_file)


def cifar_binary(archive: pathlib.Path, members: Sequence[str], labels: Sequence[str]) -> Examples:
    """Reads CIFAR's binary archives: per example one byte a label, then 3x32x32 pixels.

    Args:
      archive: the .tar.gz file.
      members: the files to read, in this order.
      labels: what the label bytes mean, such as `("coarse_label", "label")`.

    Raises:
      ValueError: a file is missing or has no whole number of records.
    """
    record_size = len(labels) + 3 * 32 * 32
    index = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in members:
            file = tar.extractfile(member)
            content = b"" if file is None else file.read()
            if not content or len(content) % record_size:
                raise ValueError(
                    f"cifar_binary: need records of {record_size} bytes in {member}, "
                    f"got {len(content)} bytes."
                )
            for record in np.frombuffer(content, np.uint8).reshape(-1, record_size):
                pixels = record[len(labels) :].reshape(3, 32, 32)
                values = map(int, record[: len(labels)])
                yield (
                    f"{index:05d}",
                    {"image": pixels.transpose(1, 2, 0), **dict(zip(labels, values, strict=True))},
                )
                index += 1


def gtsrb_train(archive: pathlib.Path) -> Examples:
    """Reads GTSRB's training archive: one folder a class, ppm images."""
    with zipfile.ZipFile(archive) as members:
        for name in sorted(members.namelist()):
            match = re.fullmatch(r"GTSRB/Final_Training/Images/(\d{5})/(\w+)\.ppm", name)
            if match:
                example = {"image": members.read(name), "label": int(match[1])}
                yield f"{match[1]}/{match[2]}", example


def gtsrb_test(archive: pathlib.Path, truth: pathlib.Path) -> Examples:
    """Reads GTSRB's test archive of ppm images, and the labels from the archive beside it."""
    with zipfile.ZipFile(truth) as members:
        table = io.StringIO(members.read("GT-final_test.csv").decode())
    with zipfile.ZipFile(archive) as members:
        for row in csv.DictReader(table, delimiter=";"):
            name = row["Filename"]
            image = members.read(f"GTSRB/Final_Test/Images/{name}")
            yield name, {"image": image, "label": int(row["ClassId"])}


def imagenette(archive: pathlib.Path, folder: str, classes: Sequence[str]) -> Examples:
    """Reads one folder (`train` or `val`) of an Imagenette archive: one folder a class, JPEGs.

    Args:
      archive: the .tgz file.
      folder: the folder, below the archive's own.
      classes: the folder name of each class.
    """
    pattern = re.compile(rf"[\w-]+/{folder}/(n\d+)/([\w-]+\.JPEG)")
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            match = pattern.fullmatch(member.name)
            file = tar.extractfile(member) if match else None
            if match and file is not None:
                yield match[2], {"image": file.read(), "label": classes.index(match[1])}
