"""`Dataset`: what it refuses, and that it cannot be changed."""

import dataclasses

import numpy as np
import pytest

from advjax import data


def make(**changes):
    fields = {
        "images": np.full((3, 2, 2, 1), 255, np.uint8),
        "labels": np.array([0, 1, 1], np.int32),
        "num_classes": 2,
        "name": "toy",
        "split": "train",
        "class_names": ("a", "b"),
    }
    return data.Dataset(**(fields | changes))


def test_length_shape_and_text():
    dataset = make()
    assert len(dataset) == 3
    assert dataset.image_shape == (2, 2, 1)
    assert repr(dataset) == "Dataset(toy, train: 3 images 2x2x1, 2 classes)"


def test_float_images_span_the_box():
    images = make(images=np.array([0, 128, 255], np.uint8).reshape(3, 1, 1, 1)).float_images()
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images.ravel(), np.float32([0, 128, 255]) / np.float32(255))


def test_float_images_stay_as_they_are():
    images = np.random.default_rng(0).random((3, 2, 2, 1), np.float32)
    dataset = make(images=images)
    np.testing.assert_array_equal(dataset.float_images(), images)
    dataset.float_images()[:] = 0  # a copy, as with uint8
    np.testing.assert_array_equal(dataset.images, images)


def test_take():
    dataset = make()
    np.testing.assert_array_equal(dataset.take(2).labels, [0, 1])
    assert len(dataset.take(0)) == 0
    for n in (-1, 4):
        with pytest.raises(ValueError, match=rf"need 0 <= n <= 3 \(toy, train\), got n={n}"):
            dataset.take(n)


def test_nothing_is_mutable_and_the_callers_array_stays_writable():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    dataset = make(images=images)
    with pytest.raises(ValueError, match="read-only"):
        dataset.images[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "other"
    images[0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": np.zeros((3, 2, 2, 1), np.float64)},
            r"uint8\[n, h, w, c\] or float32\[n, h, w, c\], got float64",
        ),
        (
            {"images": np.full((3, 2, 2, 1), 255, np.float32)},
            r"float images in \[0, 1\], got values in \[255.0, 255.0\]",
        ),
        ({"images": np.full((3, 2, 2, 1), np.nan, np.float32)}, r"float images in \[0, 1\]"),
        ({"images": np.zeros((3, 2, 2), np.uint8)}, r"got uint8\[3, 2, 2\]"),
        ({"labels": np.zeros(3, np.int64)}, r"labels int32\[3\], got int64\[3\]"),
        ({"labels": np.zeros(2, np.int32)}, r"labels int32\[3\], got int32\[2\]"),
        ({"labels": np.array([0, 1, 2], np.int32)}, r"labels in \[0, 2\), got 0 to 2"),
        ({"labels": np.array([0, -1, 1], np.int32)}, r"labels in \[0, 2\), got -1 to 1"),
        ({"class_names": ("a",)}, "one class name for each of 2 classes, got 1"),
    ],
)
def test_fields_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
