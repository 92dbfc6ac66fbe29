"""Variants of one painted pixel get the logits that the classifier gives to the painted images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import attacks, models
from advjax.attacks import patches
from advjax.core import programs

B, N = 2, 12


def painted(x, rows, columns, colours):
    images = np.repeat(x[:, None], N, axis=1)
    for b in range(B):
        for n in range(N):
            images[b, n, rows[b, n], columns[b, n]] = colours[b, n]
    return images.reshape(B * N, *x.shape[1:])


def both(logits_fn, shape, dtype=np.float32):
    """Logits by `patches.answers` and those of the painted images."""
    rng = np.random.default_rng(1)
    x = rng.random((B, *shape)).astype(dtype)
    rows = rng.integers(0, shape[0], (B, N), dtype=np.int32)
    columns = rng.integers(0, shape[1], (B, N), dtype=np.int32)
    rows[:, :4] = [0, 0, shape[0] - 1, shape[0] - 1]
    columns[:, :4] = [0, shape[1] - 1] * 2
    colours = rng.random((B, N, shape[2])).astype(dtype)
    # Not compiled: that would take most of the time.
    found = patches.answers(logits_fn, *map(jnp.asarray, (x, rows, columns, colours)))
    desired = logits_fn(jnp.asarray(painted(x, rows, columns, colours)))
    return np.asarray(found), np.asarray(desired).reshape(B, N, -1)


def bound(name, shape, **options):
    model = models.make(name, 10, **options)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)))
    # Statistics and scales other than 0 and 1.
    variables = jax.tree.map(
        lambda a: a * (1 + 0.3 * jax.random.uniform(jax.random.key(1), a.shape)), variables
    )
    return advjax.bind(model, variables)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("cnn", (28, 28, 1)),
        ("cnn", (19, 26, 3)),  # poolings that leave a rest
        ("cnn", (8, 8, 1)),
        ("mlp", (9, 9, 1)),
        ("resnet8", (16, 20, 3)),
        pytest.param("preact_resnet_nano", (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("vgg_nano", (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_nano", (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("vit_nano", (16, 16, 3), marks=pytest.mark.slow),
    ],
)
def test_the_logits_of_our_models(name, shape):
    found, desired = both(bound(name, shape), shape)
    assert np.std(desired, axis=1).max() > 1e-5  # a pixel does something
    np.testing.assert_allclose(found, desired, atol=2e-6 * np.abs(desired).max(), rtol=2e-5)


class Mixed(nn.Module):
    """Steps that our own models do not have."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (5, 4), strides=(2, 3), padding=((1, 0), (3, 2)))(x)
        x = nn.max_pool(x, (3, 2), strides=(2, 1), padding="SAME")
        left = nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(jnp.tanh(x))
        right = nn.Conv(6, (1, 1), strides=2)(nn.gelu(x))
        x = nn.avg_pool(left + 0.5 * right, (2, 2), strides=(1, 1), padding="SAME")
        x = nn.Conv(4, (3, 3), kernel_dilation=2)(x)
        return nn.ConvTranspose(5, (3, 3), strides=(2, 2))(x).mean((1, 2))


@pytest.mark.parametrize("shape", [(40, 33, 2), pytest.param((17, 21, 1), marks=pytest.mark.slow)])
def test_the_logits_of_any_convolutions(shape):
    model = Mixed()
    variables = model.init(jax.random.key(2), jnp.zeros((1, *shape)))
    found, desired = both(lambda x: model.apply(variables, x), shape)
    assert np.std(desired, axis=1).max() > 1e-4
    np.testing.assert_allclose(found, desired, atol=1e-6)


def _kernel(*shape):
    return jnp.asarray(np.random.default_rng(5).normal(size=shape).astype(np.float32))


def convolve(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


@pytest.mark.parametrize(
    "logits_fn",
    [
        pytest.param(lambda x: convolve(x, _kernel(3, 3, 1, 4))[:, 3, 4], id="slice"),
        pytest.param(
            lambda x: (lambda z: (z - z.mean(0)).reshape(len(z), -1))(
                convolve(x, _kernel(3, 3, 1, 2))
            ),
            id="batch statistics",
        ),
        pytest.param(
            lambda x: (
                convolve(x, _kernel(3, 3, 1, 2)) * jnp.arange(len(x))[:, None, None, None]
            ).sum((1, 2)),
            id="a factor an image",
        ),
        pytest.param(
            lambda x: jax.nn.relu(convolve(x, _kernel(3, 3, 1, 3)) + _kernel(*x.shape[1:3], 1)).max(
                (1, 2)
            ),
            id="a bias a place",
        ),
        pytest.param(
            lambda x: convolve(jnp.swapaxes(x, 1, 2), _kernel(3, 3, 1, 3)).mean((1, 2)),
            id="transposed",
        ),
        pytest.param(
            lambda x: jnp.where(convolve(x, _kernel(3, 3, 1, 3)) > 0.5, 1.0, x).sum((1, 2)),
            id="selection of two windows",
        ),
        pytest.param(lambda x: jnp.repeat(x, 2, 0)[::2].reshape(len(x), -1)[:, :6], id="copies"),
        pytest.param(lambda x: jnp.zeros((len(x), 3)), id="constant"),
        pytest.param(
            lambda x: jax.lax.conv_general_dilated(
                x,
                _kernel(3, 3, 1, 4),
                (1, 1),
                ((-1, 0), (2, -2)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ).mean((1, 2)),
            id="a convolution that cuts off",
        ),
        pytest.param(
            lambda x: jax.lax.map(lambda k: convolve(x, k).mean((1, 2)), _kernel(2, 3, 3, 1, 4))[1],
            id="a loop",
        ),
        pytest.param(
            lambda x: jax.checkpoint(lambda x: jnp.tanh(convolve(x, _kernel(3, 3, 1, 4))))(x).mean(
                (1, 2)
            ),
            id="checkpoint",
        ),
        pytest.param(lambda x: x, id="the images"),
        pytest.param(jax.jit(lambda x: convolve(x, _kernel(3, 3, 1, 3)).mean((1, 2))), id="jit"),
        pytest.param(
            lambda x: jax.pure_callback(
                lambda a: np.asarray(a).mean((1, 2)), jax.ShapeDtypeStruct((len(x), 1), x.dtype), x
            ),
            id="a program of the host",
        ),
    ],
)
def test_the_logits_of_odd_functions(logits_fn):
    found, desired = both(logits_fn, (12, 10, 1))
    np.testing.assert_allclose(found, desired, atol=1e-5, rtol=1e-6)


def test_bfloat16_and_weights_that_are_not_finite():
    found, desired = both(bound("cnn", (16, 16, 1)), (16, 16, 1), jnp.bfloat16)
    np.testing.assert_allclose(
        found.astype(np.float32), desired.astype(np.float32), atol=0.02, rtol=0.02
    )
    logits_fn = bound("cnn", (16, 16, 1))
    broken = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan), logits_fn)
    found, desired = both(broken, (16, 16, 1))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(desired))
    assert np.isnan(found).all()


def test_no_images_and_no_variants():
    for b, n in ((0, 5), (2, 0)):
        place = jnp.zeros((b, n), jnp.int32)
        x, colours = jnp.zeros((b, 12, 10, 1)), jnp.zeros((b, n, 1))
        logits = patches.answers(lambda x: x.mean((1, 2)), x, place, place, colours)
        assert logits.shape == (b, n, 1)


def test_a_function_is_read_anew():
    """A classifier that is trained on between two calls answers with its new weights."""

    class Classifier:
        kernel = _kernel(3, 3, 1, 4)

        def __call__(self, x):
            return jnp.tanh(convolve(x, self.kernel)).mean((1, 2))

    classifier = Classifier()
    before, _ = both(classifier, (12, 10, 1))
    classifier.kernel = -2 * classifier.kernel
    found, desired = both(classifier, (12, 10, 1))
    np.testing.assert_allclose(found, desired, atol=1e-6)
    assert np.abs(found - before).max() > 0.1


def test_reading_a_program_leaves_nothing_behind():
    """A compiled function keeps its own forms, whether it was traced before or after."""
    logits_fn = jax.jit(bound("cnn", (16, 16, 3)))
    batch = jnp.zeros((B * N, 16, 16, 3))

    def names():
        program = logits_fn.trace(batch).jaxpr.jaxpr
        return {step.primitive.name for step in programs.steps(program)}

    place = jnp.zeros((B, N), jnp.int32)
    read = jax.make_jaxpr(lambda *a: patches.answers(logits_fn, *a))
    windows = []
    for _ in range(2):
        program = read(batch[:B], place, place, jnp.zeros((B, N, 3)))
        shapes = {v.aval.shape for s in programs.steps(program.jaxpr) for v in s.outvars}
        windows.append((B * N, 2, 2, 16) in shapes)  # behind the first pooling
        assert "reduce_window_max" not in names()
    assert windows == [True, True]


def test_within_shard_map():
    kernel = _kernel(3, 3, 1, 4)

    def logits_fn(x):
        return jax.nn.relu(models.layers.max_pool(convolve(x, kernel))).mean((1, 2))

    rng = np.random.default_rng(7)
    x = rng.random((8, 12, 10, 1), dtype=np.float32)
    rows, columns = rng.integers(0, 10, (2, 8, 3), dtype=np.int32)
    colours = rng.random((8, 3, 1), dtype=np.float32)
    of_all = functools.partial(patches.answers, logits_fn)
    mesh = advjax.parallel.make_mesh()
    spec = jax.sharding.PartitionSpec(mesh.axis_names[0])
    shared = jax.shard_map(of_all, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)
    np.testing.assert_allclose(
        jax.jit(shared)(x, rows, columns, colours),
        of_all(*map(jnp.asarray, (x, rows, columns, colours))),
        atol=1e-6,
    )


def test_only_windows_are_computed():
    def shapes(program):
        for step in programs.steps(program):
            yield from (variable.aval.shape for variable in step.outvars)

    logits_fn, x = bound("cnn", (28, 28, 1)), jnp.zeros((B, 28, 28, 1))
    place = jnp.zeros((B, N), jnp.int32)
    program = jax.make_jaxpr(patches.answers)(logits_fn, x, place, place, jnp.zeros((B, N, 1)))
    computed = {shape for shape in shapes(program.jaxpr) if shape[:1] == (B * N,)}
    assert (B * N, 4, 4, 32) in computed  # what the second convolution computes of each variant
    assert (B * N, 14, 14, 32) not in computed
    assert (B, 14, 14, 32) in set(shapes(program.jaxpr))  # and of each image


def test_one_pixel_finds_the_same_either_way():
    def logits_fn(x):
        return jax.nn.relu(convolve(x, _kernel(3, 3, 3, 8))).max((1, 2))[:, :4]

    x = jnp.asarray(np.random.default_rng(3).random((3, 16, 16, 3), dtype=np.float32))
    y = jnp.argmax(logits_fn(x), axis=-1)
    attack = functools.partial(attacks.one_pixel, population=30, generations=4)
    whole = attack(jax.random.key(0), logits_fn, x, y, is_local=False)
    assert np.any(whole != x)
    x_adv = attack(jax.random.key(0), logits_fn, x, y, batch_size=7)  # local, by default
    np.testing.assert_allclose(x_adv, whole, atol=1e-6)
