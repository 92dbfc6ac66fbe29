"""Universal perturbations: the ball, the known direction of a linear network, held-out images."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import balls, evaluation, metrics
from advjax.attacks import universal
from tests import helpers

X = helpers.images(0, 24)
NETWORK = helpers.mlp_network(0)
Y = np.asarray(metrics.predictions(NETWORK(X)))
KEY = jax.random.key(0)
METHODS = ("sgd", "deepfool")
OPTIONS = dict(num_epochs=2, batch_size=10, num_steps=3, num_candidates=helpers.NUM_CLASSES)


@functools.cache
def compiled(method, ball=balls.linf):
    attack = functools.partial(universal, method=method, ball=ball, **OPTIONS)

    def traced_once(*args):
        return attack(*args[:-1], target_rate=args[-1])

    traced_once.__name__ = f"universal {method} {ball}"
    program = jax.jit(chex.assert_max_traces(traced_once, n=1))
    usual = {"sgd": 1.0, "deepfool": 0.8}[method]

    def run(key, logits_fn, x, y, epsilon, target_rate=usual):
        return program(key, logits_fn, x, y, jnp.float32(epsilon), jnp.float32(target_rate))

    return run


def norm(ball, delta):
    return helpers.norms(ball.name, np.asarray(delta)[None].astype(np.float64))[0]


@pytest.mark.parametrize(
    "method, ball",
    [*((method, ball) for method in METHODS for ball in (balls.linf, balls.l2)), ("sgd", balls.l1)],
    ids=str,
)
def test_stays_in_the_ball_without_a_tolerance(method, ball):
    norms = []
    for epsilon in np.float32([0, 1e-6, 0.1, 0.3, 1, 1e6]):
        delta = compiled(method, ball)(KEY, NETWORK, X, Y, epsilon)
        assert delta.shape == X.shape[1:] and delta.dtype == jnp.float32
        assert np.all(np.isfinite(delta))
        norms.append(norm(ball, delta))
        assert norms[-1] <= epsilon
    assert norms[-2] > 0.1  # there is something to project


@pytest.mark.parametrize("method", METHODS)
def test_epsilon_zero_gives_nothing(method):
    helpers.assert_same_bits(compiled(method)(KEY, NETWORK, X, Y, 0.0), np.zeros_like(X[0]))


@pytest.mark.parametrize("method", METHODS)
def test_fools_images_that_it_has_not_seen(method):
    """More of them than the negative of the perturbation, which is as large, or a quarter."""
    delta = compiled(method)(KEY, NETWORK, X, Y, 0.5)
    held_out = helpers.images(1, 200)
    rates = [evaluation.fooling_rate(NETWORK, held_out, sign * delta) for sign in (1, -1)]
    assert rates[0] > max(rates[1], 0.25)
    assert evaluation.fooling_rate(NETWORK, X, delta) > 0.25


@pytest.mark.parametrize("method", METHODS)
def test_the_key_decides(method):
    delta = compiled(method)(KEY, NETWORK, X, Y, 0.2)
    helpers.assert_same_bits(compiled(method)(KEY, NETWORK, X, Y, 0.2), delta)
    other = compiled(method)(jax.random.key(1), NETWORK, X, Y, 0.2)
    assert not np.array_equal(other, delta)


@pytest.mark.parametrize("method", METHODS)
def test_jit_equals_eager_and_the_default_target_is_as_documented(method):
    eager = universal(KEY, NETWORK, X, Y, 0.2, method=method, **OPTIONS)
    # 1e-5: fused operations round differently, and DeepFool divides by squared norms.
    np.testing.assert_allclose(eager, compiled(method)(KEY, NETWORK, X, Y, 0.2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_epsilons_and_models_equals_a_loop(method):
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), NETWORK, helpers.mlp_network(1))
    epsilons = jnp.array([0.0, 0.3])
    attack = functools.partial(universal, method=method, **OPTIONS)
    curve = lambda f: jax.vmap(lambda epsilon: attack(KEY, f, X, Y, epsilon))(epsilons)
    together = jax.jit(jax.vmap(curve))(stack)
    for i, network in enumerate((NETWORK, helpers.mlp_network(1))):
        for j, epsilon in enumerate(epsilons):
            alone = compiled(method)(KEY, network, X, Y, epsilon)
            # 1e-5: as above.
            np.testing.assert_allclose(together[i, j], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method, ball", [("sgd", balls.linf), ("sgd", balls.l2), ("deepfool", balls.l2)], ids=str
)
def test_one_side_of_a_hyperplane_is_pushed_along_its_normal(method, ball):
    """Two classes, all images at one distance from the plane, none near the edge of the box."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=16)
    normal /= np.linalg.norm(normal)
    x = rng.uniform(0.4, 0.6, size=(12, 16))
    x -= np.outer(x @ normal - 0.02, normal)
    x = x.reshape(12, *helpers.SHAPE).astype(np.float32)
    weights = np.stack([normal, -normal], axis=1).astype(np.float32)
    logits_fn = jax.tree_util.Partial(helpers.linear, (weights, np.zeros(2, np.float32)))
    y = np.zeros(12, np.int32)
    direction = {"linf": -np.sign(normal), "l2": -normal}[ball.name]
    distance = 0.02 / (np.abs(normal).sum() if ball.name == "linf" else 1)
    attack = functools.partial(
        universal, KEY, logits_fn, x, y, ball=ball, method=method, **OPTIONS | {"num_epochs": 6}
    )
    epsilon = np.float32(1.03 * distance)
    # Slightly more than the distance fools all of them and slightly less none. 3 %: DeepFool goes
    # 2 % beyond the plane, and the steps of the SGD form end within the ball.
    delta = np.asarray(attack(epsilon)).ravel()
    size = np.abs(delta).max() if ball.name == "linf" else np.linalg.norm(delta)
    assert distance < size <= epsilon
    # 1e-3: relative; float32 logits that nearly cancel.
    np.testing.assert_allclose(delta, size * direction, rtol=0, atol=1e-3 * size)
    assert evaluation.fooling_rate(logits_fn, x, delta.reshape(helpers.SHAPE)) == 1
    assert not np.any(attack(0.97 * distance))


def test_pixels_that_the_box_holds_do_not_count():
    """A black image would have to become darker, which it cannot, and a grey one brighter."""
    x = np.float32([0, 0.6]).reshape(2, 1, 1, 1)

    def logits_fn(x):  # class 0 between -0.1 and 0.8
        inside = ((x + 0.1) * (0.8 - x))[:, 0, 0]
        return inside * jnp.array([1.0, -1.0])

    delta = universal(KEY, logits_fn, x, np.zeros(2, np.int32), 0.3)
    assert delta > 0.2
    assert evaluation.fooling_rate(logits_fn, x, delta) == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_passes_end_at_the_target_rate(method):
    """With a target of zero nothing is done; a lower target does not take more passes."""
    attack = functools.partial(compiled(method), KEY, NETWORK, X, Y, 0.5)
    assert not np.any(attack(target_rate=0.0))
    first = attack(target_rate=1e-3)
    assert evaluation.fooling_rate(NETWORK, X, first) > 0
    both = attack(target_rate=1.0)
    assert evaluation.fooling_rate(NETWORK, X, both) >= evaluation.fooling_rate(NETWORK, X, first)


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_of_nan_is_no_success_and_does_not_spread(method):
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, NETWORK)
    assert not np.any(compiled(method)(KEY, nan, X, Y, 0.5))

    def sometimes(x):  # no answer for the first kind of image, clean or not
        is_bad = x[:, 0, 0] > 0.9
        return jnp.where(is_bad, jnp.nan, NETWORK(x))

    delta = universal(KEY, sometimes, X, Y, 0.3, method=method, **OPTIONS)
    assert np.all(np.isfinite(delta)) and np.any(delta)


def test_a_network_that_stops_answering_is_not_fooled():
    only_clean = lambda x: jnp.where(
        jnp.all(jnp.isin(x, X), axis=(1, 2, 3))[:, None], NETWORK(x), jnp.nan
    )
    assert not np.any(universal(KEY, only_clean, X, Y, 0.3, **OPTIONS))


def test_the_published_form_does_not_look_at_labels():
    wrong = (Y + 1) % helpers.NUM_CLASSES
    helpers.assert_same_bits(
        compiled("deepfool")(KEY, NETWORK, X, wrong, 0.3),
        compiled("deepfool")(KEY, NETWORK, X, Y, 0.3),
    )


def test_short_floats_give_a_perturbation_in_float32():
    x = jnp.asarray(X, jnp.bfloat16)
    attack = functools.partial(universal, KEY, NETWORK, method="sgd", **OPTIONS)
    delta = jax.jit(attack)(x, Y, jnp.bfloat16(0.1))
    assert delta.dtype == jnp.float32
    assert norm(balls.linf, delta) <= float(jnp.bfloat16(0.1))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(method="fgsm"), "universal: unknown method 'fgsm'; known: sgd, deepfool"),
        (dict(epsilon=np.ones(24, "f4")), r"universal: need one epsilon .* got shape \(24,\)"),
        (dict(epsilon=-0.1), "universal: need a finite epsilon >= 0"),
        (dict(key=0), r"key: need a key such as jax.random.key\(0\), got 0"),
        (dict(num_epochs=0), "universal: need num_epochs >= 1"),
        (dict(batch_size=0), "universal: need batch_size >= 1"),
        (dict(num_steps=0), "universal: need num_steps >= 1"),
        (dict(step_size=-1.0), "universal: need a finite step_size >= 0"),
        (dict(target_rate=float("nan")), "universal: need a finite target_rate >= 0"),
        (dict(x=X[:0], y=Y[:0]), "universal: need at least one image, got none"),
        (dict(x=np.uint8(X * 255)), "universal: need float images"),
        (dict(y=Y + 4), "universal: need labels in 0 ... 3"),
        (dict(logits_fn=lambda x: x), "logits_fn: need logits of shape"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    arguments = dict(key=KEY, logits_fn=NETWORK, x=X, y=Y, epsilon=0.1) | change
    with pytest.raises(ValueError, match=sentence) as caught:
        universal(**arguments)
    assert "\n" not in str(caught.value)
