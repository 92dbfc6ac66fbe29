"""The power law of the adversarial error, fitted over a window of small epsilons."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks, random
from advjax.core.typing import Array, Key

LEAST_SUCCESSES = 10  # an error from fewer adversarial examples is off by a third and more
LEAST_EPSILONS = 3


class PowerLaw(NamedTuple):
    """`error = amplitude * epsilon ** exponent`.

    Attributes:
      amplitude: f32[].
      exponent: f32[].
      low: lower end of the confidence interval of the exponent, f32[]; NaN without examples.
      high: its upper end.
      in_window: which epsilons the fit used, bool[e].
    """

    amplitude: Array
    exponent: Array
    low: Array
    high: Array
    in_window: Array


def _fit(log_epsilons: Array, errors: Array, in_window: Array) -> tuple[Array, Array]:
    """Least squares of `log error = log amplitude + exponent log epsilon` in the window."""
    weights = (in_window & (errors > 0)).astype(log_epsilons.dtype)
    log_errors = jnp.log(jnp.where(errors > 0, errors, 1))
    # 0 / 0, NaN, where nothing is in the window.
    mean_x = jnp.sum(weights * log_epsilons) / jnp.sum(weights)
    mean_y = jnp.sum(weights * log_errors) / jnp.sum(weights)
    x = log_epsilons - mean_x
    exponent = jnp.sum(weights * x * (log_errors - mean_y)) / jnp.sum(weights * x * x)
    return jnp.exp(mean_y - exponent * mean_x), exponent


def fit_power_law(
    epsilons: ArrayLike,
    errors: Array,
    *,
    where: Array | None = None,
    floor: ArrayLike | None = None,
    ceiling: ArrayLike = 0.1,
    key: Key | None = None,
    num_resamples: int = 200,
    confidence: ArrayLike = 0.95,
) -> PowerLaw:
    """Fits `error = amplitude * epsilon ** exponent` where the error is small but measurable.

    The window holds the epsilons above 0 whose error lies in [floor, ceiling]: below the floor
    there are too few adversarial examples to take a logarithm of, above the ceiling the error
    bends toward saturation. The fit is least squares in log-log, all epsilons alike. The interval
    is that of a bootstrap over the examples (percentiles), with the window of the full data.

    It works under `jit`, and under `vmap` over many networks; there a window of fewer than three
    epsilons gives NaN, not an error.

    Args:
      epsilons: sizes of the perturbation, f32[e].
      errors: the adversarial error at each, f32[e]; or whether each example was adversarial,
        bool[e, n], which gives the interval.
      where: with bool[e, n], the examples that count, bool[n]; those that the network answers
        correctly when they are clean, if the clean error shall be left out.
      floor: smallest error of the window; by default that of ten adversarial examples, or 0.01
        where the number of examples is not known.
      ceiling: largest error of the window. A tenth is a choice: further up the error first rises
        faster and then saturates.
      key: of the bootstrap; `jax.random.key(0)` if None.
      num_resamples: of the bootstrap.
      confidence: of the interval.

    Returns:
      A `PowerLaw`.

    Static: num_resamples.

    Raises:
      ValueError: epsilons and errors that do not fit together, errors that are all 0 or 1, fewer
        than three different epsilons in the window.

    Example:
      >>> import jax.numpy as jnp
      >>> epsilons = jnp.array([0.01, 0.02, 0.04, 0.08])
      >>> law = fit_power_law(epsilons, 2 * epsilons)
      >>> print(f"{law.amplitude:.3f} {law.exponent:.3f}")
      2.000 1.000

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017. The window and the interval are ours.
    """
    epsilons, errors = jnp.asarray(epsilons, jnp.float32), jnp.asarray(errors)
    if epsilons.ndim != 1 or errors.ndim not in (1, 2) or errors.shape[0] != epsilons.shape[0]:
        raise ValueError(
            "fit_power_law: need epsilons f32[e] and errors f32[e] or bool[e, n], got shapes "
            f"{epsilons.shape} and {errors.shape}."
        )
    if where is not None and jnp.shape(where) != errors.shape[1:]:
        raise ValueError(
            "fit_power_law: need where bool[n] with errors bool[e, n], got shapes "
            f"{jnp.shape(where)} and {errors.shape}."
        )
    if checks.is_concrete(confidence) and not 0 < np.asarray(confidence) < 1:
        raise ValueError(f"fit_power_law: need 0 < confidence < 1, got confidence={confidence}.")
    checks.non_negative("fit_power_law", "epsilons", epsilons)
    checks.at_least("fit_power_law", "num_resamples", num_resamples, 1)
    is_by_example = errors.ndim == 2
    success = errors.astype(jnp.float32) if is_by_example else errors[:, None]
    counts = jnp.ones(success.shape[1]) if where is None else jnp.asarray(where, jnp.float32)
    number = jnp.sum(counts)
    errors = success @ counts / number
    if floor is None:
        floor = LEAST_SUCCESSES / number if is_by_example else 0.01
    # A count over a count is as near to the floor as float32 can tell.
    in_window = (epsilons > 0) & (errors >= floor * (1 - 1e-6)) & (errors <= ceiling)
    _check_window(epsilons, errors, in_window, floor, ceiling)
    is_enough = _num_different(epsilons, in_window) >= LEAST_EPSILONS
    log_epsilons = jnp.log(jnp.where(epsilons > 0, epsilons, 1))
    amplitude, exponent = (
        jnp.where(is_enough, value, jnp.nan) for value in _fit(log_epsilons, errors, in_window)
    )
    if not is_by_example:
        missing = jnp.full_like(exponent, jnp.nan)
        return PowerLaw(amplitude, exponent, missing, missing, in_window)

    def resample(key: Key) -> Array:
        # Of the examples that count, as many as there are, with replacement.
        drawn = jax.random.uniform(key, counts.shape) * number
        weights = jnp.bincount(
            jnp.searchsorted(jnp.cumsum(counts), drawn, side="right"),
            (jnp.arange(counts.size) < number).astype(jnp.float32), length=counts.size,
        )  # fmt: skip
        return _fit(log_epsilons, success @ weights / number, in_window)[1]

    key = jax.random.key(0) if key is None else random.as_typed(key)
    exponents = jax.lax.map(resample, jax.random.split(key, num_resamples))
    tail = (1 - jnp.asarray(confidence, jnp.float32)) / 2
    # A resample of few adversarial examples may have none of them.
    low, high = jnp.nanquantile(exponents, jnp.stack([tail, 1 - tail]))
    low, high = (jnp.where(is_enough, value, jnp.nan) for value in (low, high))
    return PowerLaw(amplitude, exponent, low, high, in_window)


def _num_different(epsilons: Array, in_window: Array) -> Array:
    inside = jnp.sort(jnp.where(in_window, epsilons, -1))
    return jnp.sum((inside > 0) & (inside > jnp.roll(inside, 1).at[0].set(-1)))


def _check_window(epsilons, errors, in_window, floor, ceiling) -> None:
    if not checks.is_concrete(epsilons, errors, in_window, floor, ceiling):
        return
    values = np.asarray(errors)
    for extreme in (0, 1):
        if np.all(values == extreme):
            raise ValueError(
                f"fit_power_law: need errors between 0 and 1, got {values.size} errors that are "
                f"all {extreme}."
            )
    number = int(_num_different(epsilons, in_window))
    if number < LEAST_EPSILONS:
        raise ValueError(
            f"fit_power_law: need at least {LEAST_EPSILONS} different epsilons with an error in "
            f"[{float(floor):.3g}, {float(ceiling):.3g}], got {number}."
        )
