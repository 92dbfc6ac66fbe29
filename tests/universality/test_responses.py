"""Logit gaps, first-order response and mean field: against NumPy and on linear classifiers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import attacks, models, universality

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(9, 4)).astype(np.float32)
# Inside the box and away from its ends, so that no pixel is clipped.
X = RNG.uniform(0.4, 0.6, size=(50, 3, 3, 1)).astype(np.float32)


def linear(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS


# ---------------------------------------------------------------------------------- logit gaps


def test_gaps_and_their_exponents_are_numpys():
    logits = RNG.normal(size=(4000, 5)).astype(np.float32)
    result = universality.logit_gaps(logits, share=0.1)
    ordered = np.sort(logits, axis=1)[:, ::-1]
    gaps = ordered[:, :1] - ordered[:, 1:]
    np.testing.assert_array_equal(result.gaps, gaps)
    for j in range(4):
        limit = np.quantile(gaps[:, j], 0.1)
        small = gaps[:, j][gaps[:, j] <= limit]
        power = len(small) / np.sum(np.log(limit / small))
        # 1e-4: float32 sums of 400 logarithms.
        np.testing.assert_allclose(result.exponents[j], power - 1, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result.deviations[j], power / np.sqrt(len(small)), rtol=1e-4)


def test_random_logits_have_the_exponents_of_independent_ones():
    logits = universality.random_logits(jax.random.key(0), 100_000, 10)
    result = jax.jit(universality.logit_gaps)(logits, share=0.01)
    # The density bends by some 10 % of the limit's share; four standard errors and 0.1 cover it.
    for j in range(3):
        assert abs(result.exponents[j] - j) < 4 * result.deviations[j] + 0.1


def test_gaps_need_two_classes():
    with pytest.raises(ValueError, match=r"\[n, k\] with k >= 2, got shape \(3, 1\)"):
        universality.logit_gaps(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="need logits that are floats, got dtype int32"):
        universality.logit_gaps(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert np.isnan(universality.logit_gaps(jnp.array([[1.0, 4.0, 3.0]])).exponents).all()
    with pytest.raises(ValueError, match=r"need 0 < share <= 1, got share=2\.0"):
        universality.logit_gaps(np.zeros((3, 2)), share=2.0)


# ----------------------------------------------------------------------------- linear response


def test_a_linear_classifier_responds_linearly():
    response = universality.linear_response(linear, X)
    logits = X.reshape(50, -1) @ WEIGHTS
    answers = logits.argmax(1)
    gradients = np.stack(
        [
            WEIGHTS @ (np.exp(z) / np.exp(z).sum() - np.eye(4)[a])
            for z, a in zip(logits, answers, strict=True)
        ]
    )
    gamma = np.sign(gradients) @ WEIGHTS
    gains = gamma - gamma[np.arange(50), answers][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.where(gains > 0, (logits.max(1)[:, None] - logits) / gains, np.inf)
    # 1e-4: float32 against float64 in a difference of logits.
    np.testing.assert_allclose(response.gamma, gamma, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(response.predicted, crossings.min(1), rtol=1e-3, atol=1e-5)
    inside = response.predicted < 0.4
    assert inside.any()
    # 1e-3: the bisection ends at 1/4096 of a bracket; logits of size 1 are known to 1e-7.
    np.testing.assert_allclose(
        response.measured[inside], response.predicted[inside], rtol=1e-3, atol=1e-6
    )
    assert universality.explained_variance(response, 0.4) > 0.999


def test_the_measured_epsilon_is_where_fgsm_succeeds():
    net = models.make("mlp", num_classes=4, hidden=(16,))
    logits_fn = advjax.bind(net, net.init(jax.random.key(1), X))
    x = RNG.uniform(size=(50, 3, 3, 1)).astype(np.float32)
    response = jax.jit(universality.linear_response)(logits_fn, x)
    y = np.argmax(logits_fn(x), -1)
    is_found = np.isfinite(response.measured)
    assert is_found.any()
    for factor, expected in ((1.001, True), (0.999, False)):
        # The attack moves pixels at the ends of the box too, and is clipped.
        epsilon = jnp.where(is_found, response.measured * factor, 0)
        x_adv = attacks.fgsm(jax.random.key(0), logits_fn, x, y, epsilon)
        fooled = np.argmax(logits_fn(x_adv), -1) != y
        np.testing.assert_array_equal(fooled[is_found], expected)


def test_pixels_at_the_ends_of_the_box_stay():
    x = np.zeros((1, 3, 3, 1), np.float32)
    x[0, 0, 0, 0] = 1
    response = universality.linear_response(linear, x)
    assert np.all(response.direction >= -x) and np.all(response.direction <= 1 - x)


def test_an_answer_that_never_changes_is_at_infinity():
    response = universality.linear_response(lambda x: linear(x) * 0 + jnp.arange(4.0), X)
    assert np.all(np.isinf(response.predicted)) and np.all(np.isinf(response.measured))


def test_jit_and_vmap_equal_eager():
    eager = universality.linear_response(linear, X)
    stacked = jax.vmap(lambda x: universality.linear_response(linear, x))(X[None])
    for a, b in zip(eager, stacked, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-6)  # sums in another order


# ---------------------------------------------------------------------------------- mean field


def test_mean_field_is_numpys():
    response = universality.linear_response(linear, X)
    epsilons = np.array([0.0, 0.01, 0.1, 0.5], np.float32)
    theory = universality.mean_field(response, epsilons)
    order = np.argsort(-response.logits, axis=1)[:, :2]
    values = np.take_along_axis(np.asarray(response.logits), order, 1)
    gammas = np.take_along_axis(np.asarray(response.gamma), order, 1)
    mean = np.mean(gammas[:, 1] - gammas[:, 0])
    np.testing.assert_allclose(theory.gamma, mean, rtol=1e-5)  # a float32 mean of 50
    for i, epsilon in enumerate(epsilons):
        assert theory.error[i] == np.mean(
            values[:, 0] - values[:, 1] < epsilon * theory.gamma, dtype=np.float32
        )
        assert theory.measured_error[i] == np.mean(response.measured <= epsilon, dtype=np.float32)
    assert theory.error[0] == 0 and theory.error[-1] > 0


def test_mean_field_of_one_epsilon():
    response = universality.linear_response(linear, X)
    for one, each in zip(
        universality.mean_field(response, 0.1),
        universality.mean_field(response, [0.1]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, each)


def test_where_there_is_no_answer_there_is_no_epsilon():
    def logits_fn(x):
        return jnp.where(x[:, :1, 0, 0] > 0.5, linear(x), jnp.nan)

    has_answer = X[:, 0, 0, 0] > 0.5
    response = jax.jit(lambda x: universality.linear_response(logits_fn, x))(X)
    np.testing.assert_array_equal(np.isnan(response.predicted), ~has_answer)
    np.testing.assert_array_equal(np.isnan(response.measured), ~has_answer)
    expected = universality.linear_response(linear, X)
    np.testing.assert_allclose(
        response.predicted[has_answer], expected.predicted[has_answer], rtol=1e-4
    )


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match=r"linear_response: need images in \[0, 1\]"):
        universality.linear_response(linear, X * 3)
    with pytest.raises(ValueError, match=r"linear_response: need images of shape \[b, h, w, c\]"):
        universality.linear_response(linear, X.reshape(len(X), -1))
    with pytest.raises(ValueError, match=r"linear_response: need labels in 0 ... 3, got 4 ... 4"):
        universality.linear_response(linear, X, np.full(50, 4))
