"""FMPA: the predictor, the projection, where F-FMPA lands, what is refused."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import aggregation, poisoning
from advjax.poisoning import flexible, prediction


def history_of(models_seen, alpha, warmup=1):
    history = prediction.start(models_seen[0])
    for params in models_seen:
        history = prediction.see(history, params, alpha=alpha, warmup=warmup)
    return history


@hypothesis.given(st.floats(0.05, 0.95), st.integers(1, 20), st.integers(1, 4))
def test_a_constant_history_is_predicted_exactly(alpha, rounds, warmup):
    params = jnp.asarray([1.5, -2.0, 1e3])
    history = history_of([params] * rounds, alpha, warmup)
    np.testing.assert_array_equal(prediction.predict(history, alpha=alpha), params)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_a_linear_history_is_predicted_in_the_end(alpha):
    start, slope = np.array([1.0, -3.0]), np.array([0.5, 2.0])
    path = [jnp.asarray(start + t * slope) for t in range(61)]
    errors = [
        float(jnp.abs(prediction.predict(history_of(path[:n], alpha), alpha=alpha) - path[n]).max())
        for n in (2, 10, 60)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 1e-4  # (1 - alpha)^60 is below it, and float32 rounds at 120


@hypothesis.given(st.integers(0, 2**31 - 1), st.floats(0.1, 0.9))
def test_smoothing_in_numpy(seed, alpha):
    path = np.random.default_rng(seed).normal(size=(7, 5))
    s1 = s2 = path[0]
    for params in path:
        s1 = alpha * params + (1 - alpha) * s1
        s2 = alpha * s1 + (1 - alpha) * s2
    expected = (2 - alpha) / (1 - alpha) * s1 - 1 / (1 - alpha) * s2
    predicted = prediction.predict(history_of(list(map(jnp.asarray, path)), alpha), alpha=alpha)
    # The coefficients reach 11 at alpha = 0.9, and the values are of order 1.
    np.testing.assert_allclose(predicted, expected, atol=2e-5)


@hypothesis.given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([(2, 1), (7, 8), (30, 5)]),  # few shapes, since each compiles
    st.sampled_from([1.0, 0.7]),
)
def test_f_fmpa_lands_on_its_target_under_the_mean(seed, shape, server_rate):
    n, d = shape
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, n))
    params, target = rng.normal(size=(2, d)).astype(np.float32)
    updates = rng.normal(size=(n, d)).astype(np.float32)
    following = params + server_rate * updates.mean(axis=0)  # without the attack
    crafted = poisoning.control_update(
        updates[:m].mean(axis=0), target, following, n / (server_rate * m)
    )
    own = updates[:m].mean(axis=0)

    def landed(update):
        sent = updates.copy()
        sent[:m] = update
        return params + server_rate * np.asarray(aggregation.mean(jnp.asarray(sent)))

    np.testing.assert_allclose(landed(crafted), target, atol=1e-5)
    # With the sign that equation 8 has in print the server lands on the mirror image.
    mirrored = own - (np.asarray(crafted) - own)
    np.testing.assert_allclose(landed(mirrored), 2 * following - target, atol=1e-5)


@hypothesis.given(st.integers(0, 2**31 - 1), st.floats(0, 100))
def test_the_projection_keeps_to_the_ball(seed, scale):
    rng = np.random.default_rng(seed)
    updates, centre = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=4)
    counts = np.arange(6) < 3
    crafted = jnp.asarray(centre + scale * rng.normal(size=4), jnp.float32)
    centre = jnp.asarray(centre, jnp.float32)
    projected = flexible.certified_projection(crafted, centre, updates, counts)
    radius = np.linalg.norm(updates[:3] - centre, axis=1).max()
    assert np.linalg.norm(projected - centre) <= radius * (1 + 1e-6)
    if np.linalg.norm(crafted - centre) <= radius * (1 - 1e-6):
        np.testing.assert_allclose(projected, crafted, atol=1e-6)


def test_hinge_in_numpy():
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(20, 5)).astype(np.float32), rng.integers(0, 5, 20)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    others = shares.copy()
    others[np.arange(20), labels] = -1
    expected = np.maximum(shares[np.arange(20), labels] - others.max(axis=1), 0)
    np.testing.assert_allclose(flexible.hinge(logits, labels), expected, atol=1e-6)
    assert np.any(expected == 0) and np.any(expected > 0)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: poisoning.i_fmpa(alpha=1.0), "i_fmpa: need 0 < alpha < 1, got alpha=1.0"),
        (lambda: poisoning.i_fmpa(alpha=np.nan), "i_fmpa: need 0 < alpha < 1, got alpha=nan"),
        (lambda: poisoning.i_fmpa(reference="mean"), "i_fmpa: unknown reference model 'mean'"),
        (
            lambda: poisoning.i_fmpa(search=poisoning.Search(validation_share=0.0)),
            "i_fmpa: need 0 < validation_share < 1",
        ),
        (lambda: poisoning.i_fmpa(warmup=0), "i_fmpa: need warmup >= 1, got warmup=0"),
        (lambda: poisoning.f_fmpa(target_accuracy=0.5, warmup=0), "f_fmpa: need warmup >= 1"),
        (
            lambda: poisoning.f_fmpa(target_accuracy=0.5, boost_step=1.0),
            "f_fmpa: need 0 <= boost_step < 1, got boost_step=1.0",
        ),
        (
            lambda: poisoning.f_fmpa(target_accuracy=0.5, boost_step=-0.1),
            "f_fmpa: need a finite boost_step >= 0",
        ),
        (lambda: poisoning.f_fmpa(target_accuracy=1.0), "f_fmpa: need 0 < target_accuracy < 1"),
        (lambda: poisoning.f_fmpa(target_accuracy=0.5, boost="x"), "f_fmpa: unknown boost 'x'"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)
