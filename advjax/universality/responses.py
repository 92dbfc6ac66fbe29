"""What one step does to the logits to first order, and the error that follows from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core import checks, losses, metrics
from advjax.core.typing import Array, AttackLoss, LogitsFn

# On a flat background max-pooling is at a tie, and ReLUs of zero biases at their kink: there the
# derivative is one of several. Just off the image it is that of the way the attack goes.
_OFFSET = 1e-5
_NUM_BRACKETS = 24  # of the epsilon, each twice the one before; the smallest is 1e-7 of the largest
_NUM_HALVINGS = 12  # each halves what is left: 1/4096 of a bracket in the end


class LinearResponse(NamedTuple):
    """The logits along the attack's direction, to first order and as they are.

    Attributes:
      logits: h(x), f32[b, k].
      direction: the direction of the attack, f32[b, h, w, c], see `linear_response`.
      gamma: change of the logits per epsilon, f32[b, k]: `h(x_adv) = h(x) + epsilon gamma`.
      predicted: the epsilon at which the answer changes to first order, f32[b]; infinite where it
        does not.
      measured: the epsilon at which it does change, f32[b]; infinite where it does not.

    Where the network has no answer (a logit is not finite), `predicted` and `measured` are NaN.
    """

    logits: Array
    direction: Array
    gamma: Array
    predicted: Array
    measured: Array


def linear_response(
    logits_fn: LogitsFn,
    x: Array,
    y: Array | None = None,
    *,
    max_epsilon: ArrayLike = 1.0,
    loss_fn: AttackLoss = losses.cross_entropy,
) -> LinearResponse:
    """First-order response of the logits to the fast gradient sign method, and the real one.

    `h(x + epsilon d) = h(x) + epsilon Gamma`, `Gamma = J d`, with `d = sign(grad loss(x, y))`. The
    answer 1 changes where another logit overtakes it,
    `epsilon_hat = min_j Delta_1j / (Gamma_j - Gamma_1)` over the j that gain on it.

    The real epsilon is the smallest of 24 epsilons, each twice the one before, at which the answer
    to `clip(x + epsilon d)` differs, refined by bisection. `d` is 0 for pixels at an end of the box
    that would leave it: the clipping does that to them at every epsilon.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; the network's own answers if None.
      max_epsilon: where the search ends.
      loss_fn: logits and labels to f32[b].

    Returns:
      A `LinearResponse`.

    Static: loss_fn.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes.

    Example:
      >>> import jax.numpy as jnp
      >>> logits_fn = lambda x: (x[:, 0, 0] - 0.4) * jnp.array([1.0, -1.0])
      >>> response = linear_response(logits_fn, jnp.full((1, 1, 1, 1), 0.5))
      >>> print(f"{response.predicted[0]:.4f} {response.measured[0]:.4f}")
      0.1000 0.1000

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017.
    """
    checks.images("linear_response", x)
    checks.four_axes("linear_response", x)
    x = jnp.clip(jnp.asarray(x), 0, 1)
    if y is not None:
        y = jnp.asarray(y)
        checks.labels("linear_response", y, x, logits_fn)
    with jax.default_matmul_precision("highest"):
        return _response(logits_fn, x, y, max_epsilon, loss_fn)


def _response(logits_fn, x, y, max_epsilon, loss_fn) -> LinearResponse:
    logits = logits_fn(x)
    answers = metrics.predictions(logits)
    has_answer = answers >= 0
    answers = jnp.maximum(answers, 0)
    y = answers if y is None else y
    gradient = jax.grad(lambda images: jnp.sum(loss_fn(logits_fn(images), y)))(x)
    direction = jnp.sign(gradient)
    leaves_box = ((x <= 0) & (direction < 0)) | ((x >= 1) & (direction > 0))
    direction = jnp.where(leaves_box, 0, direction)
    _, gamma = jax.jvp(logits_fn, (x + _OFFSET * direction,), (direction,))

    def of_answer(values: Array) -> Array:
        return jnp.take_along_axis(values, answers[:, None], axis=1)

    gains = gamma - of_answer(gamma)
    crossings = (of_answer(logits) - logits) / jnp.where(gains > 0, gains, 1)
    predicted = jnp.min(jnp.where(gains > 0, crossings, jnp.inf), axis=1)

    def is_changed(epsilon: Array) -> Array:
        steps = epsilon.reshape(-1, 1, 1, 1) * direction
        return metrics.has_changed(
            answers, metrics.predictions(logits_fn(jnp.clip(x + steps, 0, 1)))
        )

    # Built from the logits, so that under `shard_map` it varies over the devices as they do.
    zeros = predicted * 0
    zeros = jnp.where(jnp.isnan(zeros), 0, zeros)
    brackets = max_epsilon * 2.0 ** jnp.arange(1 - _NUM_BRACKETS, 1)
    changed = jax.lax.map(lambda epsilon: is_changed(zeros + epsilon), brackets)
    first = jnp.argmax(changed, axis=0)
    low = jnp.where(first > 0, brackets[first - 1], 0)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        hit = is_changed(middle)
        return jnp.where(hit, low, middle), jnp.where(hit, middle, high)

    _, measured = jax.lax.fori_loop(0, _NUM_HALVINGS, halve, (zeros + low, zeros + brackets[first]))
    measured = jnp.where(jnp.any(changed, axis=0), measured, jnp.inf)
    predicted, measured = (jnp.where(has_answer, value, jnp.nan) for value in (predicted, measured))
    return LinearResponse(logits, direction, gamma, predicted, measured)


def explained_variance(response: LinearResponse, limit: ArrayLike) -> Array:
    """Share of the variance of the measured epsilon that the first-order one explains, f32[].

    `1 - sum (epsilon - epsilon_hat)^2 / sum (epsilon - mean)^2` over the images whose measured
    epsilon is at most `limit`; an epsilon_hat beyond twice the limit counts as that.

    Args:
      response: what `linear_response` returned.
      limit: what a small epsilon is.
    """
    counts = response.measured <= limit
    measured = jnp.where(counts, response.measured, 0)
    residuals = jnp.where(counts, jnp.minimum(response.predicted, 2 * limit) - measured, 0)
    mean = jnp.sum(measured) / jnp.sum(counts)
    deviations = jnp.where(counts, measured - mean, 0)
    return 1 - jnp.sum(residuals**2) / jnp.sum(deviations**2)


class MeanField(NamedTuple):
    """The error of a network whose every image responds alike.

    Attributes:
      gamma: the mean over images of Gamma_2 - Gamma_1, f32[].
      error: the share of images with Delta_12 < epsilon gamma, f32[e].
      linear_error: the share of images with epsilon_hat <= epsilon, f32[e]: each its own Gamma.
      measured_error: the share of images whose answer has changed, f32[e].
    """

    gamma: Array
    error: Array
    linear_error: Array
    measured_error: Array


def mean_field(response: LinearResponse, epsilons: ArrayLike) -> MeanField:
    """The mean-field theory of the adversarial error: one Gamma for all images.

    `error(epsilon) = P(Delta_12 < epsilon <Gamma_2 - Gamma_1>)`, where 2 is the runner-up of the
    clean image. With a density of Delta_12 that is finite at zero the error is linear in epsilon:
    the power law's exponent 1.

    Args:
      response: what `linear_response` returned.
      epsilons: f32[e]; one is a list of one.

    Returns:
      A `MeanField`.

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017. That Gamma is averaged as it is, with its sign, is our reading.
    """
    epsilons = jnp.atleast_1d(jnp.asarray(epsilons, response.logits.dtype))[:, None]
    values, classes = jax.lax.top_k(response.logits, 2)
    gammas = jnp.take_along_axis(response.gamma, classes, axis=1)
    gamma = jnp.mean(gammas[:, 1] - gammas[:, 0])
    return MeanField(
        gamma,
        jnp.mean(values[:, 0] - values[:, 1] < epsilons * gamma, axis=1),
        jnp.mean(response.predicted <= epsilons, axis=1),
        jnp.mean(response.measured <= epsilons, axis=1),
    )
