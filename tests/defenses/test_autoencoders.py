"""MagNet: formulas against NumPy, budgets of false positives, training, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import advjax
from advjax import attacks, data, defenses, evaluation, losses, models
from advjax.defenses import autoencoders

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
Y = jnp.arange(6) % 10
NET = models.make("mlp", num_classes=10)
LOGITS_FN = advjax.bind(NET, NET.init(jax.random.key(2), X))
MODULE = defenses.Autoencoder()
AUTOENCODER = advjax.bind(MODULE, MODULE.init(jax.random.key(3), X))
STACK = jax.vmap(lambda key: advjax.bind(MODULE, MODULE.init(key, X)))(
    jax.random.split(jax.random.key(4), 3)
)
DETECTORS = (
    defenses.error_detector(AUTOENCODER, p=2),
    defenses.error_detector(AUTOENCODER, p=1),
    defenses.divergence_detector(LOGITS_FN, AUTOENCODER, temperature=10.0),
    defenses.divergence_detector(LOGITS_FN, AUTOENCODER, temperature=40.0),
)


def numpy_softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_scores_are_those_of_the_paper():
    x, rebuilt = np.asarray(X, np.float64), np.asarray(AUTOENCODER(X), np.float64)
    expected = [np.abs(x - rebuilt).reshape(6, -1).__pow__(p).mean(1) for p in (2, 1)]
    for temperature in (10, 40):
        p, q = (
            numpy_softmax(np.asarray(LOGITS_FN(images), np.float64) / temperature)
            for images in (X, AUTOENCODER(X))
        )
        middle = (p + q) / 2
        expected.append((p * np.log(p / middle) + q * np.log(q / middle)).sum(-1) / 2)
    scores = jax.jit(defenses.magnet_scores)(DETECTORS, X)
    chex.assert_shape(scores, (6, 4))
    # Divergences of 1e-5 are differences of numbers near 0.1, each good to 1e-7 or so.
    np.testing.assert_allclose(scores, np.stack(expected, 1), rtol=1e-4, atol=1e-7)


def test_the_divergence_of_equal_answers_is_zero_and_of_certain_ones_log_two():
    swap = Partial(lambda x: 1 - x)
    certain = lambda x: 1000 * (x[:, 0, 0] - 0.5) * jnp.array([-1.0, 1.0])
    x = jnp.array([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
    score = defenses.divergence_detector(certain, swap, temperature=1.0)
    np.testing.assert_allclose(score(x), [np.log(2), 0, np.log(2)], rtol=1e-6)
    gradient = jax.grad(lambda x: score(x).sum())(x)
    assert np.all(np.isfinite(gradient))


def test_an_autoencoder_may_be_a_plain_function_and_exact():
    same = lambda x: x
    detectors = (
        defenses.error_detector(same), defenses.divergence_detector(LOGITS_FN, same),
    )  # fmt: skip
    found = defenses.thresholds(detectors, X, 0.0)
    assert not defenses.magnet_detects(detectors, found, X).any()
    answers = jax.jit(lambda logits_fn: logits_fn(X))(defenses.magnet(LOGITS_FN, same))
    np.testing.assert_allclose(answers, LOGITS_FN(X), rtol=1e-5, atol=1e-5)  # jit reorders sums


@pytest.mark.parametrize("rate, allowed", [(0, 0), (0.004, 0), (0.01, 1), (0.29, 29), (1, 100)])
def test_a_budget_rejects_that_many_held_out_images(rate, allowed):
    x = jax.random.permutation(jax.random.key(0), jnp.linspace(0.1, 1, 100)).reshape(-1, 1, 1, 1)
    score = lambda x: x[:, 0, 0, 0]
    found = defenses.thresholds([score, score], x, rate, batch_size=32)
    assert int(defenses.magnet_detects([score], found[:1], x).sum()) == allowed
    if allowed == 0:
        assert np.all(found > x.max())


def test_equal_scores_are_not_rejected_together_beyond_the_budget():
    x = jnp.array([0.5] * 9 + [0.9]).reshape(-1, 1, 1, 1)
    score = lambda x: x[:, 0, 0, 0]
    found = defenses.thresholds([score], x, 0.3)
    assert defenses.magnet_detects([score], found, x).tolist() == [False] * 9 + [True]


def test_each_detector_may_have_its_own_budget_and_one_trace_does_for_all():
    x = jnp.linspace(0, 1, 10).reshape(-1, 1, 1, 1)
    score = Partial(lambda x: x[:, 0, 0, 0])
    find = jax.jit(chex.assert_max_traces(defenses.thresholds, n=1))
    for rates, counts in (((0.0, 0.2), (0, 2)), ((0.5, 1.0), (5, 10))):
        found = find((score, score), x, jnp.array(rates))
        assert (defenses.magnet_scores((score, score), x) >= found).sum(0).tolist() == list(counts)


def test_the_wrapper_classifies_the_reformed_image_with_gradients():
    too_bright = Partial(lambda x: 3 * x)
    wrapped = defenses.magnet(LOGITS_FN, too_bright)
    np.testing.assert_allclose(
        jax.jit(wrapped)(X), LOGITS_FN(np.clip(3 * np.asarray(X), 0, 1)), rtol=1e-5, atol=1e-5
    )
    gradient = jax.grad(lambda x: wrapped(x)[:, 0].sum())(X)
    assert np.array_equal(np.any(np.asarray(gradient) != 0, axis=(1, 2, 3)), [True] * 6)
    assert np.all(np.asarray(gradient)[np.asarray(X) > 1 / 3] == 0)  # clipped


def test_attacks_work_on_the_wrapper():
    wrapped = defenses.magnet(LOGITS_FN, AUTOENCODER)
    x_adv = jax.jit(attacks.fgsm)(jax.random.key(0), wrapped, X, Y, 0.1)
    chex.assert_equal_shape([x_adv, X])
    assert float(jnp.max(jnp.abs(x_adv - X))) <= 0.1 + 1e-6
    before, after = (losses.cross_entropy(wrapped(images), Y) for images in (X, x_adv))
    assert np.mean(after) > np.mean(before)


def test_a_random_autoencoder_for_each_image():
    wrapped = defenses.magnet(LOGITS_FN, STACK, key=jax.random.key(5))
    each = np.stack(
        [defenses.magnet(LOGITS_FN, autoencoders.member(STACK, i))(X) for i in range(3)]
    )
    answers = np.asarray(jax.jit(lambda f, x: f(x))(wrapped, X))
    # Rounding of another program; the autoencoders' logits are 1e-3 apart or more.
    distance = np.abs(each - answers).max(-1)
    assert np.all(distance.min(0) < 1e-5)
    assert len(set(distance.argmin(0).tolist())) > 1
    np.testing.assert_allclose(wrapped(X[:2]), answers[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evaluation.predict(wrapped, X), answers, rtol=1e-5, atol=1e-6)
    other = defenses.magnet(LOGITS_FN, STACK, key=jax.random.key(6))
    assert not np.allclose(evaluation.predict(other, X), answers, atol=1e-5)


def test_a_rejected_image_is_of_the_last_class():
    thresholds = jnp.median(defenses.magnet_scores(DETECTORS[:1], X), axis=0)
    rejecting = defenses.magnet_rejecting(LOGITS_FN, DETECTORS[:1], thresholds)
    logits = jax.jit(rejecting)(X)
    chex.assert_shape(logits, (6, 11))
    is_rejected = defenses.magnet_detects(DETECTORS[:1], thresholds, X)
    np.testing.assert_array_equal(logits.argmax(-1) == 10, is_rejected)
    assert 0 < int(is_rejected.sum()) < 6
    np.testing.assert_array_equal(logits[:, :10], LOGITS_FN(X))


@pytest.mark.parametrize("score, threshold", [
    (jnp.nan, 1.0), (jnp.inf, 1.0), (1.0, 1.0), (0.0, 0.0), (1 + 1e-6, 1.0), (1 - 1e-3, 1.0),
])  # fmt: skip
def test_rejected_is_what_a_detector_rejects(score, threshold):
    """Ties, no numbers, and an excess that is lost in rounding beside large logits."""
    detectors, thresholds = [lambda x: jnp.full(len(x), score)], jnp.full(1, threshold)
    rejecting = defenses.magnet_rejecting(lambda x: 3000 * LOGITS_FN(x), detectors, thresholds)
    is_rejected = defenses.magnet_detects(detectors, thresholds, X)
    logits = rejecting(X)
    assert bool(jnp.all(jnp.isfinite(logits)))
    np.testing.assert_array_equal(logits.argmax(-1) == 10, is_rejected)
    assert bool(is_rejected.all()) == (score != 1 - 1e-3)


@pytest.mark.parametrize("widths", [(3, 3), (3,), (4, 4, 4)])
def test_architectures(widths):
    module = defenses.Autoencoder(widths)
    x = jnp.zeros((2, 8, 12, 3))
    params = module.init(jax.random.key(0), x)["params"]
    assert len(params) == 2 * len(widths) + 1
    chex.assert_shape(module.apply({"params": params}, x), (2, 8, 12, 3))


DIGITS = data.load("digits", "train").take(256)
TRAIN = functools.partial(
    defenses.train_autoencoders, jax.random.key(0), defenses.Autoencoder((3,)), DIGITS,
    batch_size=64, optimizer=optax.adam(0.03), progress=False,
)  # fmt: skip


@pytest.mark.study
def test_training_learns_and_the_diversity_pulls_apart():
    x = DIGITS.float_images()
    spreads, errors = [], []
    for alpha in (0.0, 0.9):
        stack = TRAIN(num_autoencoders=2, num_epochs=60, alpha=alpha)
        images = jax.vmap(lambda f: f(x))(stack)
        chex.assert_shape(images, (2, *x.shape))
        spreads.append(float(jnp.mean((images - images.mean(0)) ** 2)))
        errors.append(float(jnp.mean((images - x) ** 2)))
    assert max(errors) < 0.5 * np.mean((x - x.mean(0)) ** 2)
    assert spreads[1] > 1.5 * spreads[0]


def test_training_is_a_function_of_its_key():
    first, again, other = (
        defenses.train_autoencoder(
            jax.random.key(seed), defenses.Autoencoder((3,)), DIGITS, num_epochs=1,
            batch_size=64, progress=False,
        )
        for seed in (0, 0, 1)
    )  # fmt: skip
    chex.assert_trees_all_equal(first, again)
    assert not np.allclose(first(X), other(X))


def test_the_loss_is_the_papers():
    # Three "autoencoders" that scale, no noise: the terms by hand.
    scales = np.array([0.5, 1.0, 1.2])
    logits_fn = lambda x: jnp.stack([scale * x for scale in scales])
    loss = autoencoders._denoising(jax.random.key(0), logits_fn, X, Y, noise=0.0, alpha=0.3)
    x = np.asarray(X, np.float64)
    images = scales[:, None, None, None, None] * x
    expected = ((images - x) ** 2 - 0.3 * (images - images.mean(0)) ** 2).mean((2, 3, 4)).sum(0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_score_that_is_not_a_number_is_no_pass():
    broken = defenses.error_detector(lambda x: x.at[0].set(jnp.nan))
    found = defenses.magnet_detects([broken], jnp.ones(1), X)
    assert found.tolist() == [True] + [False] * (len(X) - 1)
    without_limit = defenses.thresholds([broken], X, 0.0).at[0].set(jnp.nan)
    assert defenses.magnet_detects([broken], without_limit, X).all()


RGB = jnp.zeros((2, 8, 8, 3))
UINT8 = (255 * X).astype(jnp.uint8)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: defenses.thresholds(DETECTORS, X[:0], 0.01), "need held-out images, got none"),
        (lambda: defenses.thresholds(DETECTORS, None, 0.01), "need held-out images, got none"),
        (lambda: defenses.thresholds((), X, 0.01), "need at least one detector, got none"),
        (
            lambda: defenses.thresholds(DETECTORS, X, 1.2),
            "need 0 <= false_positive_rate <= 1, got false_positive_rate=1.2",
        ),
        (lambda: defenses.thresholds(DETECTORS, X, float("nan")), "need 0 <= false_positive_rate"),
        (
            lambda: defenses.magnet(LOGITS_FN, AUTOENCODER)(RGB),
            r"magnet: need an autoencoder for images of shape \(8, 8, 3\)",
        ),
        (
            lambda: defenses.magnet(LOGITS_FN, lambda x: x[:, 1:])(X),
            r"makes images of shape \(8, 8, 1\), got one that makes \(7, 8, 1\)",
        ),
        (lambda: defenses.error_detector(AUTOENCODER)(RGB), "error_detector: need an autoencoder"),
        (lambda: defenses.error_detector(AUTOENCODER)(UINT8), "error_detector: need float images"),
        (lambda: DETECTORS[-1](UINT8), "divergence_detector: need float images"),
        (lambda: defenses.magnet(LOGITS_FN, AUTOENCODER)(UINT8), "magnet: need float images"),
        (lambda: defenses.magnet(LOGITS_FN, STACK)(X), "or a stack of them"),
        (
            lambda: defenses.magnet(LOGITS_FN, AUTOENCODER, key=jax.random.key(0)),
            "magnet: need a stack of autoencoders with a key",
        ),
        (
            lambda: defenses.magnet(LOGITS_FN, lambda x: x, key=jax.random.key(0)),
            "magnet: need a stack of autoencoders with a key",
        ),
        (
            lambda: defenses.magnet_detects(DETECTORS, jnp.ones(1), X),
            r"magnet_detects: need one threshold a detector \(4\), got shape \(1,\)",
        ),
        (
            lambda: defenses.magnet_detects(DETECTORS, None, X),
            r"magnet_detects: need one threshold a detector \(4\), got none",
        ),
        (
            lambda: defenses.magnet_rejecting(LOGITS_FN, DETECTORS, jnp.ones(5)),
            r"magnet_rejecting: need one threshold a detector \(4\), got shape \(5,\)",
        ),
        (
            lambda: defenses.thresholds(DETECTORS, X, [0.1, 0.2]),
            "need one false_positive_rate or one a detector",
        ),
        (lambda: defenses.error_detector(AUTOENCODER, p=0), "need p >= 1, got p=0"),
        (
            lambda: defenses.divergence_detector(LOGITS_FN, AUTOENCODER, temperature=0),
            "need a finite temperature > 0, got temperature=0",
        ),
        (lambda: defenses.Autoencoder().init(jax.random.key(0), RGB[:, 1:]), "that 2 divides"),
        (lambda: TRAIN(alpha=1.0), "need 0 <= alpha < 1, got alpha=1.0"),
        (lambda: TRAIN(noise=-0.1), "need a finite noise >= 0, got noise=-0.1"),
        (lambda: TRAIN(num_autoencoders=0), "need num_autoencoders >= 1"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)
