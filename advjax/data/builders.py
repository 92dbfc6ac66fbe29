"""tensorflow-datasets builders that prepare the official files without TensorFlow.

They have the names, versions and features of tensorflow-datasets' own, so that what they write
lies where those would put it and is read the same way. MNIST, EMNIST and CIFAR keep the order of
the official files; GTSRB and Imagenette stand in class order there and are hash-shuffled.

Importing this module imports tensorflow-datasets.
"""

import hashlib
import io
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import PIL.Image
import tensorflow_datasets as tfds

from advjax.data import catalogue, formats

Paths = Mapping[str, pathlib.Path]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders share: features, the checked download, the encoding of examples."""

    SPEC: ClassVar[catalogue.Spec]
    KEEPS_ORDER: ClassVar[bool] = True

    def _read(self, split: str, paths: Paths) -> formats.Examples:
        """Reads one split of the official files; each builder has its own way."""
        raise NotImplementedError

    def _features(self) -> dict[str, Any]:
        return {
            "image": tfds.features.Image(shape=self.SPEC.image_shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=self.SPEC.class_names),
        }

    def _files(self) -> tuple[str, ...]:
        return tuple(self.SPEC.archives)

    def _picture(self, image: Any) -> Any:
        """What tensorflow-datasets can store without TensorFlow: a picture, not an array."""
        return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(self._features()),
            supervised_keys=("image", "label"),
            disable_shuffling=self.KEEPS_ORDER,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        archives = {file: self.SPEC.archives[file] for file in self._files()}
        downloaded = dl_manager.download({file: entry.url for file, entry in archives.items()})
        paths = {file: pathlib.Path(path) for file, path in downloaded.items()}
        for file, path in paths.items():
            check_digest(path, archives[file])
        return {split: self._generate_examples(split, paths) for split in self.SPEC.splits}

    def _generate_examples(self, split: str, paths: Paths) -> Iterator[Any]:
        for index, (key, example) in enumerate(self._read(split, paths)):
            example["image"] = self._picture(example["image"])
            # Where the order is kept the key has to count up; elsewhere it is hashed.
            yield (index if self.KEEPS_ORDER else key), example


class Mnist(_Builder, skip_registration=True):
    """The MNIST database of handwritten digits (LeCun, Cortes, Burges)."""

    VERSION = tfds.core.Version("3.0.1")
    SPEC = catalogue.spec_of("mnist")

    def _read(self, split: str, paths: Paths) -> formats.Examples:
        stem = "train" if split == "train" else "t10k"
        images, labels = (f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz")
        with paths[images].open("rb") as image_file, paths[labels].open("rb") as label_file:
            yield from formats.idx_pair(image_file, label_file)


class Emnist(_Builder, skip_registration=True):
    """EMNIST ByClass: MNIST extended to handwritten letters (Cohen et al., 2017).

    The images lie on their side, as in the official files.
    """

    VERSION = tfds.core.Version("3.1.0")
    BUILDER_CONFIGS: ClassVar[list[Any]] = [
        tfds.core.BuilderConfig(name="byclass", description="62 classes")
    ]
    SPEC = catalogue.spec_of("emnist")

    def _read(self, split: str, paths: Paths) -> formats.Examples:
        stem = f"gzip/emnist-byclass-{split}"
        return formats.idx_pair_in_zip(
            paths["gzip.zip"], f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz"
        )


class Cifar10(_Builder, skip_registration=True):
    """CIFAR-10, from Learning multiple layers of features from tiny images (Krizhevsky, 2009)."""

    VERSION = tfds.core.Version("3.0.2")
    SPEC = catalogue.spec_of("cifar10")
    MEMBERS: ClassVar[dict[str, list[str]]] = {
        "train": [f"cifar-10-batches-bin/data_batch_{index}.bin" for index in range(1, 6)],
        "test": ["cifar-10-batches-bin/test_batch.bin"],
    }
    LABELS: ClassVar[tuple[str, ...]] = ("label",)

    def _features(self) -> dict[str, Any]:
        return {"id": tfds.features.Text(), **super()._features()}

    def _read(self, split: str, paths: Paths) -> formats.Examples:
        (archive,) = paths.values()
        for key, example in formats.cifar_binary(archive, self.MEMBERS[split], self.LABELS):
            yield key, {"id": f"{split}_{key}", **example}


class Cifar100(Cifar10, skip_registration=True):
    """CIFAR-100, from Learning multiple layers of features from tiny images (Krizhevsky, 2009)."""

    SPEC = catalogue.spec_of("cifar100")
    MEMBERS: ClassVar[dict[str, list[str]]] = {
        "train": ["cifar-100-binary/train.bin"],
        "test": ["cifar-100-binary/test.bin"],
    }
    LABELS: ClassVar[tuple[str, ...]] = ("coarse_label", "label")

    def _features(self) -> dict[str, Any]:
        return {"coarse_label": tfds.features.ClassLabel(num_classes=20), **super()._features()}


class Gtsrb(_Builder, skip_registration=True):
    """The German traffic sign recognition benchmark (Stallkamp et al., 2012).

    Whole images, resized to 32x32 (bilinear, averaging where they shrink).
    """

    VERSION = tfds.core.Version("1.0.0")
    SPEC = catalogue.spec_of("gtsrb")
    KEEPS_ORDER = False

    def _read(self, split: str, paths: Paths) -> formats.Examples:
        if split == "train":
            return formats.gtsrb_train(paths["GTSRB_Final_Training_Images.zip"])
        return formats.gtsrb_test(
            paths["GTSRB_Final_Test_Images.zip"], paths["GTSRB_Final_Test_GT.zip"]
        )

    def _picture(self, image: bytes) -> PIL.Image.Image:
        height, width, _ = self.SPEC.image_shape
        picture = PIL.Image.open(io.BytesIO(image), formats=["PPM"]).convert("RGB")
        return picture.resize((width, height), PIL.Image.Resampling.BILINEAR)


class Imagenette(_Builder, skip_registration=True):
    """Ten classes of ImageNet (Howard, https://github.com/fastai/imagenette), second version."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[Any]] = [
        tfds.core.BuilderConfig(name=f"{size}px-v2", description=f"short side {size} pixels")
        for size in (320, 160)
    ]
    SPEC = catalogue.spec_of("imagenet10")
    KEEPS_ORDER = False

    def _features(self) -> dict[str, Any]:
        return {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(catalogue.IMAGENETTE_CLASSES)),
        }

    def _files(self) -> tuple[str, ...]:
        assert self.builder_config is not None
        return (f"imagenette2-{self.builder_config.name.removesuffix('px-v2')}.tgz",)

    def _picture(self, image: bytes) -> bytes:
        return image

    def _read(self, split: str, paths: Paths) -> formats.Examples:
        (archive,) = paths.values()
        folder = "val" if split == "validation" else split
        return formats.imagenette(archive, folder, list(catalogue.IMAGENETTE_CLASSES))


BUILDERS: dict[str, type[_Builder]] = {
    builder.SPEC.name: builder for builder in (Mnist, Emnist, Cifar10, Cifar100, Gtsrb, Imagenette)
}


def check_digest(path: pathlib.Path, archive: catalogue.Archive) -> None:
    """Checks that a downloaded file is the official one.

    Raises:
      ValueError: it is not.
    """
    algorithm, expected = archive.digest.split(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise ValueError(
            f"data.load: {path} is not the official {archive.url} ({algorithm} {found}, "
            f"need {expected}); delete it to download again."
        )
