"""The plane through three models, and what is drawn on it."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from advjax.experiments import landscapes


@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(2, 40), st.sampled_from([1e-4, 1.0, 1e4]))
def test_the_plane_goes_through_its_points(seed, d, size):
    rng = np.random.default_rng(seed)
    origin, *offsets = rng.normal(size=(3, d))
    points = origin + size * np.array([np.zeros(d), *offsets])
    plane = landscapes.span(*points)
    # Directions are rounded to float32, 6e-8 an entry.
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-6)
    places = landscapes.coordinates(plane, points)
    lengths = np.linalg.norm(points - points[0], axis=1)
    # The origin is rounded to float32 too.
    tolerance = 1e-6 * (1 + size) * d
    np.testing.assert_allclose(places[0], 0, atol=tolerance)
    np.testing.assert_allclose(places[1], [lengths[1], 0], atol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), lengths, atol=tolerance)
    assert places[2, 1] > 0
    np.testing.assert_allclose(plane.origin + places @ plane.axes, points, atol=tolerance)


def test_a_projection_is_the_nearest_point():
    rng = np.random.default_rng(0)
    plane = landscapes.span(*rng.normal(size=(3, 7)))
    model = rng.normal(size=7)
    place = landscapes.coordinates(plane, model[None])[0]
    rest = model - plane.origin - place @ plane.axes
    np.testing.assert_allclose(plane.axes @ rest, 0, atol=1e-6)


@pytest.mark.parametrize("second", [0.0, 1.0, -2.0, 1 + 1e-9])
def test_points_on_one_line_are_refused(second):
    origin, direction = np.ones(4), np.array([1.0, 2, 0, 0])
    with pytest.raises(ValueError, match="span: need three points that are not on one line"):
        landscapes.span(origin, origin + direction, origin + second * direction)
    with pytest.raises(ValueError, match="span: need three points"):
        landscapes.span(origin, origin, origin + direction)


def test_losses_of_a_bowl():
    plane = landscapes.Plane(np.float32([1, 2, 3]), np.eye(2, 3, dtype=np.float32))
    x, y = np.array([0.0, 1.0, 2.0]), np.array([-1.0, 1.0])
    values = landscapes.losses(lambda p: jnp.sum((p - plane.origin) ** 2), plane, x, y)
    np.testing.assert_allclose(values, x**2 + y[:, None] ** 2, rtol=1e-6)


def test_a_landscape_shows_every_model():
    rng = np.random.default_rng(0)
    present, predicted, poisoned = rng.normal(size=(3, 8))
    benign = predicted + 0.5 * rng.normal(size=(6, 8))
    figure, axis = plt.subplots()
    plane = landscapes.landscape(
        axis, lambda p: jnp.sum(p**2), present=present, benign=benign, predicted=predicted,
        poisoned=poisoned, radius=2.5, num_points=5,
    )  # fmt: skip
    np.testing.assert_array_equal(plane.origin, np.float32(predicted))
    drawn = {
        artist.get_label(): artist.get_offsets().data
        for artist in axis.collections
        if not artist.get_label().startswith("_")
    }
    assert {name: len(offsets) for name, offsets in drawn.items()} == {
        "benign models": 6, "present global model": 1, "predicted model": 1, "poisoned model": 1,
    }  # fmt: skip
    np.testing.assert_allclose(
        drawn["benign models"], landscapes.coordinates(plane, benign), atol=1e-6
    )
    # The poisoned model lies in the plane, so its distance is the true one.
    np.testing.assert_allclose(
        np.linalg.norm(drawn["poisoned model"]), np.linalg.norm(poisoned - predicted), rtol=1e-5
    )
    (circle,) = axis.lines
    np.testing.assert_allclose(np.linalg.norm(circle.get_xydata(), axis=1), 2.5, rtol=1e-6)
    (low, high) = axis.get_xlim()
    assert low < -2.5 and high > 2.5
    plt.close(figure)
