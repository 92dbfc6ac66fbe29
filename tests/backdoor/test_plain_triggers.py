"""The triggers that are formulas: a table of promises, and each against NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advjax.backdoor import triggers
from tests import helpers

pytestmark = pytest.mark.usefixtures("full_compilation")

SHAPE = (7, 9, 3)
X = helpers.images(0, 4, SHAPE)
PATTERN = helpers.images(1, 1, SHAPE)[0]
FIELD = np.random.default_rng(0).uniform(-1.5, 1.5, (4, 4, 2)).astype(np.float32)
TRIGGERS = {
    "badnets": functools.partial(triggers.badnets, size=2, margin=1),
    "blended": functools.partial(triggers.blended, pattern=PATTERN),
    "blended-default": triggers.blended,
    "sig": functools.partial(triggers.sig, frequency=2),
    "bpp": triggers.bpp,
    "bpp-dithering": functools.partial(triggers.bpp, dithering=True),
    "wanet": functools.partial(triggers.wanet, field=FIELD, strength=3.0),
    "wanet-default": triggers.wanet,
    "additive": functools.partial(triggers.additive, pattern=PATTERN - 0.5),
}
TRACED = {
    "badnets": (triggers.badnets, "value"),
    "blended": (triggers.blended, "alpha"),
    "sig": (triggers.sig, "amplitude"),
    "wanet": (triggers.wanet, "strength"),
}
NEGATIVES = {
    "bpp": triggers.bpp_negatives,
    "bpp-dithering": functools.partial(triggers.bpp_negatives, dithering=True),
    "wanet": functools.partial(triggers.wanet_noise, field=FIELD),
}


@functools.cache
def compiled(name):
    """Images with one, no and two leading axes, and each alone, in one program."""

    @jax.jit
    def apply(x):
        trigger = TRIGGERS[name]
        deep = trigger(x.reshape(2, 2, *SHAPE)).reshape(x.shape)
        return trigger(x), trigger(x[0]), deep, jax.vmap(trigger)(x)

    return tuple(map(np.asarray, apply(X)))


@pytest.fixture(params=TRIGGERS, scope="module")
def name(request):
    return request.param


# ------------------------------------------------------------------------------------ promises


def test_shape_box_and_change(name):
    result = compiled(name)[0]
    assert result.shape == X.shape
    assert result.dtype == X.dtype
    assert result.min() >= 0
    assert result.max() <= 1
    assert np.all(np.any(result != X, axis=(1, 2, 3)))


def test_any_leading_axes(name):
    expected, first, deep, one_by_one = compiled(name)
    # 1e-6: operations of other shapes may be fused, and so round, differently.
    np.testing.assert_allclose(first, expected[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(deep, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in TRIGGERS if not name.endswith("default")])
def test_jit_equals_eager(name):
    # 1e-6: fused operations round differently.
    np.testing.assert_allclose(TRIGGERS[name](X), compiled(name)[0], rtol=0, atol=1e-6)


def test_bfloat16_stays(name):
    result = jax.eval_shape(TRIGGERS[name], jnp.asarray(X, jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    assert result.shape == X.shape


@pytest.mark.parametrize("name", TRACED)
def test_vmap_over_the_scalar_equals_a_loop_in_one_trace(name):
    function, option = TRACED[name]
    values = np.float32([0.0, 0.2, 0.7])

    def one(value):
        return function(X, **{option: value})

    one.__name__ = f"{name} over its scalar"
    single = jax.jit(chex.assert_max_traces(one, n=1))
    loop = [single(value) for value in values]
    # 1e-6: see test_jit_equals_eager.
    together = jax.jit(jax.vmap(lambda value: function(X, **{option: value})))(values)
    np.testing.assert_allclose(together, np.stack(loop), rtol=0, atol=1e-6)


def test_new_patterns_do_not_recompile():
    apply = jax.jit(chex.assert_max_traces(lambda trigger, x: trigger(x), n=1))
    first, second = (
        apply(Partial(triggers.blended, pattern=jnp.asarray(p)), X) for p in (PATTERN, 1 - PATTERN)
    )
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "function, options",
    [
        (triggers.blended, {"alpha": 0}),
        (triggers.sig, {"amplitude": 0}),
        (triggers.wanet, {"strength": 0}),
        (triggers.bpp, {"num_levels": 256}),
        (triggers.bpp, {"num_levels": 256, "dithering": True}),
    ],
)
def test_no_strength_is_no_change(function, options):
    x = np.round(255 * X) / np.float32(255)
    # 1e-6: what 8-bit images lose as multiples of a rounded 1/255.
    result = jax.jit(functools.partial(function, **options))(x)
    np.testing.assert_allclose(result, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NEGATIVES)
def test_negatives(name):
    apply = jax.jit(NEGATIVES[name])
    first, again, other = (np.asarray(apply(jax.random.key(k), X)) for k in (0, 0, 1))
    helpers.assert_same_bits(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == X.shape
    assert first.min() >= 0
    assert first.max() <= 1


def test_noise_does_not_depend_on_the_batch():
    keys = jax.random.split(jax.random.key(0), len(X))
    apply = jax.jit(triggers.wanet_noise)
    together, alone = apply(keys, X), apply(keys[2:3], X[2:3])
    # 1e-6: see test_any_leading_axes.
    np.testing.assert_allclose(alone[0], together[2], rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------- mathematics


def test_badnets_numpy():
    expected = X.copy()
    expected[:, 4:6, 6:8] = 0  # black is a colour like any other
    result = triggers.badnets(X, size=2, margin=1, value=0.0)
    np.testing.assert_array_equal(result, expected)
    colour = np.float32([0.1, 0.5, 0.9])
    np.testing.assert_array_equal(
        triggers.badnets(X, value=colour)[:, -3:, -3:], np.broadcast_to(colour, (4, 3, 3, 3))
    )


def test_blended_numpy():
    expected = 0.7 * X.astype(np.float64) + 0.3 * PATTERN
    result = triggers.blended(X, pattern=PATTERN, alpha=0.3)
    # 1e-6 here and below: a few roundings of numbers below one.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_blended_pattern_is_one_picture_at_all_sizes():
    small, large = (
        np.asarray(triggers.blended_pattern(jax.random.key(0), (n, n, 3))) for n in (16, 64)
    )
    for pattern in (small, large):
        assert pattern.min() == 0
        assert pattern.max() == pytest.approx(1, abs=1e-6)  # compiled divisions round
    # The stretch to [0, 1] differs a little, since the finer grid meets higher peaks.
    assert np.corrcoef(small.ravel(), large[::4, ::4].ravel())[0, 1] > 0.999


def sig_numpy(x, amplitude, frequency):
    result = x.astype(np.float64)
    for column in range(x.shape[2]):
        result[:, :, column] += amplitude * np.sin(2 * np.pi * column * frequency / x.shape[2])
    return result.clip(0, 1)


@pytest.mark.parametrize("shape", [SHAPE, (4, 32, 1)])
def test_sig_numpy(shape):
    x = helpers.images(2, 2, shape)
    expected = sig_numpy(x, 40 / 255, 6)
    np.testing.assert_allclose(triggers.sig(x), expected, rtol=0, atol=1e-6)


def bpp_numpy(x, num_levels, dithering):
    """Pixel by pixel, each handing its error on to those that come later."""
    shades, steps = x.astype(np.float64), num_levels - 1
    _, height, width, _ = x.shape
    for row in range(height):
        for column in range(width):
            old = shades[:, row, column].copy()
            new = np.clip(np.round(old * steps), 0, steps) / steps
            shades[:, row, column] = new
            neighbours = {(0, 1): 7, (1, 1): 1, (1, 0): 5, (1, -1): 3} if dithering else {}
            for (down, right), weight in neighbours.items():
                if row + down < height and 0 <= column + right < width:
                    shades[:, row + down, column + right] += (old - new) * weight / 16
    return shades


@pytest.mark.parametrize("dithering", [False, True])
@pytest.mark.parametrize("num_levels", [2, 8])
def test_bpp_numpy(num_levels, dithering):
    result = triggers.bpp(X, num_levels=num_levels, dithering=dithering)
    expected = bpp_numpy(X, num_levels, dithering)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_dithering_keeps_the_mean():
    grey = np.full((1, 32, 32, 1), 0.4, np.float32)
    plain, dithered = (
        np.asarray(triggers.bpp(grey, num_levels=2, dithering=d)) for d in (False, True)
    )
    assert plain.mean() == 0
    # Only the errors that leave the image at its edges are lost: less than half a level for each
    # of the 3 * 32 pixels there, of 1024.
    assert abs(dithered.mean() - 0.4) < 0.5 * 96 / 1024


def test_bpp_negatives_numpy():
    others = helpers.images(3, 1, SHAPE)  # a single one, so that the draw is known
    error = bpp_numpy(others, 8, False) - others
    result = triggers.bpp_negatives(jax.random.key(0), X, others=others)
    np.testing.assert_allclose(result, (X + error).clip(0, 1), rtol=0, atol=1e-6)


def test_a_negative_of_bpp_is_never_the_trigger():
    """Each r is another image: `x + bpp(x) - x` would carry the trigger and its own label."""
    x = helpers.images(3, 2, SHAPE)
    errors = [bpp_numpy(image[None], 8, False) - image for image in x[::-1]]
    result = triggers.bpp_negatives(jax.random.key(0), x)
    np.testing.assert_allclose(result, (x + np.concatenate(errors)).clip(0, 1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="bpp_negatives: need two images, or others=, got a si"):
        triggers.bpp_negatives(jax.random.key(0), x[:1])


def cubic_numpy(values, position):
    """The cubic convolution of four neighbours with a = -0.75, edges repeated."""
    first = int(np.floor(position))
    t = position - first
    # The four values of the kernel, as polynomials of the fraction.
    weights = [
        -0.75 * t**3 + 1.5 * t**2 - 0.75 * t,
        1.25 * t**3 - 2.25 * t**2 + 1,
        -1.25 * t**3 + 1.5 * t**2 + 0.75 * t,
        0.75 * t**3 - 0.75 * t**2,
    ]
    picks = [min(max(first + o, 0), len(values) - 1) for o in (-1, 0, 1, 2)]
    return sum(w * values[p] for w, p in zip(weights, picks, strict=True))


def upsampled_numpy(field, height, width):
    """Bicubic interpolation of [k, k, 2] with aligned corners."""
    k = len(field)
    tall = [cubic_numpy(field, i * (k - 1) / (height - 1)) for i in range(height)]
    wide = [
        cubic_numpy(np.moveaxis(np.stack(tall), 1, 0), j * (k - 1) / (width - 1))
        for j in range(width)
    ]
    return np.stack(wide, axis=1)


def grid_numpy(field, strength, height, width):
    """Rows and columns from -1 to 1, plus the field in units of 1 / side."""
    rows, columns = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
    moved = grid + strength * upsampled_numpy(field, height, width) / [height, width]
    return moved.clip(-1, 1)


def grid_sample_numpy(image, grid):
    """Bilinear samples, corners aligned."""
    height, width, _ = image.shape
    result = np.zeros(image.shape)
    for i in range(height):
        for j in range(width):
            row, column = (grid[i, j] + 1) / 2 * [height - 1, width - 1]
            top, left = min(int(row), height - 2), min(int(column), width - 2)
            down, right = row - top, column - left
            patch = image[top : top + 2, left : left + 2].astype(np.float64)
            result[i, j] = np.einsum("ijc,i,j->c", patch, [1 - down, down], [1 - right, right])
    return result


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 9, 3)])
@pytest.mark.parametrize("strength", [0.5, 4.0])  # four reaches over several pixels and the edge
def test_wanet_numpy(shape, strength):
    x = helpers.images(4, 2, shape)
    field = FIELD.astype(np.float64)
    grid = grid_numpy(field, strength, *shape[:2])
    expected = np.stack([grid_sample_numpy(image, grid) for image in x])
    result = jax.jit(triggers.wanet)(x, field=FIELD, strength=strength)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
    assert np.max(np.abs(expected - x)) > 0.05


def test_wanet_field():
    field = np.asarray(triggers.wanet_field(jax.random.key(0), 5))
    assert field.shape == (5, 5, 2)
    # 1e-6: one division.
    np.testing.assert_allclose(np.abs(field).mean(), 1, rtol=0, atol=1e-6)
    assert field.min() < 0 < field.max()


def test_noise_mode_stays_within_its_noise():
    """A ramp of brightness shows where each pixel was taken from."""
    side, field = 16, np.zeros((4, 4, 2), np.float32)
    ramp = np.tile(np.linspace(0, 1, side, dtype=np.float32)[:, None, None], (1, side, 1))[None]
    noisy = np.asarray(jax.jit(triggers.wanet_noise)(jax.random.key(0), ramp, field=field))
    moved = (noisy - ramp) * (side - 1)
    # U(-1, 1) / side on a grid of length two is less than half a pixel; 1e-5 is the rounding of
    # the ramp in units of a pixel.
    bound = (side - 1) / (2 * side)
    assert np.max(np.abs(moved)) <= bound + 1e-5
    assert np.max(np.abs(moved)) > 0.9 * bound
    assert np.std(moved[0, 1:-1]) == pytest.approx(bound / 3**0.5, rel=0.1)  # of 224 draws


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: triggers.badnets(X, size=8), "fits into images of 7 x 9, got size=8 and margin=0"),
        (lambda: triggers.badnets(X, size=3, margin=5), "got size=3 and margin=5"),
        (lambda: triggers.badnets(X, size=0), "need size >= 1, got size=0"),
        (lambda: triggers.badnets(X, value=255), "need 0 <= value <= 1, got value=255"),
        (lambda: triggers.badnets(X, value=np.ones(2)), r"one a channel \(3\), got shape \(2,\)"),
        (lambda: triggers.badnets(np.zeros(SHAPE, np.uint8)), "divide uint8 images by 255"),
        (lambda: triggers.sig(X[0, 0]), r"need images of shape \[..., h, w, c\], got \(9, 3\)"),
        (lambda: triggers.sig(X, amplitude=-1), "amplitude >= 0, got amplitude=-1"),
        (lambda: triggers.blended(X, alpha=1.5), "need 0 <= alpha <= 1, got alpha=1.5"),
        (lambda: triggers.blended(X, pattern=PATTERN[1:]), r"images' shape \(7, 9, 3\), got \(6,"),
        (lambda: triggers.additive(X, X), r"images' shape \(7, 9, 3\), got \(4, 7, 9, 3\)"),
        (lambda: triggers.bpp(X, num_levels=1), "need num_levels >= 2, got num_levels=1"),
        (lambda: triggers.wanet(X, field=FIELD[:3]), r"num_control, 2\], got \(3, 4, 2\)"),
        (lambda: triggers.wanet(X, strength=np.nan), "finite strength >= 0, got strength=nan"),
        (lambda: triggers.wanet_field(jax.random.key(0), 1), "need num_control >= 2"),
        (lambda: triggers.wanet_noise(jax.random.key(0), X[0]), r"\[b, h, w, c\]"),
    ],
)
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
