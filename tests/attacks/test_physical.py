"""The channel part by part, against what each part is by definition, and the attack through it."""

import functools
import inspect
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from advjax import attacks, balls, losses, metrics, parallel, traits
from advjax.attacks import photograph
from advjax.attacks.physical import _on_average
from advjax.core import random
from tests import helpers

pytestmark = pytest.mark.usefixtures("quick_compilation")
NOTHING = dict.fromkeys(
    ("perspective", "crop", "brightness", "contrast", "blur", "noise", "compression"), 0.0
)
_settings = {
    name: value
    for name, value in inspect.signature(photograph).parameters.items()
    if name in NOTHING
}
KEY = jax.random.key(0)
SHAPE = (6, 12, 10, 3)  # neither side is a multiple of 8, and they differ


# Every setting is traced: one program a shape.
shoot = jax.jit(photograph)
pulled_back = jax.jit(
    lambda x, weights, **settings: jax.vjp(lambda x: photograph(KEY, x, **settings), x)[1](weights)[
        0
    ]
)


def only(x, key=KEY, **settings):
    """The photograph of a channel that has nothing but these."""
    return np.asarray(shoot(key, x, **(NOTHING | settings), strength=1.0))


def inner_images(seed=0, shape=SHAPE):
    """Far enough from 0 and 1 that nothing saturates."""
    return np.random.default_rng(seed).uniform(0.4, 0.6, shape).astype(np.float32)


# ------------------------------------------------------------------------------- the identity


@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (2, 3, 17, 4)])
def test_strength_zero_is_the_identity_bit_for_bit(shape):
    x = helpers.images(1, shape[0], shape[1:])
    photo = shoot(KEY, x, strength=0.0)
    helpers.assert_same_bits(photo, x)


def test_parameters_zero_are_the_identity_bit_for_bit():
    x = helpers.images(1, SHAPE[0], SHAPE[1:])
    helpers.assert_same_bits(only(x), x)
    # So is its gradient, also in pixels that are exactly 0 or 1.
    ones = np.ones_like(x)
    np.testing.assert_array_equal(pulled_back(x, ones, **NOTHING), ones)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_stay_short(dtype):
    x = jnp.asarray(helpers.images(2, SHAPE[0], SHAPE[1:]), dtype)
    photo = shoot(KEY, x)
    assert photo.dtype == dtype and photo.shape == x.shape
    values = np.asarray(photo, np.float32)
    assert values.min() >= 0 and values.max() <= 1
    helpers.assert_same_bits(shoot(KEY, x, strength=0.0), x)


# ------------------------------------------------------------------------------ known answers


def test_brightness_adds_one_number_to_each_image():
    x = inner_images()
    shift = only(x, brightness=0.2) - x
    # 1e-6: sums of numbers below one, in float32.
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1, :1], SHAPE), atol=1e-6)
    shift = shift[:, 0, 0, 0]
    assert np.all(np.abs(shift) <= 0.2) and len(set(shift)) == len(x)
    assert shift.min() < 0 < shift.max()


def test_contrast_scales_the_distance_from_grey():
    x = inner_images()
    factor = ((only(x, contrast=0.5) - 0.5) * (x - 0.5)).sum((1, 2, 3)) / ((x - 0.5) ** 2).sum(
        (1, 2, 3)
    )
    assert np.all(np.abs(factor - 1) <= 0.5) and np.ptp(factor) > 0.1
    expected = 0.5 + factor[:, None, None, None] * (x - 0.5)
    np.testing.assert_allclose(only(x, contrast=0.5), expected, rtol=0, atol=1e-6)  # rounding


def test_blur_is_a_gaussian():
    x = np.zeros((4, 15, 15, 1), np.float32)
    x[:, 7, 7] = 1
    spot = only(x, blur=0.1)[..., 0]
    # From the middle row: the logarithm of the response falls with the square of the distance.
    log = np.log(spot[:, 7, 7:9].astype(np.float64))
    variance = 1 / (2 * (log[:, 0] - log[:, 1]))
    assert np.all(variance <= (0.1 * 15) ** 2)
    distance = (np.indices((15, 15)) - 7) ** 2
    for image, s2 in zip(spot, variance, strict=True):
        expected = np.exp(-distance.sum(0) / (2 * s2))
        # 1e-5: the variance is read off two values of float32.
        np.testing.assert_allclose(image, expected / expected.sum(), rtol=0, atol=1e-5)


def test_blur_keeps_a_constant_image_and_lessens_detail():
    x = np.full(SHAPE, 0.3, np.float32)
    np.testing.assert_allclose(only(x, blur=0.2), x, rtol=1e-6)  # rows sum to one up to rounding
    x = inner_images()
    assert np.all(only(x, blur=0.2).std((1, 2, 3)) < x.std((1, 2, 3)))


def positions(**settings):
    """Where each pixel of a photograph was taken from, [b, h, w, 2] in the unit square.

    A bilinear sample of a ramp is the place of the sample, unless it lies beyond the edge.
    """
    _, h, w, _ = SHAPE
    ramps = (np.moveaxis(np.indices((h, w)), 0, -1) + 0.5) / np.array([h, w])
    x = np.broadcast_to(np.stack([ramps[..., 0], ramps[..., 1], ramps[..., 0]], -1), SHAPE)
    found = only(x.astype(np.float32), **settings)[..., :2].astype(np.float64)
    edge = 0.5 / np.array([h, w])
    inside = np.all((found > edge + 1e-5) & (found < 1 - edge - 1e-5), axis=-1)
    return ramps, found, inside


def test_perspective_is_a_homography_that_moves_corners_so_far():
    ramps, found, inside = positions(perspective=0.1)
    corners = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    moves = []
    for place, is_inside in zip(found, inside, strict=True):
        # The null vector of the equations u (p . m3) = p . m1 and v (p . m3) = p . m2.
        p = np.concatenate([ramps, np.ones((*ramps.shape[:2], 1))], -1)[is_inside]
        u, v = place[is_inside].T[..., None]
        zero = np.zeros_like(p)
        system = np.concatenate([np.c_[p, zero, -u * p], np.c_[zero, p, -v * p]])
        matrix = np.linalg.svd(system)[2][-1].reshape(3, 3)
        image = p @ matrix.T
        # 1e-5: what float32 leaves of positions of size ten in a unit square, and of their solve.
        np.testing.assert_allclose(image[:, :2] / image[:, 2:], place[is_inside], atol=1e-5)
        moved = corners @ matrix.T
        moves.append(moved[:, :2] / moved[:, 2:] - corners[:, :2])
    assert 0.05 < np.max(np.abs(moves)) <= 0.1 + 1e-3  # extrapolated by half a pixel
    assert len({tuple(np.round(move.ravel(), 6)) for move in moves}) == len(moves)


def test_a_crop_is_a_part_of_the_image_enlarged():
    ramps, found, inside = positions(crop=0.5)
    assert found.min() > 0 and found.max() < 1
    for place, is_inside in zip(found, inside, strict=True):
        for axis in range(2):
            size, origin = np.polyfit(ramps[is_inside, axis], place[is_inside, axis], 1)
            assert 0.5 - 1e-5 <= size <= 1 and origin >= -1e-5 and origin + size <= 1 + 1e-5
            line = size * ramps[is_inside, axis] + origin
            np.testing.assert_allclose(place[is_inside, axis], line, rtol=0, atol=1e-5)


def test_noise_has_its_deviation():
    x = np.full((64, 12, 10, 3), 0.5, np.float32)
    noise = only(x, noise=0.05) - x
    # 23,040 values: the deviation is known to 0.5 %, so 3 % is six of that.
    np.testing.assert_allclose(noise.std(), 0.05, rtol=0.03)
    assert abs(noise.mean()) < 6 * 0.05 / noise.size**0.5


@pytest.mark.parametrize("num_channels", [1, 3])
def test_compression_is_that_of_a_jpeg_library(num_channels):
    """Pillow at quality 50, where the tables are exactly the standard's, no subsampling."""
    rng = np.random.default_rng(0)
    smooth = rng.random((4, 4, num_channels)).repeat(4, 0).repeat(4, 1)
    x = np.uint8(255 * np.clip(0.8 * smooth + 0.2 * rng.random((16, 16, num_channels)), 0, 1))
    file = io.BytesIO()
    picture = Image.fromarray(x[..., 0] if num_channels == 1 else x)
    picture.save(file, "JPEG", quality=50, subsampling=0)
    expected = np.asarray(Image.open(file), np.float32).reshape(x.shape)
    ours = 255 * only(np.float32(x)[None] / 255, compression=1.0)[0]
    # The library rounds the planes and the result to whole numbers, so a coefficient that is near
    # the middle between two multiples may go the other way; most values agree to the rounding.
    difference = np.abs(ours - expected)
    assert np.mean(difference) < 1.5 < 5 < np.mean(np.abs(expected - x))


def test_high_quality_changes_little():
    x = inner_images(shape=(4, 12, 10, 1))
    change = np.abs(only(x, compression=0.02) - x).max()
    # A coefficient errs by half its step, and a pixel by at most their Euclidean norm.
    from advjax.attacks.physical import _LUMINANCE

    assert 0 < change <= 0.02 * np.linalg.norm(_LUMINANCE) / 2 / 255


# ----------------------------------------------------------------------------------- gradients


def test_compression_passes_the_gradient_straight_through():
    x, weights = inner_images(), np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    gradient = pulled_back(x, weights, **NOTHING | {"compression": 0.3})
    np.testing.assert_array_equal(gradient, weights)


def test_derivative_equals_the_difference():
    """Without saturation and rounding a photograph is affine in the image."""
    x, direction = inner_images(), inner_images(1) - 0.5

    def channel(x):
        return photograph(KEY, x, compression=0.0, brightness=0.05)

    photo, derivative = jax.jvp(channel, (x,), (direction,))
    difference = channel(x + direction) - photo
    assert float(jnp.min(photo)) > 0 and float(jnp.max(photo)) < 1  # nothing saturates
    np.testing.assert_allclose(derivative, difference, rtol=0, atol=1e-6)  # differences of halves


def test_gradients_are_finite_and_not_zero():
    x = helpers.images(3, SHAPE[0], SHAPE[1:])
    defaults = {name: value.default for name, value in _settings.items()}
    gradient = np.asarray(pulled_back(x, np.ones_like(x), **defaults))
    assert np.all(np.isfinite(gradient))
    assert np.all(np.abs(gradient).sum((1, 2, 3)) > 0)


# ------------------------------------------------------------------------------ keys and traces


def test_a_photograph_does_not_depend_on_the_others():
    x = helpers.images(4, SHAPE[0], SHAPE[1:])
    together = np.asarray(shoot(KEY, x))
    keys = random.example_keys(KEY, len(x))
    helpers.assert_same_bits(shoot(keys, x), together)
    x_other = x.copy()
    x_other[3] = np.nan  # passes the checks under jit
    others = np.arange(len(x)) != 3
    helpers.assert_same_bits(np.asarray(shoot(KEY, x_other))[others], together[others])
    for i in (0, 5):
        alone = shoot(keys[i : i + 1], x[i : i + 1])[0]
        # 1e-6: products of another shape may add in another order. Compression could round the
        # other way, by far more; it does not here.
        np.testing.assert_allclose(alone, together[i], rtol=0, atol=1e-6)
    assert not np.array_equal(shoot(jax.random.key(1), x), together)
    same = np.asarray(shoot(KEY, np.repeat(x[:1], len(x), axis=0)))
    assert len({photo.tobytes() for photo in same}) == len(x)


def test_one_trace_for_all_settings():
    x = inner_images(shape=(2, 8, 8, 1))

    def photographed_once(strength):
        return photograph(KEY, x, blur=0.1, compression=0, strength=strength)

    once = jax.jit(chex.assert_max_traces(photographed_once, n=1))
    strengths = np.float32([0, 0.5, 1])
    alone = np.stack([once(strength) for strength in strengths])
    assert len({photo.tobytes() for photo in alone}) == 3
    together = jax.jit(jax.vmap(photographed_once))(strengths)
    # 1e-6: one program for three strengths adds up in another order.
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


def test_it_is_traced_for_several_devices():
    """What varies over the devices is checked when it is traced; no program is compiled."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    mesh = parallel.make_mesh(devices=jax.devices()[:2])
    data = PartitionSpec(mesh.axis_names[0])
    run = jax.shard_map(
        lambda *args: attacks.photo(*args, num_steps=2),
        mesh=mesh, in_specs=(data, PartitionSpec(), data, data, data), out_specs=data,
    )  # fmt: skip
    assert jax.eval_shape(run, KEYS, NETWORK, X, Y, EPSILONS).shape == X.shape


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(x=np.zeros((2, 8, 8, 1), np.uint8)), "photograph: need float images"),
        (dict(x=np.full((2, 8, 8, 1), 2.0)), "photograph: need images in \\[0, 1\\]"),
        (dict(x=np.zeros((2, 64), np.float32)), "shape \\[b, h, w, c\\], got \\(2, 64\\)"),
        (dict(blur=-1.0), "need a finite blur >= 0, got blur=-1.0"),
        (dict(strength=float("nan")), "finite strength >= 0"),
        (dict(perspective=0.25), "strength \\* perspective < 0.25, got 0.25"),
        (dict(crop=0.6, strength=2), "strength \\* crop < 1.0, got 1.2"),
        (dict(key=jax.random.split(KEY, 3)), "one key an example \\(2\\), got shape \\(3,\\)"),
    ],
)
def test_bad_settings_are_one_sentence(change, sentence):
    given = dict(key=KEY, x=np.zeros((2, 8, 8, 1), np.float32)) | change
    with pytest.raises(ValueError, match=sentence) as caught:
        photograph(given.pop("key"), given.pop("x"), **given)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------- the attack through it

NETWORK = helpers.mlp_network(0)
X = helpers.images(0, 8)
Y = np.asarray(metrics.predictions(NETWORK(X)))
KEYS = random.example_keys(KEY, 8)
EPSILONS = np.float32([0, 1e-6, 0.03, 0.1, 0.2, 0.3, 0.5, 1e6])
attack = jax.jit(
    functools.partial(attacks.photo, num_steps=4, num_samples=3, num_held=5),
    static_argnames=("ball",),
)


@pytest.mark.parametrize("ball", [balls.linf, balls.l2])
def test_in_the_ball_and_the_box_through_a_channel_that_changes_something(ball):
    x_adv = attack(KEYS, NETWORK, X, Y, EPSILONS, ball=ball)
    helpers.assert_in_ball_and_box(x_adv, X, ball.name, EPSILONS)
    helpers.assert_same_bits(x_adv[0], X[0])  # its epsilon is 0
    assert np.any(np.asarray(x_adv)[3:] != X[3:])


@pytest.mark.study
def test_keys_decide_and_batches_do_not():
    usual = np.asarray(attack(KEYS, NETWORK, X, Y, EPSILONS))
    helpers.assert_same_bits(attack(KEY, NETWORK, X, Y, EPSILONS), usual)
    other = attack(jax.random.key(1), NETWORK, X, Y, EPSILONS)
    assert not np.array_equal(other, usual)
    half = attack(KEYS[4:], NETWORK, X[4:], Y[4:], EPSILONS[4:])
    # 1e-6: as in the contract table; a flipped sign would move a pixel by a twentieth of epsilon.
    np.testing.assert_allclose(half, usual[4:], rtol=0, atol=1e-6)
    assert traits.of(attacks.photo).example_keys


def blind_to_the_first(keys, x):
    """Nothing of the first pixel reaches the classifier, only chance."""
    chance = jax.vmap(lambda key: jax.random.uniform(key, x.shape[2:]))(keys)
    return x.at[:, 0].set(chance)


def test_it_spends_nothing_on_what_does_not_reach_the_classifier():
    """Two pixels, and the larger weight on the one that the channel hides."""
    weights = jnp.float32([[4, -4], [1, -1]])
    logits_fn = lambda x: helpers.linear((weights, jnp.float32([-2.4, 2.4])), x)
    x, y = np.full((3, 2, 1, 1), 0.5, np.float32), np.zeros(3, np.int32)
    options = dict(ball=balls.l2, num_steps=5)
    seen = dict(channel=blind_to_the_first, num_samples=2, num_held=2)
    x_adv = jax.jit(lambda x: attacks.photo(KEY, logits_fn, x, y, 0.2, **seen, **options))(x)
    # 1e-6: the projection stays inside by a few roundings.
    np.testing.assert_allclose(x_adv.reshape(3, 2), [[0.5, 0.3]] * 3, rtol=0, atol=1e-6)
    plain = attacks.bim(KEY, logits_fn, x, y, 0.2, **options)
    assert np.all(np.asarray(plain).reshape(3, 2)[:, 0] < 0.35)


def test_success_is_on_more_than_half_and_never_on_nan():
    right, wrong, none = [1.0, 0.0], [0.0, 1.0], [jnp.nan, 1.0]
    goal = _on_average(losses.margin, jnp.zeros(4, jnp.int32), 4, targeted=False)
    photos = [
        [wrong, wrong, wrong, right],
        [wrong, wrong, right, right],
        [none, none, none, none],
        [none, wrong, wrong, wrong],
    ]
    logits = jnp.array(photos).reshape(16, 2)
    assert goal.success(logits).tolist() == [True, False, False, True]
    np.testing.assert_array_equal(goal.loss(logits)[:2], [0.5, 0.0])


def test_an_image_without_an_answer_is_never_chosen():
    def logits_fn(x):
        light = jnp.mean(x, axis=(1, 2, 3))[:, None]
        return jnp.where(light < 0.45, jnp.nan, jnp.concatenate([light, -light], axis=1))

    x, y = np.full((2, 4, 4, 1), 0.5, np.float32), np.zeros(2, np.int32)
    options = dict(channel=lambda keys, x: x, num_steps=20)
    x_adv = jax.jit(lambda x: attacks.photo(KEY, logits_fn, x, y, 0.2, **options))(x)
    assert np.all(np.isfinite(logits_fn(x_adv)))
    assert np.all(np.asarray(x_adv) < 0.48)  # it went as far as there are answers
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, NETWORK)
    helpers.assert_same_bits(attack(KEYS, broken, X, Y, EPSILONS), X)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(num_samples=0), "photo: need num_samples >= 1, got num_samples=0"),
        (dict(num_held=0), "need num_held >= 1"),
        (dict(num_steps=0), "need num_steps >= 1"),
        (dict(step_size=-1.0), "finite step_size >= 0"),
        (dict(relative_step_size=-1.0), "finite relative_step_size >= 0"),
    ],
)
def test_bad_options_are_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        attacks.photo(KEY, NETWORK, X, Y, 0.1, **change)
    assert "\n" not in str(caught.value)
