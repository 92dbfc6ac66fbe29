"""What is read off a map: closed forms, bounds that hold for all maps, scipy's components."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from advjax import boundary

components = jax.jit(boundary.components)  # its loops are slow op by op
fragmentation = jax.jit(boundary.fragmentation)
connected_shares = jax.jit(boundary.connected_shares)
MAPS = arrays.arrays(np.int32, (7, 9), elements=st.integers(0, 3))


def test_shares_of_several_maps():
    maps = jnp.array([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])
    np.testing.assert_array_equal(
        boundary.region_shares(maps, 4), [[0.25, 0.75, 0, 0], [0, 0, 1, 0]]
    )


@hypothesis.settings(max_examples=30)
@given(MAPS)
def test_entropy_lies_in_its_bounds(labels):
    shares = np.asarray(boundary.region_shares(labels, 4))
    np.testing.assert_allclose(shares, np.bincount(labels.ravel(), minlength=4) / 63, atol=1e-6)
    least = -np.log(shares.max())
    entropy = float(boundary.renyi_entropy(shares))
    assert least - 1e-6 <= entropy <= 10 / 9 * least + 1e-6
    orders = jnp.array([0.0, 0.5, 1.0, 2.0, 10.0, 100.0, jnp.inf])
    entropies = np.asarray(jax.vmap(lambda order: boundary.renyi_entropy(shares, order))(orders))
    assert np.all(np.diff(entropies) <= 1e-5), entropies  # it falls with the order
    np.testing.assert_allclose(entropies[0], np.log((shares > 0).sum()), atol=1e-5)
    positive = shares[shares > 0].astype(float)
    np.testing.assert_allclose(entropies[2], -np.sum(positive * np.log(positive)), atol=1e-5)
    np.testing.assert_allclose(entropies[-1], least, atol=1e-5)


@given(MAPS, st.floats(0, 1))
def test_area_against_numpy(labels, limit):
    shares = np.asarray(boundary.region_shares(labels, 4))
    triple = np.array([0, 2, 3])
    expected = sum(shares[k] for k in triple if shares[k] < np.float32(limit))
    np.testing.assert_allclose(boundary.triple_area(shares, triple, limit), expected, atol=1e-6)


def test_a_traced_limit_of_known_shares():
    shares, labels = jnp.array([0.625, 0.25, 0.125]), jnp.array([0, 1, 2])
    area = jax.jit(lambda limit: boundary.triple_area(shares, labels, limit))
    assert [float(area(limit)) for limit in (0.2, 0.5, 0.7)] == [0.125, 0.375, 1.0]


def test_entropy_of_many_classes_does_not_underflow():
    shares = np.full(100_000, 1e-5)
    np.testing.assert_allclose(boundary.renyi_entropy(shares), np.log(1e5), rtol=1e-5)
    assert float(boundary.renyi_entropy(jnp.array([1.0, 0.0]))) == 0


def test_a_share_at_the_limit_does_not_count():
    shares = jnp.array([0.5, 0.25, 0.25])
    assert float(boundary.triple_area(shares, jnp.array([0, 1, 2]), 0.5)) == 0.5
    assert float(boundary.triple_area(shares, jnp.array([0, 1, 2]), 0.51)) == 1.0
    assert float(boundary.triple_area(shares, jnp.array([0, 1, 2]), 0.0)) == 0.0


@given(MAPS)
def test_components_against_scipy(labels):
    """The same partition: two points share a number here if and only if they do in scipy."""
    numbers = np.asarray(components(labels))
    expected = np.zeros(labels.shape, int)
    for label in np.unique(labels):
        pieces, _ = scipy.ndimage.label(labels == label)
        expected = np.where(pieces > 0, pieces + expected.max(), expected)
    pairs = set(zip(numbers.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == len(np.unique(numbers)) == expected.max()
    assert int(fragmentation(labels)) == expected.max()
    positions = jnp.array([[0, 0], [6, 8], [3, 4]])
    own = [np.mean(expected == expected[tuple(place)]) for place in np.asarray(positions)]
    np.testing.assert_allclose(connected_shares(labels, positions), own, atol=1e-6)


def test_a_winding_region_is_one_piece():
    spiral = np.zeros((21, 21), np.int32)
    spiral[1::4, :-1] = spiral[3::4, 1:] = 1  # a snake: its rows are joined at alternating ends
    spiral[2::4, -2], spiral[4::4, 1] = 1, 1
    snake = scipy.ndimage.label(spiral)[1]
    others = scipy.ndimage.label(1 - spiral)[1]
    assert int(boundary.fragmentation(jnp.asarray(spiral))) == snake + others


def test_reproducibility():
    first = jnp.array([[0, 1], [2, 3]])
    assert float(boundary.reproducibility(first, first)) == 1
    assert float(boundary.reproducibility(first, first, measure="iou")) == 1
    second = jnp.array([[0, 1], [2, 0]])
    assert float(boundary.reproducibility(first, second)) == 0.75
    np.testing.assert_allclose(boundary.reproducibility(first, second, measure="iou"), 3 / 5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: boundary.region_shares(jnp.zeros((2, 2)), 3), "map of integer classes, got float"),
        (lambda: boundary.region_shares(jnp.zeros(2, int), 3), r"shape \[..., rows, columns\]"),
        (
            lambda: boundary.region_shares(jnp.full((2, 2), 3), 3),
            r"0 \.\.\. 2, got 3 \.\.\. 3 at 4",
        ),
        (lambda: boundary.renyi_entropy(jnp.array([0.5, 0.4])), "sum to 1, got sums 0.9"),
        (
            lambda: boundary.renyi_entropy(jnp.array([0.5, 0.5]), -1),
            "need order >= 0, got order=-1",
        ),
        (
            lambda: boundary.triple_area(jnp.array([0.5, 0.5]), jnp.array([0, 1, 2])),
            r"labels from 0 \.\.\. 1, got \[0, 1, 2\]",
        ),
        (
            lambda: boundary.triple_area(jnp.array([0.5, 0.5]), jnp.array([0, 1])),
            r"triple_labels int32\[\.\.\., 3\], got",
        ),
        (lambda: boundary.fragmentation(jnp.zeros((2, 2, 2), int)), r"shape \[rows, columns\]"),
        (
            lambda: boundary.reproducibility(jnp.zeros((2, 2), int), jnp.zeros((2, 3), int)),
            "maps of one shape",
        ),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        change()
