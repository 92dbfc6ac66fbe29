"""What a loaded data set is: images, labels and their names, all read-only."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images in memory; nothing in it can be changed in place.

    Args:
      images: uint8[n, h, w, c], or f32[n, h, w, c] in [0, 1] for what was computed and not rounded.
      labels: int32[n], in [0, num_classes).
      num_classes: how many classes the task has, also where some have no image here.
      name: the name `data.load` knows it by.
      split: the split as it was asked for, such as `"test[:80%]"`.
      class_names: one name a class.

    Raises:
      ValueError: shapes, dtypes or labels that do not fit together.

    Example:
      >>> from advjax import data
      >>> digits = data.load("digits", "test")
      >>> digits
      Dataset(digits, test: 359 images 8x8x1, 10 classes)
      >>> digits.take(5).float_images().shape
      (5, 8, 8, 1)
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    name: str
    split: str
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype not in (np.uint8, np.float32) or self.images.ndim != 4:
            raise ValueError(
                "Dataset: need images uint8[n, h, w, c] or float32[n, h, w, c], "
                f"got {self.images.dtype}{list(self.images.shape)}."
            )
        if self.images.dtype == np.float32 and self.images.size:
            low, high = self.images.min(), self.images.max()
            if not (low >= 0 and high <= 1):  # NaN is neither
                raise ValueError(
                    f"Dataset: need float images in [0, 1], got values in [{low}, {high}]."
                )
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"Dataset: need labels int32[{len(self.images)}], "
                f"got {self.labels.dtype}{list(self.labels.shape)}."
            )
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(
                f"Dataset: need labels in [0, {self.num_classes}), "
                f"got {self.labels.min()} to {self.labels.max()}."
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"Dataset: need one class name for each of {self.num_classes} classes, "
                f"got {len(self.class_names)}."
            )
        # A view is frozen, not the caller's own array.
        for field in ("images", "labels"):
            frozen = getattr(self, field).view()
            frozen.flags.writeable = False
            object.__setattr__(self, field, frozen)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return (
            f"Dataset({self.name}, {self.split}: {len(self)} images {shape}, "
            f"{self.num_classes} classes)"
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def take(self, n: int) -> "Dataset":
        """The first `n` examples.

        Raises:
          ValueError: `n` is negative or more than there are.
        """
        if not 0 <= n <= len(self):
            raise ValueError(
                f"Dataset.take: need 0 <= n <= {len(self)} ({self.name}, {self.split}), got n={n}."
            )
        return dataclasses.replace(self, images=self.images[:n], labels=self.labels[:n])

    def float_images(self) -> np.ndarray:
        """The images as every attack and classifier takes them: f32[n, h, w, c] in [0, 1]."""
        images = self.images.astype(np.float32)
        if self.images.dtype == np.uint8:
            images /= 255
        return images
