"""Losses and metrics against their definitions in float64."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special

from advjax import losses, metrics

LOSSES = {"cross_entropy": losses.cross_entropy, "margin": losses.margin, "dlr": losses.dlr}
NUM_EXAMPLES, NUM_CLASSES = 6, 5
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=LOSSES)
def loss_fn(request):
    return LOSSES[request.param]


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(NUM_EXAMPLES, NUM_CLASSES)) * scale).astype(np.float32)
    return logits, rng.integers(NUM_CLASSES, size=NUM_EXAMPLES).astype(np.int32)


def split(logits, labels):
    """The label's logit and those of the others, from the largest down, float64."""
    rows = [np.delete(row, label) for row, label in zip(logits, labels, strict=True)]
    own = logits[np.arange(len(labels)), labels].astype(np.float64)
    return own, -np.sort(-np.float64(rows), axis=1)


@hypothesis.given(seed=seeds, exponent=st.floats(-3, 3))
def test_cross_entropy(seed, exponent):
    logits, labels = drawn(seed, 10**exponent)
    expected = -special.log_softmax(logits.astype(np.float64), axis=1)
    expected = expected[np.arange(NUM_EXAMPLES), labels]
    # Differences of logits in float32: 6e-8 of the largest logit, a few times.
    atol = 1e-6 * max(1, np.abs(logits).max())
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, atol=atol)


@hypothesis.given(seed=seeds, exponent=st.floats(-3, 3))
def test_margin(seed, exponent):
    logits, labels = drawn(seed, 10**exponent)
    own, others = split(logits, labels)
    value = np.asarray(losses.margin(logits, labels))
    # One subtraction in float32.
    np.testing.assert_allclose(value, others[:, 0] - own, rtol=1.2e-7)
    np.testing.assert_array_equal(value > 0, logits.argmax(1) != labels)


@hypothesis.given(seed=seeds, exponent=st.floats(-3, 3), shift=st.floats(-5, 5))
def test_dlr(seed, exponent, shift):
    logits, labels = drawn(seed)
    ranked = -np.sort(-logits.astype(np.float64), axis=1)
    own, others = split(logits, labels)
    expected = (others[:, 0] - own) / (ranked[:, 0] - ranked[:, 2])
    value = np.asarray(losses.dlr(logits, labels))
    # Each difference is off by 1.2e-7 of a logit at most 5, over a spread that may be small.
    tolerance = 1e-6 * (1 + np.abs(expected)) / (ranked[:, 0] - ranked[:, 2])
    assert np.all(np.abs(value - expected) <= tolerance)
    assert np.all(value >= -1)
    np.testing.assert_array_equal(value > 0, logits.argmax(1) != labels)
    # Scaling costs one rounding a logit; the shift as many as it is larger than them.
    scaled = np.asarray(losses.dlr(logits * np.float32(10**exponent), labels))
    assert np.all(np.abs(scaled - value) <= tolerance)
    shifted = np.asarray(losses.dlr(logits + np.float32(shift), labels))
    assert np.all(np.abs(shifted - value) <= 4 * tolerance)


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match=r"dlr: need at least 3 classes, got num_classes=2\."):
        losses.dlr(jnp.zeros((1, 2)), jnp.array([0]))
    assert losses.dlr(jnp.array([[2.0, 1, 0]]), jnp.array([0])) == -0.5


def test_margin_with_two_classes():
    value = losses.margin(jnp.array([[3.0, 1], [3, 1]]), jnp.array([0, 1]))
    np.testing.assert_array_equal(value, [-2, 2])


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 0, 0], [5, 0, 0, 0]])
@pytest.mark.parametrize("label", range(4))
def test_ties_give_no_nan(loss_fn, row, label):
    value, gradient = jax.value_and_grad(lambda z: loss_fn(z, jnp.array([label]))[0])(
        jnp.array([row], float)
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_losses_are_one_an_example(loss_fn):
    logits, labels = drawn(0)
    together = loss_fn(logits, labels)
    assert together.shape == (NUM_EXAMPLES,)
    assert together.dtype == jnp.float32
    for i in range(NUM_EXAMPLES):
        alone = loss_fn(logits[i : i + 1], labels[i : i + 1])
        # 1e-6: a sum of five exponentials may be taken in another order.
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-6)


def test_losses_grow_when_the_label_loses(loss_fn):
    logits = jnp.array([[1.0, 0, 0.5, -1]])
    gradient = jax.grad(lambda z: loss_fn(z, jnp.array([0]))[0])(logits)
    assert gradient[0, 0] < 0


def test_large_logits_are_finite(loss_fn):
    logits = jnp.array([[1e30, -1e30, 0.0], [-1e30, 1e30, 0]])
    assert np.all(np.isfinite(loss_fn(logits, jnp.array([1, 1]))))


def test_predictions_and_correctness():
    logits = jnp.array([[1.0, 2, 0], [3, 2, 0], [np.nan, 2, 0], [1, np.inf, 0], [1, 1, 0]])
    answers = metrics.predictions(logits)
    assert answers.dtype == jnp.int32
    np.testing.assert_array_equal(answers, [1, 0, -1, -1, 0])
    correct = metrics.is_correct(logits, jnp.array([1, 1, 1, 1, 0]))
    np.testing.assert_array_equal(correct, [True, False, False, False, True])


def test_confidence():
    logits, _ = drawn(1)
    expected = special.softmax(logits.astype(np.float64), axis=1).max(1)
    # 1e-6: five exponentials in float32.
    np.testing.assert_allclose(metrics.confidence(logits), expected, rtol=1e-6)
