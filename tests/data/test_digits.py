"""The embedded digits: a fixed, stratified split."""

import hashlib

import numpy as np
import pytest

from advjax import data


def test_sizes_and_types():
    train, test = data.load("digits"), data.load("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert train.images.shape[1:] == data.info("digits").image_shape == (8, 8, 1)
    assert train.images.min() == 0
    assert train.images.max() == 255


def test_every_class_is_split_alike():
    train, test = data.load("digits"), data.load("digits", "test")
    share = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    # A class has at least 174 images, so rounding to one moves the share by at most 0.003.
    np.testing.assert_allclose(share, 0.2, atol=0.003)


def test_the_splits_are_the_whole_set():
    import sklearn.datasets

    every = data.load("digits", "all")
    expected = np.round(sklearn.datasets.load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, every.images)) == sorted(map(bytes, expected))


def test_the_split_never_changes():
    # Every published number rests on it. Not a random stream: NumPy froze RandomState.
    digest = hashlib.sha256(data.load("digits", "test").images.tobytes()).hexdigest()
    assert digest[:16] == "cc8ee163d2e471d6"


def test_slices_are_parts_of_the_base_split():
    test = data.load("digits", "test")
    part = data.load("digits", "test[36:50]+test[:3]")
    np.testing.assert_array_equal(part.labels, np.r_[test.labels[36:50], test.labels[:3]])
    np.testing.assert_array_equal(part.images[0], test.images[36])
    assert part.split == "test[36:50]+test[:3]"


def test_loading_needs_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "absent"))
    monkeypatch.setenv("ADVJAX_CACHE_DIR", str(tmp_path / "cache"))
    data.load("digits")
    assert not list(tmp_path.iterdir())


def test_no_split():
    with pytest.raises(ValueError, match="cannot read the split None; write 'test'"):
        data.load("digits", None)


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'val' of digits; it has: train, test"):
        data.load("digits", "val")
