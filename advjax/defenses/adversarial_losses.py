"""Adversarial training: losses on images that are attacked while the network learns.

The attack sees the network of this step in inference mode, and no gradient flows through it: the
images that it returns are data. It is called as it is, so it returns the best image that it looked
at, the clean one included, where the papers take the last one.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax import attacks, training
from advjax.core import balls, checks, classifier, losses, random
from advjax.core.balls import Ball
from advjax.core.typing import Array, Attack, Key, LogitsFn

ImageLoss = Callable[[Array, Array], Array]  # logits, labels -> f32[b]

_NOISE = 1e-3  # the deviation of the noise that TRADES starts from


def adversarial(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    epsilon: ArrayLike,
    attack: Attack = attacks.fgsm,
    alpha: ArrayLike = 0.5,
    warmup: ArrayLike = 0.0,
    predicted_labels: bool = False,
    image_loss: ImageLoss = losses.cross_entropy,
) -> Array:
    """Adversarial training: `alpha CE(x, y) + (1 - alpha) CE(x_adv, y)`.

    With FGSM and alpha = 0.5 it is that of Goodfellow et al.; with PGD and alpha = 0, where all
    images are adversarial, that of Madry et al.

    One-step attacks on the given label leak it: the network can learn to read the label off the
    perturbation, and then does better on attacked images than on clean ones. Both papers attack
    the given label, and so does this function unless it is told to attack the predicted one.

    From its first step under strong attacks a small network may stay at chance for long. With a
    warm-up, which Madry et al. do not have, the radius grows linearly from 0 to epsilon, where the
    training says how far it is (`training.share_done`).

    Args:
      key: for the attack.
      logits_fn: classifier in training mode.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius for the attack; scalar or [b].
      attack: of a fixed budget, configured by `functools.partial`.
      alpha: share of the clean loss, between 0 and 1.
      warmup: share of the training in which the radius grows, between 0 and 1.
      predicted_labels: attack the network's own answers in place of `y`, against leaking.
      image_loss: (logits, labels) -> f32[b], what a clean and an attacked image cost.

    Returns:
      f32[b].

    Static: attack, predicted_labels, image_loss.

    Raises:
      ValueError: an alpha or a warm-up outside [0, 1], a bad epsilon, or what the attack raises.

    Example:
      >>> import functools, jax
      >>> from advjax import attacks, data, models, training
      >>> attack = functools.partial(attacks.pgd, num_steps=2)
      >>> loss_fn = functools.partial(adversarial, epsilon=0.1, alpha=0.0, attack=attack)
      >>> fitted = training.fit(
      ...     jax.random.key(0), models.make("mlp", 10, hidden=(8,)),
      ...     data.load("digits", "train").take(64), loss_fn=loss_fn, num_epochs=1, progress=False)
      >>> fitted.loss.shape
      (1,)

    Source: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples",
    ICLR 2015; A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018; on leaking A. Kurakin, I. Goodfellow, S. Bengio, "Adversarial Machine Learning at
    Scale", ICLR 2017.
    """
    _check_share("adversarial", alpha)
    _check_share("adversarial", warmup, name="warmup")
    checks.epsilon("adversarial", epsilon, x)  # below it is traced
    done, warmup = training.share_done(logits_fn), jnp.asarray(warmup, x.dtype)
    is_growing = done < warmup
    epsilon = jnp.where(is_growing, done / jnp.where(is_growing, warmup, 1), 1) * epsilon
    source = training.inference(logits_fn)
    attacked = _answers(source, x) if predicted_labels else y
    x_adv = attack(key, source, x, attacked, epsilon)
    return _mixed(logits_fn, x, x_adv, y, alpha, image_loss)


def least_likely(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    epsilon: ArrayLike,
    alpha: ArrayLike = 1 / 1.3,
    random_epsilon: bool = True,
    image_loss: ImageLoss = losses.cross_entropy,
) -> Array:
    """Adversarial training on step l.l., which goes towards the least likely class.

    The target does not depend on the label (but for being another class), so it does not leak it.
    Each image has its own radius, drawn from a normal distribution of mean 0 and deviation
    `epsilon / 2` that is cut off at 0 and epsilon: the network also sees small perturbations.

    In the paper a batch is half clean and half adversarial and the adversarial loss has the weight
    0.3; here every image counts in both forms, which with `alpha = 1 / (1 + 0.3)` is the same in
    the mean.

    Args:
      key: for the radii.
      logits_fn: classifier in training mode.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: the largest radius; scalar or [b].
      alpha: share of the clean loss, between 0 and 1.
      random_epsilon: draw the radii; otherwise all are epsilon.
      image_loss: (logits, labels) -> f32[b], what a clean and an attacked image cost.

    Returns:
      f32[b].

    Static: random_epsilon, image_loss.

    Raises:
      ValueError: an alpha outside [0, 1], a bad epsilon.

    Source: A. Kurakin, I. Goodfellow, S. Bengio, "Adversarial Machine Learning at Scale",
    ICLR 2017.
    """
    _check_share("least_likely", alpha)
    checks.images("least_likely", x)
    checks.epsilon("least_likely", epsilon, x)
    if random_epsilon:
        keys = random.example_keys(key, x.shape[0])
        # Of a normal distribution in units of epsilon / 2, cut off at two deviations.
        drawn = jax.vmap(lambda key: jax.random.truncated_normal(key, 0.0, 2.0, dtype=x.dtype))
        epsilon = jnp.asarray(epsilon, x.dtype) * drawn(keys) / 2
    x_adv = attacks.least_likely(key, training.inference(logits_fn), x, y, epsilon)
    return _mixed(logits_fn, x, x_adv, y, alpha, image_loss)


def ensemble_adversarial(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    epsilon: ArrayLike,
    sources: Sequence[LogitsFn] | LogitsFn,
    attack: Attack = attacks.fgsm,
    alpha: ArrayLike = 0.5,
    image_loss: ImageLoss = losses.cross_entropy,
) -> Array:
    """Ensemble adversarial training: images attacked on other networks, which do not change.

    Each batch draws one source, uniformly from the static networks and the one that is trained, and
    attacks the source's own answers, which do not leak the label. The loss is that of
    `adversarial`. Images of other networks cannot be made harmless by hiding the own gradient.

    Args:
      key: for the source and the attack.
      logits_fn: classifier in training mode.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius for the attack; scalar or [b].
      sources: the static networks, trained before: classifiers of any architectures, or a stack of
        one (`advjax.stack`).
      attack: of a fixed budget.
      alpha: share of the clean loss, between 0 and 1.
      image_loss: (logits, labels) -> f32[b], what a clean and an attacked image cost.

    Returns:
      f32[b].

    Static: attack, image_loss.

    Raises:
      ValueError: no sources, an alpha outside [0, 1], or what the attack raises.

    Source: F. Tramer et al., "Ensemble Adversarial Training: Attacks and Defenses", ICLR 2018.
    """
    _check_share("ensemble_adversarial", alpha)
    key_source, key_attack = jax.random.split(random.as_typed(key))
    source = _drawn(key_source, sources, training.inference(logits_fn))
    x_adv = attack(key_attack, source, x, _answers(source, x), epsilon)
    return _mixed(logits_fn, x, x_adv, y, alpha, image_loss)


def trades(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    epsilon: ArrayLike,
    beta: ArrayLike = 6.0,
    num_steps: int = 10,
    step_size: ArrayLike | None = None,
    ball: Ball = balls.linf,
) -> Array:
    """TRADES: `CE(x, y) + beta KL(p(x) || p(x_adv))`, where x_adv makes the divergence large.

    The attack starts at the image with a little Gaussian noise (at the image itself the divergence
    is zero, and so is its gradient), and its last image is taken, as published. The loss is
    differentiated in both distributions.

    Args:
      key: for the noise.
      logits_fn: classifier in training mode.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius of the ball; scalar or [b].
      beta: weight of the divergence; the paper's 1 / lambda, which is 6 for CIFAR-10 and 1 for
        MNIST in the authors' programs.
      num_steps: steps of the attack.
      step_size: their length in the norm of the ball, by default `2.5 epsilon / num_steps`.
      ball: `balls.linf` or `balls.l2`; in l2 a step is along the normalised gradient, without the
        momentum that the authors' programs have.

    Returns:
      f32[b].

    Static: num_steps, ball.

    Raises:
      ValueError: a negative beta, a bad epsilon or step, images that are not floats in [0, 1].

    Source: H. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy",
    ICML 2019.
    """
    source = training.inference(logits_fn)
    balls.check("trades", ball)
    x, y = checks.attack_inputs("trades", source, x, y, epsilon)
    checks.at_least("trades", "num_steps", num_steps, 1)
    if checks.is_concrete(beta) and not np.all(np.asarray(beta) >= 0):
        raise ValueError(f"trades: need beta >= 0, got beta={beta}.")
    if step_size is None:
        step_size = jnp.asarray(epsilon) * (2.5 / num_steps)
    else:
        checks.non_negative("trades", "step_size", step_size)
    keys = random.example_keys(key, x.shape[0])
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    clean = source(x)

    def climb(_, x_adv: Array) -> Array:
        gradient = jax.grad(lambda images: jnp.sum(_divergence(clean, source(images))))(x_adv)
        step = balls.per_example(step_size, x) * ball.direction(gradient, x_adv)
        return ball.project(x_adv + step, x, epsilon)

    start = ball.project(x + _NOISE * noise, x, epsilon)
    x_adv = jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, climb, start))
    logits = logits_fn(x)
    return losses.cross_entropy(logits, y) + beta * _divergence(logits, logits_fn(x_adv))


def _mixed(
    logits_fn: LogitsFn, x: Array, x_adv: Array, y: Array, alpha: ArrayLike, image_loss: ImageLoss
) -> Array:
    # The adversarial images last: training reports the accuracy on them.
    clean = image_loss(logits_fn(x), y)
    attacked = image_loss(logits_fn(jax.lax.stop_gradient(x_adv)), y)
    return alpha * clean + (1 - alpha) * attacked


def _divergence(logits: Array, other_logits: Array) -> Array:
    """KL divergence of the second softmax from the first, f32[b]."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _answers(logits_fn: LogitsFn, x: Array) -> Array:
    return jnp.argmax(logits_fn(x), axis=-1).astype(jnp.int32)


def _drawn(key: Key, sources: Sequence[LogitsFn] | LogitsFn, current: LogitsFn) -> LogitsFn:
    """One of the sources or the current network, as one classifier."""
    if callable(sources):
        num_sources = classifier.stack_size(sources)
        if not num_sources:
            raise ValueError(
                "ensemble_adversarial: need sources as a list of classifiers or as a stack of them "
                "(advjax.stack), got one classifier."
            )
        number = jax.random.randint(key, (), 0, num_sources + 1)
        member = jax.tree.map(lambda leaf: leaf[jnp.minimum(number, num_sources - 1)], sources)
        return lambda x: jax.lax.cond(number < num_sources, member, current, x)
    if not sources:
        raise ValueError("ensemble_adversarial: need at least one classifier in sources, got none.")
    number = jax.random.randint(key, (), 0, len(sources) + 1)
    return lambda x: jax.lax.switch(number, (*sources, current), x)


def _check_share(caller: str, value: ArrayLike, name: str = "alpha") -> None:
    if checks.is_concrete(value) and not np.all(
        (np.asarray(value) >= 0) & (np.asarray(value) <= 1)
    ):
        raise ValueError(f"{caller}: need 0 <= {name} <= 1, got {name}={value}.")
