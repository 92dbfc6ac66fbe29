"""What several test files share: a tiny network, tiny images, and norms computed in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advjax import attacks

NUM_CLASSES = 4
SHAPE = (4, 4, 1)


def mlp(params, x):
    """Two layers by hand; what the images' dtype is, the weights stay float32."""
    x = x.reshape(x.shape[0], params["w1"].shape[0])
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def mlp_params(seed, *, num_classes=NUM_CLASSES, hidden=8, shape=SHAPE):
    """Weights as NumPy arrays, so that a NumPy implementation can use the same."""
    rng = np.random.default_rng(seed)
    num_pixels = int(np.prod(shape))
    w1 = 4 * rng.normal(size=(num_pixels, hidden)) / num_pixels**0.5
    params = {
        "w1": w1,
        "b1": -0.3 * w1.sum(0),  # 0.3: the mean of `images`, so that every unit is on for some
        "w2": 2 * rng.normal(size=(hidden, num_classes)) / hidden**0.5,
        "b2": rng.normal(size=num_classes) / 4,
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def mlp_network(seed, **options):
    return Partial(mlp, jax.tree.map(jnp.asarray, mlp_params(seed, **options)))


def linear(params, x):
    weights, bias = params
    return x.reshape(x.shape[0], -1) @ weights + bias


def fixed_budget_attacks():
    """Names of the attacks `(key, logits_fn, x, y, epsilon, ...) -> x_adv`."""
    several = {"cascade", "transfer", "universal"}  # of attacks, of models, of images
    return [
        name
        for name in attacks.__all__
        if inspect.isfunction(getattr(attacks, name))
        and "epsilon" in inspect.signature(getattr(attacks, name)).parameters
        and name not in several
    ]


def images(seed, num_images, shape=SHAPE):
    """Images with many pixels near zero, where sums round worst, and some at the box's ends."""
    rng = np.random.default_rng(seed)
    x = rng.random((num_images, *shape)) ** 3
    kind = rng.random(x.shape)
    return np.where(kind < 0.1, 0, np.where(kind > 0.9, 1, x)).astype(np.float32)


def norms(name, delta):
    """The norm of each perturbation; delta float64[b, ...]."""
    assert delta.dtype == np.float64
    delta = np.abs(delta.reshape(len(delta), -1))
    return {"linf": delta.max(1), "l2": np.sqrt((delta**2).sum(1)), "l1": delta.sum(1)}[name]


def assert_in_ball_and_box(x_adv, x, name, epsilon):
    """No tolerance: float32 and shorter numbers and their differences are exact in float64."""
    x_adv, x = np.asarray(x_adv), np.asarray(x)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    x_adv, x, epsilon = (np.asarray(a).astype(np.float64) for a in (x_adv, x, epsilon))
    assert np.all(np.isfinite(x_adv))
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    excess = norms(name, x_adv - x) - epsilon
    assert excess.max() <= 0, f"outside the {name} ball by {excess.max()}"


def assert_same_bits(actual, desired):
    """Equal bit for bit: NaN equals NaN, and 0 differs from -0."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.dtype == desired.dtype
    np.testing.assert_array_equal(actual, desired)
    assert actual.tobytes() == desired.tobytes()
