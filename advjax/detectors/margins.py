"""MM-BD: a class whose largest margin, over all images, is far above the other classes'."""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks, classifier, losses, random
from advjax.core.typing import Array, Key, LogitsFn
from advjax.detectors import inputs, outliers
from advjax.detectors.detections import Detection

NULLS = ("gamma", "gamma_loc0", "exponential", "mad")


class _Climb(NamedTuple):
    """Images that climb to the largest margin of one class."""

    step: Array
    images: Array
    last_loss: Array
    is_done: Array


def _climb(
    key: Key, logits_fn: LogitsFn, label: Array, shape, learning_rate, tolerance, num_steps
) -> tuple[Array, Array]:
    """The largest margin of a class over all starts, and its image."""
    labels = jnp.full(shape[0], label)

    def margins(images: Array) -> Array:
        # Outside of [0, 1] the gradient is zero: a pixel that has left the box stays outside.
        return -losses.margin(logits_fn(jnp.clip(images, 0, 1)), labels)

    def step(climb: _Climb) -> _Climb:
        loss, gradient = jax.value_and_grad(lambda images: -jnp.sum(margins(images)))(climb.images)
        change = jnp.abs(climb.last_loss - loss)
        return _Climb(
            climb.step + 1,
            climb.images - learning_rate * gradient,
            loss,
            change < tolerance * jnp.abs(climb.last_loss),
        )

    start = jax.random.uniform(jax.random.fold_in(key, label), shape)
    climb = jax.lax.while_loop(
        lambda climb: (climb.step < num_steps) & ~climb.is_done,
        step,
        _Climb(jnp.zeros((), jnp.int32), start, jnp.asarray(jnp.inf), jnp.zeros((), bool)),
    )
    found = margins(climb.images)
    best = jnp.argmax(found)
    return found[best], jnp.clip(climb.images[best], 0, 1)


@functools.partial(
    jax.jit,
    static_argnames=("num_classes", "image_shape", "num_starts", "num_steps", "together"),
)
def _maximum_margins(
    key, logits_fn, learning_rate, tolerance, *,
    num_classes, image_shape, num_starts, num_steps, together,
):  # fmt: skip
    shape = (num_starts, *image_shape)
    return jax.lax.map(
        lambda label: _climb(key, logits_fn, label, shape, learning_rate, tolerance, num_steps),
        jnp.arange(num_classes),
        batch_size=together,
    )


def maximum_margins(
    key: Key,
    logits_fn: LogitsFn,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    num_starts: int = 30,
    num_steps: int = 300,
    learning_rate: ArrayLike = 1e-2,
    tolerance: ArrayLike = 1e-5,
    class_batch: int | None = None,
) -> tuple[Array, Array]:
    """The largest margin `z_c(x) - max_{k != c} z_k(x)` of each class over images x in the box.

    Gradient ascent from uniform images, with the images clipped before the classifier sees them
    (they are not projected, as in the authors' code). All starts of a class stop together, when
    the sum of their margins changes by less than `tolerance` of itself. The authors' momentum of
    0.2 has no effect, as their optimiser is made anew in each step; there is none here.

    Args:
      key: a key, for the starts.
      logits_fn: classifier, images to logits f32[b, k].
      num_classes: k, at least 3.
      image_shape: height, width and channels.
      num_starts: images that each class starts from.
      num_steps: steps of the ascent, at most.
      learning_rate: of the ascent on the sum over starts.
      tolerance: relative change at which a class stops.
      class_batch: classes that climb at once, to bound the memory; all if None.

    Returns:
      The margins f32[k], and the images that have them f32[k, h, w, c].

    Static: num_classes, image_shape, num_starts, num_steps, class_batch.

    Raises:
      ValueError: fewer than three classes, another number of classes than the classifier has, a
        count below 1.

    Source: H. Wang et al., "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
    Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024.
    """
    if len(image_shape) != 3:
        raise ValueError(f"mm_bd: need image_shape (h, w, c), got {tuple(image_shape)}.")
    inputs.classes("mm_bd", logits_fn, image_shape, num_classes)
    for name, value in (("num_starts", num_starts), ("num_steps", num_steps)):
        checks.at_least("mm_bd", name, value, 1)
    if class_batch is not None:
        checks.at_least("mm_bd", "class_batch", class_batch, 1)
    for name, value in (("learning_rate", learning_rate), ("tolerance", tolerance)):
        checks.non_negative("mm_bd", name, value)
    return _maximum_margins(
        random.as_typed(key), classifier.as_pytree(logits_fn), learning_rate, tolerance,
        num_classes=num_classes, image_shape=tuple(image_shape), num_starts=num_starts,
        num_steps=num_steps, together=class_batch or num_classes,
    )  # fmt: skip


def _log_gamma_survival(value: float, shape: float) -> float:
    """The log of the gamma distribution's survival function at scale 1, also where that is 0.

    SciPy's is the logarithm of a number that underflows; the continued fraction of the incomplete
    gamma function, evaluated from below, does not.
    """
    from scipy import special

    survival = special.gammaincc(shape, value)
    if survival > 1e-200:
        return float(np.log(survival))
    fraction = value + 401 - shape
    for i in range(200, 0, -1):
        fraction = value + 2 * i - 1 - shape - i * (i - shape) / fraction
    return float(shape * np.log(value) - value - special.gammaln(shape) - np.log(fraction))


def _log_survival(value: float, others: np.ndarray, null: str) -> float:
    """The log of P(X > value) under the null distribution fitted to the others."""
    from scipy import stats

    if null == "mad":
        median = np.median(others)
        scale = outliers.NORMAL * np.median(np.abs(others - median))
        resolution = np.finfo(np.float32).eps * max(np.max(np.abs(others)), 1)
        return float(stats.norm.logsf(value, median, max(scale, resolution)))
    if null != "gamma" and others.min() <= 0:
        raise ValueError(
            f"mm_bd: need positive margins for the null {null!r}, got {others.min():.3g}; "
            "the nulls 'gamma' and 'mad' take any."
        )
    if null == "exponential":
        return -value / float(np.mean(others))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            fitted = stats.gamma.fit(others, **({} if null == "gamma" else {"floc": 0}))
        except (stats.FitError, ValueError) as error:
            raise ValueError(
                f"mm_bd: no gamma distribution fits the margins {others.tolist()}; try null='mad'."
            ) from error
    shape, loc, scale = np.asarray(fitted, np.float64)
    return _log_gamma_survival(max((value - loc) / scale, 0.0), shape)


def log_p_value(margins: ArrayLike, null: str = "gamma") -> float:
    """The log of the chance that the largest of k margins is this large, if none is an outlier.

    `log(1 - F(r_max)^k)`, with the null distribution F fitted to all margins but the largest. It is
    computed from the log of the survival function, so that it goes on falling where the p-value
    itself is 0 in floating point. SciPy, on the host.

    Args:
      margins: one a class, f32[k].
      null: F, fitted by maximum likelihood: "gamma" with a free shape, location and scale (the
        authors' choice, unstable with few classes), "gamma_loc0" with location 0, "exponential"
        with location 0; or "mad", a normal distribution at the median of the others with their
        1.4826 MAD as its deviation.

    Returns:
      At most 0; lower is more anomalous.

    Raises:
      ValueError: an unknown null, fewer than three classes, margins that are not finite, or that
        are not positive where the null needs it.

    Example:
      >>> round(log_p_value([1.0, 2.0, 3.0, 12.0], "exponential"), 3)
      -4.617

    Source: H. Wang et al., "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
    Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024.
    """
    checks.known("mm_bd", "null", null, NULLS)
    margins = np.asarray(margins, np.float64)
    if margins.ndim != 1 or len(margins) < outliers.MIN_VALUES:
        raise ValueError(
            f"mm_bd: need one margin a class, of at least {outliers.MIN_VALUES} classes, got shape "
            f"{margins.shape}."
        )
    if not np.all(np.isfinite(margins)):
        raise ValueError(f"mm_bd: need finite margins, got {margins.tolist()}.")
    *others, largest = np.sort(margins)
    log_survival = _log_survival(largest, np.asarray(others), null)
    # 1 - (1 - s)^k is k s for small s, and there 1 - s rounds to 1.
    if log_survival < -30:
        return float(np.log(len(margins)) + log_survival)
    with np.errstate(divide="ignore"):  # s = 1: log1p gives -inf, and the p-value is 1
        return float(np.log(-np.expm1(len(margins) * np.log1p(-np.exp(log_survival)))))


def mm_bd(
    key: Key,
    logits_fn: LogitsFn,
    x: Array | None = None,
    y: Array | None = None,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int] | None = None,
    null: str = "gamma",
    num_starts: int = 30,
    num_steps: int = 300,
    learning_rate: ArrayLike = 1e-2,
    tolerance: ArrayLike = 1e-5,
    class_batch: int | None = None,
) -> Detection:
    """MM-BD: the class with the largest margin is the target, if the others do not explain it.

    A backdoor gives its target a margin that no image of the other classes has. Needs no data. The
    classifier takes images in [0, 1], so what normalises them is inside it, as in `advjax.models`.

    The ascent is one compiled program with the weights as arguments; the null distribution is
    fitted on the host, so this function itself is not for `jit`: `maximum_margins` is.

    Args:
      key: a key, for the starts.
      logits_fn: classifier, images to logits f32[b, k].
      x: images of which only the shape is used, [n, h, w, c]; None with `image_shape`.
      y: not used.
      num_classes: k, at least 3.
      image_shape: height, width and channels, in place of x.
      null: "gamma", "gamma_loc0", "exponential" or "mad", see `log_p_value`.
      num_starts: see `maximum_margins`.
      num_steps: see `maximum_margins`.
      learning_rate: see `maximum_margins`.
      tolerance: see `maximum_margins`.
      class_batch: see `maximum_margins`.

    Returns:
      A `Detection`: the score is minus the log of the p-value, which does not saturate; above
      `-log(0.05) = 3.0` the authors speak of a backdoor. The target is the class with the largest
      margin. Details: `margins` f32[k], `p_value`, `anomaly_index` of the largest margin, `images`
      f32[k, h, w, c], `num_images` 0.

    Static: all but key, logits_fn, learning_rate, tolerance.

    Raises:
      ValueError: neither x nor image_shape, what `maximum_margins` and `log_p_value` raise, or a
        call under `jit`.

    Source: H. Wang et al., "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
    Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024.
    """
    checks.known("mm_bd", "null", null, NULLS)
    if x is not None:
        checks.images("mm_bd", x)
        checks.four_axes("mm_bd", x)
        height, width, channels = x.shape[1:]
        image_shape = (height, width, channels)
    if image_shape is None:
        raise ValueError("mm_bd: need images x or their image_shape, got neither.")
    margins, images = maximum_margins(
        key, logits_fn, num_classes=num_classes, image_shape=image_shape, num_starts=num_starts,
        num_steps=num_steps, learning_rate=learning_rate, tolerance=tolerance,
        class_batch=class_batch,
    )  # fmt: skip
    if not checks.is_concrete(margins):
        raise ValueError(
            "mm_bd: the null distribution is fitted on the host, so call it outside of jit and "
            "vmap; maximum_margins runs inside."
        )
    log_p = log_p_value(np.asarray(margins), null)
    return Detection(
        jnp.asarray(-log_p),
        jnp.argmax(margins).astype(jnp.int32),
        {
            "margins": margins,
            "p_value": jnp.exp(log_p),
            "anomaly_index": jnp.max(outliers.anomaly_indices(-margins)),
            "images": images,
            "num_images": jnp.asarray(0, jnp.int32),
        },
    )
