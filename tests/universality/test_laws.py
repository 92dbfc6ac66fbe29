"""The power-law fit against NumPy, its window, its interval, under jit and vmap, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import universality

EPSILONS = np.geomspace(0.002, 0.5, 14).astype(np.float32)


def example_successes(seed, exponent, n=2000):
    """Examples whose smallest epsilon has the distribution function (2 epsilon) ** exponent."""
    smallest = np.random.default_rng(seed).uniform(size=n) ** (1 / exponent) / 2
    return smallest <= EPSILONS[:, None]


def numpy_fit(epsilons, errors, floor, ceiling):
    inside = (errors >= floor) & (errors <= ceiling) & (epsilons > 0)
    exponent, intercept = np.polyfit(np.log(epsilons[inside]), np.log(errors[inside]), 1)
    return np.exp(intercept), exponent, inside


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_it_is_numpys_fit_in_the_window(exponent):
    success = example_successes(0, exponent)
    law = universality.fit_power_law(EPSILONS, success)
    amplitude, slope, inside = numpy_fit(EPSILONS, success.mean(1), 10 / 2000, 0.1)
    np.testing.assert_array_equal(law.in_window, inside)
    # 1e-4: float32 sums of some ten logarithms.
    np.testing.assert_allclose(law.exponent, slope, rtol=1e-4)
    np.testing.assert_allclose(law.amplitude, amplitude, rtol=1e-4)
    assert law.low < law.exponent < law.high


def test_the_interval_is_as_wide_as_the_spread_over_draws():
    success = np.stack([example_successes(seed, 1.0) for seed in range(100)])
    laws = jax.jit(jax.vmap(lambda s: universality.fit_power_law(EPSILONS, s)))(success)
    half = np.mean(laws.high - laws.low) / 2
    # The deviation of 100 draws is known to 7 %, the window differs a little between draws.
    np.testing.assert_allclose(half, 1.96 * np.std(laws.exponent), rtol=0.3)
    covered = np.mean((laws.low < 1) & (laws.high > 1))
    assert 0.85 < covered <= 1  # 95 % but for 2 % of noise and the bend of the bootstrap


def test_vmap_equals_one_by_one():
    success = np.stack([example_successes(seed, 1.5) for seed in range(3)])
    together = jax.vmap(lambda s: universality.fit_power_law(EPSILONS, s))(success)
    for i in range(3):
        alone = universality.fit_power_law(EPSILONS, success[i])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5)  # sums in another order


def test_only_the_examples_that_count():
    success = example_successes(0, 1.0)
    where = np.random.default_rng(1).uniform(size=2000) < 0.5
    law = universality.fit_power_law(EPSILONS, success & where, where=where)
    alone = universality.fit_power_law(EPSILONS, success[:, where])
    # 1e-5: sums in another order. The bootstraps draw other examples.
    np.testing.assert_allclose(law.exponent, alone.exponent, rtol=1e-5)
    np.testing.assert_allclose(law.amplitude, alone.amplitude, rtol=1e-5)
    np.testing.assert_allclose(law.high - law.low, alone.high - alone.low, rtol=0.3)


def test_errors_outside_the_window_do_not_count():
    errors = np.minimum(3 * EPSILONS**1.2, 1).astype(np.float32)
    law = universality.fit_power_law(EPSILONS, errors, floor=0.02, ceiling=0.2)
    changed = np.where(law.in_window, errors, np.where(errors > 0.1, 0.9, 1e-3))
    again = universality.fit_power_law(EPSILONS, changed.astype("f4"), floor=0.02, ceiling=0.2)
    assert law.exponent == again.exponent
    # 1e-4: float32 logarithms.
    np.testing.assert_allclose([law.amplitude, law.exponent], [3, 1.2], rtol=1e-4)
    assert np.isnan(law.low) and np.isnan(law.high)


def test_under_jit_an_empty_window_is_nan():
    law = jax.jit(universality.fit_power_law)(EPSILONS, jnp.zeros(14))
    assert np.isnan(law.exponent) and not law.in_window.any()
    same = jnp.full(14, 0.1)
    assert np.isnan(jax.jit(universality.fit_power_law)(same, jnp.linspace(0.02, 0.1, 14)).exponent)


@pytest.mark.parametrize(
    "epsilons, errors, sentence",
    [
        (EPSILONS, np.zeros(14), "need errors between 0 and 1, got 14 errors that are all 0"),
        (EPSILONS, np.ones((14, 5), bool), "got 14 errors that are all 1"),
        (EPSILONS, np.r_[0.05, 0.1, np.ones(12)], r"at least 3 different epsilons .* got 2"),
        (np.full(14, 0.1), np.linspace(0.02, 0.1, 14), r"\[0.01, 0.1\], got 1"),
        (EPSILONS, np.zeros(9), r"got shapes \(14,\) and \(9,\)"),
        (-EPSILONS, np.linspace(0.1, 0.2, 14), "need a finite epsilons >= 0"),
    ],
)
def test_bad_input_is_one_sentence(epsilons, errors, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        universality.fit_power_law(epsilons, errors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(where=np.ones(4, bool)), r"need where bool\[n\] .* got shapes \(4,\) and \(14, 5\)"),
        (dict(confidence=1.5), "need 0 < confidence < 1, got confidence=1.5"),
    ],
)
def test_bad_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        universality.fit_power_law(EPSILONS, np.ones((14, 5), bool), **options)
