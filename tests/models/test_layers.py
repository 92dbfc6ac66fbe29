"""The forms of a convolution agree, and pooling means what it says."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax.models import layers

FORMS = tuple(f for f in layers.FORMS if f != "lax")

# name: (height, width, channels, features, kernel size, strides, padding, groups)
CASES = {
    "same": (7, 6, 5, 4, 3, 1, "SAME", 1),
    "one_channel": (8, 8, 1, 6, 3, 1, 1, 1),
    "rgb_stride2": (9, 8, 3, 4, 3, 2, 1, 1),
    "same_stride2": (8, 8, 6, 4, 3, 2, "SAME", 1),
    "stride2": (8, 7, 6, 4, 3, 2, 1, 1),
    "uneven": (6, 6, 5, 4, 2, 1, ((0, 1), (1, 0)), 1),
    "valid": (5, 7, 5, 3, 2, 1, "VALID", 1),
    "point": (4, 4, 5, 3, 1, 1, 0, 1),
    "point_stride2": (5, 4, 5, 3, 1, 2, 0, 1),
    "patches": (6, 6, 3, 5, 2, 2, 0, 1),
    "depthwise": (6, 6, 4, 4, 3, 1, 1, 4),
    "depthwise_stride2": (7, 6, 4, 4, 3, 2, 1, 4),
    "multiplier": (5, 5, 3, 6, 3, 1, 1, 3),
    "groups": (5, 6, 6, 4, 3, 2, 1, 2),
}


def _reference(x, kernel, strides, pads, groups):
    """The definition, in float64 NumPy."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    kh, kw, ci, co = kernel.shape
    b, h, w, _ = x.shape
    out = np.zeros((b, (h - kh) // strides + 1, (w - kw) // strides + 1, co))
    for o in range(co):
        first = o // (co // groups) * ci
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                window = x[:, i * strides :, j * strides :, first : first + ci][:, :kh, :kw]
                out[:, i, j, o] = (window * kernel[..., o]).sum((1, 2, 3))
    return out


def _arrays(case):
    h, w, c, features, size, *_ = case
    key_x, key_k = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (3, h, w, c))
    return x, jax.random.normal(key_k, (size, size, c // case[-1], features))


@pytest.mark.parametrize("name", CASES)
def test_conv_is_the_definition(name):
    case = CASES[name]
    x, kernel = _arrays(case)
    strides, padding, groups = case[-3:]
    pads = layers._explicit_padding(padding, x.shape[1:3], kernel.shape[:2], (strides, strides))
    expected = _reference(x, kernel, strides, pads, groups)
    conv = functools.partial(layers.conv2d, strides=strides, padding=padding, groups=groups)
    forms = ("lax", *FORMS)
    # One program for all forms: compilation is most of the time.
    results = jax.jit(lambda x, k: [conv(x, k, form=form) for form in forms])(x, kernel)
    for form, y in zip(forms, results, strict=True):
        # float32 sums of at most 125 terms of size one.
        np.testing.assert_allclose(y, expected, atol=3e-5, err_msg=str(form))


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree(name):
    case = CASES[name]
    x, kernel = _arrays(case)

    def gradients(form, x, kernel):
        conv = functools.partial(
            layers.conv2d, strides=case[5], padding=case[6], groups=case[7], form=form
        )
        # A loss whose cotangent is not constant, so that misplaced pixels show.
        return jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), (0, 1))(x, kernel)

    forms = ("lax", *FORMS)
    expected, *results = jax.jit(lambda *a: [gradients(form, *a) for form in forms])(x, kernel)
    for form, result in zip(FORMS, results, strict=True):
        for ours, theirs in zip(result, expected, strict=True):
            # float32 sums of a few hundred terms of size one.
            np.testing.assert_allclose(ours, theirs, atol=2e-4, err_msg=str(form))


def test_forward_mode_and_second_derivatives():
    x, kernel = _arrays(CASES["same"])

    def results(form, x, kernel):
        def f(x, k):
            return jnp.sin(layers.conv2d(x, k, form=form)).sum()

        dots = (jnp.cos(x), jnp.sin(kernel))
        return jax.jvp(jax.value_and_grad(f, (0, 1)), (x, kernel), dots)

    forms = ("lax", "auto", "slices")
    expected, *others = jax.jit(lambda *a: [results(form, *a) for form in forms])(x, kernel)
    for form, other in zip(forms[1:], others, strict=True):
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-4, err_msg=str(form))


@pytest.mark.parametrize("name", ["one_channel", "same", "depthwise"])
def test_vmap_over_stacked_kernels_equals_a_loop(name):
    case = CASES[name]
    x, kernel = _arrays(case)
    kernels = jnp.stack([kernel, -2 * kernel, kernel + 1])

    def value_and_grad(form, kernel):
        def f(x, k):
            return jnp.sin(layers.conv2d(x, k, padding=1, groups=case[7], form=form)).sum()

        return jax.value_and_grad(f, (0, 1))(x, kernel)

    for form in ("auto", "slices"):
        one = functools.partial(value_and_grad, form)
        stacked, looped = jax.jit(lambda k, one=one: (jax.vmap(one)(k), jax.lax.map(one, k)))(
            kernels
        )
        for ours, theirs in zip(jax.tree.leaves(stacked), jax.tree.leaves(looped), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-4, err_msg=str(form))


def test_conv_has_the_parameters_of_linen():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    ours, theirs = layers.Conv(4), nn.Conv(4, (3, 3))
    variables = theirs.init(jax.random.key(1), x)
    shapes = jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x))
    assert shapes == jax.tree.map(jnp.shape, variables)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), atol=1e-5)


def test_auto_is_resolved_from_the_backend(monkeypatch):
    def forms():
        return layers._auto_forms((num_images, 16, 16, 16), (3, 3, 16, 32), (1, 1), 1)[:3]

    num_images = 64
    if jax.default_backend() == "cpu":
        assert forms() == ("lax", "swapped", "crossed")
        num_images = 512
        assert forms() == ("lax", "swapped", "images")
        grey = layers._auto_forms((64, 30, 30, 1), (3, 3, 1, 16), (1, 1), 1)
        assert grey == ("taps", "slices", "crossed", "phases")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert forms() == ("lax", "lax", "lax")


def test_conv_keeps_half_precision():
    x, kernel = _arrays(CASES["same"])
    for form in ("lax", *FORMS):
        y = jax.eval_shape(
            lambda x, k, form=form: layers.conv2d(x, k, form=form),
            x.astype(jnp.bfloat16),
            kernel.astype(jnp.bfloat16),
        )
        assert y.dtype == jnp.bfloat16


def test_conv_errors():
    x, kernel = _arrays(CASES["same"])
    with pytest.raises(ValueError, match=r"conv2d: unknown form 'fft'; known: auto, lax"):
        layers.conv2d(x, kernel, form="fft")
    with pytest.raises(ValueError, match="conv2d: need one form or three, got 2"):
        layers.conv2d(x, kernel, form=("lax", "taps"))
    with pytest.raises(ValueError, match="conv2d: need c == kernel"):
        layers.conv2d(x[..., :2], kernel)


def _reduce_window_max(x, size):
    window = (1, size, size, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 2), (7, 9, 2), (9, 7, 3)])
def test_max_pool_and_its_ties_equal_reduce_window(height, width, size):
    # Few distinct values, so that most windows have ties: the first pixel gets the gradient.
    x = jax.random.randint(jax.random.key(0), (4, height, width, 3), 0, 3).astype(jnp.float32)

    def value_and_grad(pool):
        value, vjp = jax.vjp(lambda x: pool(x, size), x)
        return value, *vjp(jnp.arange(value.size, dtype=x.dtype).reshape(value.shape))

    for ours, theirs in zip(
        jax.jit(lambda: value_and_grad(layers.max_pool))(),
        value_and_grad(_reduce_window_max),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_max_pool_forward_mode_and_vmap():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 2))
    value, tangent = jax.jvp(jax.vmap(layers.max_pool), (x,), (2 * x,))
    np.testing.assert_array_equal(tangent, 2 * value)
    np.testing.assert_array_equal(value[1], layers.max_pool(x[1]))


def test_avg_pool():
    x = jnp.arange(2 * 5 * 4.0).reshape(2, 5, 4, 1)
    np.testing.assert_allclose(layers.avg_pool(x)[0, 0, 0, 0], (0 + 1 + 4 + 5) / 4)
    assert layers.avg_pool(x).shape == (2, 2, 2, 1)


def test_normalize():
    x = jnp.ones((1, 2, 2, 3), jnp.bfloat16)
    assert layers.normalize(x, 0.0, 1.0) is x
    y = layers.normalize(x, (0.5, 0.0, 1.0), (0.5, 2.0, 1.0))
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y[0, 0, 0], jnp.array([1, 0.5, 0], jnp.bfloat16))
    with pytest.raises(ValueError, match="normalize: need one mean per channel, got 2 for 3"):
        layers.normalize(x, (0.5, 0.5), 1.0)
