"""Balls: norms, directions, projections and draws against their definitions."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from advjax import balls
from advjax.core import random
from tests import helpers

pytestmark = pytest.mark.usefixtures("full_compilation")

SHAPE = (3, 4, 2)
NUM_PIXELS = 24
NUM_IMAGES = 5
BALLS = {"linf": balls.linf, "l2": balls.l2, "l1": balls.l1}

# Seeds and scales instead of arrays: hypothesis has nothing to gain from shrinking pixels.
seeds = st.integers(0, 2**32 - 1)
exponents = st.floats(-12, 3)


@pytest.fixture(params=BALLS)
def ball(request):
    return BALLS[request.param]


@functools.cache
def compiled(name, method):
    return jax.jit(getattr(BALLS[name], method))


def drawn(seed, exponent):
    """Images, points around them, and a radius an image; all at the scale 10**exponent."""
    rng = np.random.default_rng(seed)
    x = helpers.images(seed, NUM_IMAGES, SHAPE)
    scale = np.float32(10**exponent)
    offset = (rng.normal(size=x.shape) * scale).astype(np.float32)
    offset = np.where(rng.random(x.shape) < rng.random(), offset, 0)
    epsilon = (rng.random(NUM_IMAGES) * scale * 3).astype(np.float32)
    epsilon[0] = 0
    return x, (x + offset).astype(np.float32), epsilon


def bisected_l1(delta, epsilon):
    """The projection on the l1 ball: soft-thresholding at a level found by halving, float64."""
    size = np.abs(delta)
    if size.sum() <= epsilon:
        return delta
    low, high = 0.0, size.max()
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.maximum(size - level, 0).sum() > epsilon else (low, level)
    return np.sign(delta) * np.maximum(size - high, 0)


def exact_projection(name, delta, epsilon):
    """The Euclidean projection of each row of float64[b, d] on its ball."""
    rows = []
    for row, radius in zip(delta, epsilon, strict=True):
        if name == "linf":
            rows.append(np.clip(row, -radius, radius))
        elif name == "l2":
            length = np.sqrt((row**2).sum())
            rows.append(row * (radius / length if length > radius else 1))
        else:
            rows.append(bisected_l1(row, radius))
    return np.array(rows)


@hypothesis.given(seed=seeds, exponent=exponents)
@hypothesis.settings(max_examples=100)
@pytest.mark.parametrize("name", BALLS)
def test_project_is_inside_and_stays(name, seed, exponent):
    x, z, epsilon = drawn(seed, exponent)
    project = compiled(name, "project")
    inside = np.asarray(project(z, x, epsilon))
    helpers.assert_in_ball_and_box(inside, x, name, epsilon)
    helpers.assert_same_bits(inside[0], x[0])  # epsilon = 0
    again = project(inside, x, epsilon)
    helpers.assert_in_ball_and_box(again, x, name, epsilon)
    # What is inside already may move by the slack that `project` leaves: 6e-8 a pixel, and a few
    # roundings of the radius, which is never more than one a pixel.
    atol = 6e-8 * (NUM_PIXELS + 4 * min(NUM_PIXELS, epsilon.max()) + 4)
    np.testing.assert_allclose(again, inside, rtol=0, atol=atol)


@hypothesis.given(seed=seeds, exponent=st.floats(-3, 0))
@pytest.mark.parametrize("name", BALLS)
def test_project_leaves_what_is_inside(name, seed, exponent):
    x, z, _ = drawn(seed, exponent)
    z = np.clip(z, 0, 1)
    # Well inside, beyond the slack of 24 x 6e-8.
    epsilon = helpers.norms(name, z.astype(np.float64) - x) * 1.001 + 1e-5
    inside = compiled(name, "project")(z, x, epsilon.astype(np.float32))
    # 6e-8: x + (z - x) in float32.
    np.testing.assert_allclose(inside, z, rtol=0, atol=1.2e-7)


@hypothesis.given(seed=seeds, exponent=st.floats(-3, 3))
@pytest.mark.parametrize("name", BALLS)
def test_shrink_is_the_euclidean_projection(name, seed, exponent):
    x, z, epsilon = drawn(seed, exponent)
    delta = z - x
    shape = (NUM_IMAGES, 1, 1, 1)
    shrunk = np.asarray(compiled(name, "shrink")(delta, epsilon.reshape(shape)))
    flat = delta.reshape(NUM_IMAGES, -1).astype(np.float64)
    expected = exact_projection(name, flat, epsilon.astype(np.float64)).reshape(delta.shape)
    # A running sum of 24 float32 numbers is right to 24 x 6e-8 of their sum (l1).
    atol = 24 * 6e-8 * np.abs(flat).sum(1).max()
    np.testing.assert_allclose(shrunk, expected, rtol=0, atol=atol)


@hypothesis.given(seed=seeds)
@pytest.mark.parametrize("name", BALLS)
def test_no_point_of_the_ball_is_nearer(name, seed):
    """Where the box is far, `<z - p, q - p> <= 0` for every point q of the ball."""
    rng = np.random.default_rng(seed)
    x = np.full((1, *SHAPE), 0.5, np.float32)
    epsilon = np.float32(rng.uniform(0.01, 0.4))
    z = (x + rng.normal(size=x.shape) * 0.2).astype(np.float32)
    p = np.asarray(compiled(name, "project")(z, x, np.full(NUM_IMAGES, epsilon)[:1]), np.float64)
    q = rng.normal(size=(200, NUM_PIXELS)) * (rng.random((200, NUM_PIXELS)) < 0.3)
    q *= (epsilon * rng.random(200) / np.maximum(helpers.norms(name, q), 1e-9))[:, None]
    angle = (q - (p - x).reshape(-1)) @ (z - p).reshape(-1)
    # 24 x 6e-8: the slack, times distances that are of size one.
    assert angle.max() <= 24 * 6e-8 * 4


def test_box_is_applied_after_the_ball(ball):
    x = np.zeros((1, *SHAPE), np.float32)
    inside = np.asarray(ball.project(x - 1, x, 0.5))
    helpers.assert_same_bits(np.abs(inside), x)
    x = x + 1
    helpers.assert_same_bits(ball.project(x + 1, x, 0.5), x)


def test_what_is_not_finite_becomes_the_image(ball):
    x = helpers.images(0, 3, SHAPE)
    z = x.copy()
    z[0], z[1], z[2] = np.nan, np.inf, -np.inf
    helpers.assert_same_bits(ball.project(z, x, 0.3), x)


LARGER = (48, 48, 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", BALLS)
def test_project_is_exact_for_larger_images(name, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(helpers.images(0, 2, LARGER), dtype)
    z = jnp.asarray(np.float32(x) + rng.normal(size=x.shape), dtype)
    for value in (0, 1e-6, 1e-3, 0.3, 3, 30, 300, 1e4):
        epsilon = jnp.full(2, value, dtype)
        inside = compiled(name, "project")(z, x, epsilon)
        helpers.assert_in_ball_and_box(inside, x, name, epsilon)


@pytest.mark.parametrize("name", BALLS)
def test_the_radius_is_used(name):
    """What keeps the projection inside costs at most the worst rounding of every pixel."""
    rng = np.random.default_rng(0)
    x = np.full((2, *LARGER), 0.5, np.float32)
    z = (x + rng.normal(size=x.shape) * 0.1).astype(np.float32)
    epsilon = np.float32({"linf": [0.01, 0.02], "l2": [1, 2], "l1": [10, 20]}[name])
    inside = compiled(name, "project")(z, x, epsilon)
    norm = helpers.norms(name, np.float64(inside) - x)
    worst = {"linf": 1, "l2": x[0].size ** 0.5, "l1": x[0].size}[name] * 6e-8
    # Twice: the slack, and the rounding that it is for.
    assert np.all(norm >= epsilon * (1 - 1e-6) - 2 * worst)


def test_norms(ball):
    delta = np.random.default_rng(0).normal(size=(NUM_IMAGES, *SHAPE)).astype(np.float32)
    expected = helpers.norms(ball.name, delta.astype(np.float64))
    # 1e-6: sums of 24 terms in float32.
    np.testing.assert_allclose(ball.norm(delta), expected, rtol=1e-6)
    np.testing.assert_allclose(ball.distance(delta + 1, np.ones_like(delta)), expected, rtol=1e-5)
    np.testing.assert_array_equal(ball.norm(np.zeros_like(delta)), np.zeros(NUM_IMAGES))


def test_direction_is_steepest_of_unit_norm(ball):
    gradient = np.random.default_rng(0).normal(size=(NUM_IMAGES, *SHAPE)).astype(np.float32)
    gradient[0] = 0
    x = np.full_like(gradient, 0.5)
    direction = np.asarray(ball.direction(gradient, x), np.float64)
    np.testing.assert_array_equal(direction[0], 0)
    # 1e-6: float32 sums.
    np.testing.assert_allclose(helpers.norms(ball.name, direction[1:]), 1, rtol=1e-6)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[ball.name]
    slope = (direction * gradient).sum((1, 2, 3))
    np.testing.assert_allclose(slope, helpers.norms(dual, gradient.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-10, 1e10, 1e30])
def test_direction_at_any_scale(ball, scale):
    gradient = (np.random.default_rng(0).normal(size=(2, *SHAPE)) * scale).astype(np.float32)
    direction = np.asarray(ball.direction(gradient, np.full_like(gradient, 0.5)), np.float64)
    # Numbers below 1e-38 may count as zero; all or nothing then, and never NaN.
    norms = helpers.norms(ball.name, direction)
    assert np.all((np.abs(norms - 1) < 1e-5) | ((norms == 0) & (scale < 1e-38))), norms


def test_l1_direction_spends_nothing_on_pixels_that_cannot_move():
    gradient = np.float32([[3, -2, 1]]).reshape(1, 1, 3, 1)
    x = np.float32([[1, 0.5, 0.5]]).reshape(1, 1, 3, 1)
    np.testing.assert_array_equal(balls.l1.direction(gradient, x).ravel(), [0, -1, 0])
    x = np.float32([[1, 0, 1]]).reshape(1, 1, 3, 1)
    np.testing.assert_array_equal(balls.l1.direction(gradient, x).ravel(), [0, 0, 0])


NUM_DRAWS = 4096


GRAY = np.full((NUM_DRAWS, *SHAPE), 0.5, np.float32)
KEYS = random.example_keys(jax.random.key(0), NUM_DRAWS)


@functools.cache
def draws(name):
    """Offsets of random images around gray, in units of a radius that stays inside the box."""
    epsilon = np.full(NUM_DRAWS, 0.5, np.float32)
    points = compiled(name, "uniform")(KEYS, GRAY, epsilon)
    helpers.assert_in_ball_and_box(points, GRAY, name, epsilon)
    return (np.float64(points) - 0.5).reshape(NUM_DRAWS, -1) / 0.5


@pytest.mark.parametrize("name", BALLS)
def test_uniform_fills_the_ball(name):
    # The volume within radius t grows as t**d: the radius has mean d / (d + 1) and standard
    # deviation sqrt(d / (d + 2)) / (d + 1); five standard errors.
    d = NUM_PIXELS
    radius = helpers.norms(name, draws(name))
    error = np.sqrt(d / (d + 2)) / (d + 1) / np.sqrt(NUM_DRAWS)
    assert abs(radius.mean() - d / (d + 1)) < 5 * error
    # Radius to the d is uniform in [0, 1]: the largest gap of its distribution function
    # (Kolmogorov) is above 2 / sqrt(n) with probability 7e-4.
    ranked = np.sort(radius**d)
    assert np.abs(ranked - (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS).max() < 2 / NUM_DRAWS**0.5


@pytest.mark.parametrize("name", BALLS)
def test_uniform_prefers_no_pixel_and_no_sign(name):
    points = draws(name)
    spread = points.std()
    # Five standard errors of each pixel's mean; a variance's is about sqrt(kurtosis / n) of it,
    # at most 2.5 / sqrt(n) for the heavy-tailed coordinates of the l1 ball.
    assert np.abs(points.mean(0)).max() < 5 * spread / NUM_DRAWS**0.5
    assert np.abs(points.var(0) / spread**2 - 1).max() < 5 * 2.5 / NUM_DRAWS**0.5
    assert abs((points[:, 0] * points[:, 1]).mean()) < 5 * spread**2 / NUM_DRAWS**0.5


@pytest.mark.parametrize("name", BALLS)
def test_uniform_is_a_matter_of_the_example_alone(name):
    x = helpers.images(0, NUM_DRAWS, SHAPE)
    epsilon = np.linspace(0, 1, NUM_DRAWS, dtype=np.float32)
    uniform = compiled(name, "uniform")
    points = np.asarray(uniform(KEYS, x, epsilon))
    helpers.assert_in_ball_and_box(points, x, name, epsilon)
    helpers.assert_same_bits(points[0], x[0])
    turned = uniform(KEYS[::-1], x[::-1], epsilon[::-1])
    helpers.assert_same_bits(np.asarray(turned)[::-1], points)


@pytest.mark.parametrize(
    "name, dtype", [("l2", jnp.float16), ("l1", jnp.float16), ("l2", jnp.bfloat16)]
)
def test_uniform_moves_short_floats(name, dtype):
    # More pixels than float16 can count: a sum of squares, or of sizes, overflows at 65504.
    x = jnp.full((1, 224, 224, 3), 0.5, dtype)
    epsilon = jnp.full(1, {"l2": 50, "l1": 2e4}[name], dtype)
    points = compiled(name, "uniform")(KEYS[:1], x, epsilon)
    assert points.dtype == dtype
    helpers.assert_in_ball_and_box(points, x, name, epsilon)
    moved = helpers.norms(name, np.asarray(points, np.float64) - 0.5)
    # A draw in that many dimensions lies near the surface; what the slack may cost is 0.88 (l2,
    # bfloat16) and 74 (l1, float16).
    assert np.all(moved > 0.8 * np.asarray(epsilon, np.float64))


def test_balls_are_static_values():
    assert repr(balls.l2) == "balls.l2"
    assert len({balls.linf, balls.l2, balls.l1}) == 3
    assert [balls.get(name) for name in BALLS] == list(BALLS.values())


def test_per_example():
    x = jnp.zeros((3, 4, 4, 1), jnp.bfloat16)
    assert balls.per_example(0.1, x).shape == ()
    assert balls.per_example(np.float32([0, 1, 2]), x).shape == (3, 1, 1, 1)
    assert balls.per_example(np.float32(0.1), x).dtype == jnp.bfloat16


def l1_in_box(delta, x, epsilon):
    """The projection on the l1 ball and the box at once: a level found by halving, float64."""
    room = np.where(delta > 0, 1 - x, x)
    moved = lambda level: np.clip(np.abs(delta) - level, 0, room)
    if moved(0).sum() <= epsilon:
        return np.sign(delta) * moved(0)
    low, high = 0.0, np.abs(delta).max()
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if moved(level).sum() > epsilon else (low, level)
    return np.sign(delta) * moved(high)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("exponent", [-3, -1, 0, 2])
def test_l1_in_the_box_is_the_euclidean_projection(exponent, dtype):
    project = jax.jit(balls.project_l1_in_box)
    for seed in range(10):
        x, z, epsilon = (jnp.asarray(a, dtype) for a in drawn(seed, exponent))
        inside = project(z, x, epsilon)
        helpers.assert_in_ball_and_box(inside, x, "l1", epsilon)
        helpers.assert_same_bits(inside[0], x[0])  # epsilon = 0
        flat_x, flat_z, flat = (
            np.asarray(a).astype(np.float64).reshape(NUM_IMAGES, -1) for a in (x, z, inside)
        )
        expected = flat_x + [
            l1_in_box(*row, np.float64(radius))
            for *row, radius in zip(flat_z - flat_x, flat_x, np.asarray(epsilon), strict=True)
        ]
        # The slack for rounding, half a step of the grid a pixel, which one pixel alone may have to
        # bear besides its own rounding, and a few roundings of the sums.
        half_step = float(jnp.finfo(dtype).eps) / 4
        atol = half_step * (NUM_PIXELS + 1) + 1e-6 * (1 + np.abs(flat_z).max())
        np.testing.assert_allclose(flat, expected, rtol=0, atol=atol)
    far = jnp.full_like(z, jnp.nan)
    helpers.assert_same_bits(project(far, x, epsilon), x)
    each = jax.vmap(lambda radius: project(z, x, radius))(jnp.asarray([0.5, 1.0], dtype))
    helpers.assert_same_bits(each[1], project(z, x, 1.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_a_short_float_does_not_widen_the_radius(dtype):
    """8 / 255 in bfloat16 is 0.03149."""
    x = jnp.asarray(helpers.images(0, NUM_IMAGES, SHAPE), dtype)
    for epsilon in (2 / 255, 4 / 255, 8 / 255, 0.1, 0.3):
        inside = [balls.linf.project(x + sign, x, epsilon) for sign in (-1, 1)] + [
            jax.jit(balls.linf.project)(x + 1, x, np.float32(epsilon))
        ]
        for moved in inside:
            helpers.assert_in_ball_and_box(moved, x, "linf", np.float32(epsilon))
            step = float(jnp.finfo(dtype).eps)
            assert float(balls.linf.distance(moved, x).max()) > epsilon * (1 - 2 * step) - step / 2


@pytest.mark.parametrize("name, epsilon", [("l2", 0.005), ("l1", 0.02)])
def test_a_radius_that_rounding_takes_is_refused(name, epsilon):
    x = jnp.asarray(helpers.images(0, NUM_IMAGES, SHAPE), jnp.bfloat16)
    sentence = rf"^balls.{name}: need epsilon > 0.0\d+ for images of bfloat16, .* got epsilon="
    with pytest.raises(ValueError, match=sentence) as caught:
        BALLS[name].project(x, x, epsilon)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=sentence):
        BALLS[name].project(x, x, np.float32([1, 1, epsilon, 0, 1]))
    helpers.assert_same_bits(BALLS[name].project(x, x, 0.0), x)
    wide = x.astype(jnp.float32)
    helpers.assert_same_bits(BALLS[name].project(wide, wide, epsilon), wide)
