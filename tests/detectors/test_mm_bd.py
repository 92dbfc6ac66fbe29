"""MM-BD: margins whose maximum is known, and p-values against SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import integrate, special, stats

import advjax
from advjax import detectors
from advjax.detectors import margins
from tests import helpers

SHAPE = (4, 5, 1)
STRENGTHS = np.array([1.0, 1.2, 6.0, 0.8, 1.1], np.float32)
run = functools.partial(
    detectors.maximum_margins, num_classes=5, image_shape=SHAPE, num_starts=3, num_steps=200,
    learning_rate=0.1,
)  # fmt: skip


def columns(params, x):
    """Class c is the sum of column c times a strength; its margin is largest if only it is lit."""
    return params * jnp.sum(x, axis=(1, 3))


@pytest.fixture(scope="module")
def found():
    return run(jax.random.key(0), Partial(columns, STRENGTHS))


def test_margins_are_the_largest(found):
    # Four pixels of 1 times the strength, and every other column 0. Pixels of the clipped box are
    # exact; the sums round.
    np.testing.assert_allclose(found[0], 4 * STRENGTHS, rtol=1e-6)
    np.testing.assert_array_equal(found[1][..., 0], np.broadcast_to(np.eye(5)[:, None], (5, 4, 5)))


def test_jit_vmap_and_batches_of_classes(found):
    several = advjax.stack([Partial(columns, jnp.asarray(s * STRENGTHS)) for s in (1, 2)])
    stacked = jax.jit(jax.vmap(lambda f: run(jax.random.key(0), f)[0]))(several)
    np.testing.assert_allclose(stacked, np.outer([4, 8], STRENGTHS), rtol=1e-6)
    few = run(jax.random.key(0), Partial(columns, STRENGTHS), class_batch=1)
    np.testing.assert_allclose(few[0], found[0], rtol=1e-6)


def test_stops_where_the_loss_does():
    """With a large tolerance one step is made, which from far away is not enough."""
    stopped = run(jax.random.key(0), Partial(columns, STRENGTHS), tolerance=1e3)
    assert np.all(stopped[0] < 4 * STRENGTHS - 0.1)


@pytest.mark.parametrize("null", detectors.NULLS)
def test_finds_the_planted_class(null, found):
    detection = detectors.mm_bd(
        jax.random.key(0), Partial(columns, STRENGTHS), np.zeros((2, *SHAPE), np.float32),
        num_classes=5, null=null, num_starts=3, num_steps=200, learning_rate=0.1,
    )  # fmt: skip
    assert int(detection.target_label) == 2
    assert detection.score.shape == ()
    assert detection.score.dtype == jnp.float32
    # Four margins about 4, one of 24; only the exponential distribution has such a heavy tail.
    assert float(detection.score) > (3 if null != "exponential" else 1)
    helpers.assert_same_bits(detection.details["margins"], found[0])
    expected = -detectors.log_p_value(np.asarray(found[0]), null)
    assert float(detection.score) == pytest.approx(expected, rel=1e-6)
    assert float(detection.details["p_value"]) == pytest.approx(np.exp(-expected), rel=1e-5)


def fitted(null, others):
    if null == "mad":
        median = np.median(others)
        return stats.norm(median, 1.4826 * np.median(np.abs(others - median)))
    if null == "exponential":
        return stats.expon(scale=np.mean(others))
    return stats.gamma(*stats.gamma.fit(others, **({} if null == "gamma" else {"floc": 0})))


@pytest.mark.parametrize("null", detectors.NULLS)
@pytest.mark.parametrize("largest", [5.1, 5.6, 7.0])
def test_p_value_against_scipy(null, largest):
    others = np.random.default_rng(0).gamma(20, 0.2, size=12).clip(max=5)
    null_distribution = fitted(null, others)
    expected = 1 - null_distribution.cdf(largest) ** 13
    found = detectors.log_p_value([*others[:6], largest, *others[6:]], null)
    assert np.exp(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("null", detectors.NULLS)
def test_score_goes_on_where_the_p_value_is_zero(null):
    others = np.random.default_rng(0).gamma(20, 0.2, size=9)
    logs = np.array([detectors.log_p_value([*others, r], null) for r in np.geomspace(6, 1e6, 40)])
    assert np.all(np.isfinite(logs))
    assert np.all(np.diff(logs) < 0)
    assert logs[-1] < -1e5


def test_no_jump_where_the_formula_changes():
    """The exponential distribution's log-survival is minus its argument, 30 is the change."""
    logs = [detectors.log_p_value([1.0, 1.0, 1.0, r], "exponential") for r in (29.99, 30.01)]
    assert logs[0] - logs[1] == pytest.approx(0.02, abs=1e-9)


@pytest.mark.parametrize("shape", [0.3, 1.0, 4.5])
@pytest.mark.parametrize("value", [455.0, 465.0, 800.0, 1e5])
def test_gamma_tail_against_an_integral(shape, value):
    """Gamma(a, x) = exp(-x) x^(a - 1) int_0^inf exp(-t) (1 + t / x)^(a - 1) dt."""
    integral, _ = integrate.quad(
        lambda t: np.exp(-t + (shape - 1) * np.log1p(t / value)), 0, 400, limit=200
    )
    expected = -value + (shape - 1) * np.log(value) - special.gammaln(shape) + np.log(integral)
    assert margins._log_gamma_survival(value, shape) == pytest.approx(expected, rel=1e-9)


def test_bad_input():
    logits_fn, key = Partial(columns, STRENGTHS), jax.random.key(0)
    mm_bd = functools.partial(detectors.mm_bd, key, logits_fn, num_classes=5, image_shape=SHAPE)
    for options, message in (
        ({"null": "normal"}, "mm_bd: unknown null 'normal'; known: gamma, gamma_loc0"),
        ({"num_classes": 4}, "mm_bd: need num_classes=5, as many as"),
        ({"num_classes": 2}, "mm_bd: need num_classes >= 3"),
        ({"image_shape": None}, "mm_bd: need images x or their image_shape, got neither"),
        ({"image_shape": (4, 5)}, r"mm_bd: need image_shape \(h, w, c\), got \(4, 5\)"),
        ({"x": np.zeros((2, *SHAPE), np.uint8)}, "mm_bd: need float images"),
        ({"num_starts": 0}, "mm_bd: need num_starts >= 1"),
        ({"learning_rate": -1.0}, "mm_bd: need a finite learning_rate >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mm_bd(**options)
    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(lambda f: detectors.mm_bd(key, f, num_classes=5, image_shape=SHAPE, num_steps=1))(
            logits_fn
        )
    for values, null, message in (
        ([1.0, 2.0], "gamma", "need one margin a class, of at least 3"),
        ([1.0, -2.0, 3.0], "exponential", "need positive margins for the null 'exponential'"),
        ([1.0, -2.0, 3.0], "gamma_loc0", "need positive margins for the null 'gamma_loc0'"),
        ([1.0, np.nan, 3.0], "gamma", "need finite margins"),
    ):
        with pytest.raises(ValueError, match=message):
            detectors.log_p_value(values, null)


@pytest.mark.parametrize("null", detectors.NULLS)
def test_equal_margins_are_no_nan(null):
    """Or a sentence: not every distribution has a fit."""
    try:
        found = detectors.log_p_value([2.0, 2.0, 2.0, 2.0, 3.0], null)
    except ValueError as error:
        assert "mm_bd: no gamma distribution fits" in str(error)
    else:
        assert np.isfinite(found)
        assert found <= 0
