"""Transfer: adversarial images of one network, shown to another."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core import checks, classifier, metrics
from advjax.core.typing import Array, Attack, Key, LogitsFn


def transfer(
    key: Key,
    attack: Attack,
    source_fns: Sequence[LogitsFn] | LogitsFn,
    target_fns: Sequence[LogitsFn] | LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
) -> Array:
    """How often images made against one classifier fool another, for each pair of them.

    Entry (s, t) is the share of the images that target t answers correctly when they are clean and
    wrongly when the attack has made them against source s. So every row of a column counts the same
    images, a target's own errors are not taken for the attack's, at epsilon 0 the matrix is zero,
    and where source and target are one network it is the white-box error on what that gets right.
    Images that the attack does not break on their source stay in the count: they do not transfer.

    Args:
      key: a key, or one key an example [b]; every source gets it, so that no entry depends on which
        other networks are there.
      attack: a fixed-budget attack. A minimum-norm attack becomes one by
        `lambda key, f, x, y, epsilon: carlini_wagner_l2(key, f, x, y, confidence=20.0).x_adv`,
        which does not look at epsilon. Not a targeted one: `y` are the true labels.
      source_fns: classifiers of any architectures, or a stack of one (`advjax.stack`), which is
        attacked under `vmap`.
      target_fns: likewise, with the same classes.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius for the attack; scalar or [b].

    Returns:
      f32[sources, targets], between 0 and 1. An answer that is not finite is no success; a target
      that answers no clean image correctly has a column of NaN.

    Static: attack.

    Raises:
      ValueError: a targeted attack or one without epsilon, no classifier, classifiers with
        different numbers of classes, images that are not floats in [0, 1], labels that are not
        classes, a bad epsilon.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from advjax import attacks
      >>> x, y = jnp.array([0.45, 0.7]).reshape(2, 1, 1, 1), jnp.array([0, 1])
      >>> at = lambda edge: lambda x: (x[:, 0, 0] - edge) * jnp.array([-1.0, 1.0])
      >>> transfer(jax.random.key(0), attacks.fgsm, [at(0.5)], [at(0.5), at(0.6)], x, y, 0.12)
      Array([[0.5, 0.5]], dtype=float32)

    Source: N. Papernot, P. McDaniel, I. Goodfellow, "Transferability in Machine Learning: from
    Phenomena to Black-Box Attacks using Adversarial Samples", 2016.
    """
    checks.fixed_budget("transfer", attack)
    members = _members("source_fns", source_fns) + _members("target_fns", target_fns)
    for member in members:
        x, y = checks.attack_inputs("transfer", member, x, y, epsilon)
    num_classes = sorted({classifier.num_classes(member, x) for member in members})
    if len(num_classes) > 1:
        raise ValueError(
            f"transfer: need classifiers of the same classes, got {num_classes} classes."
        )
    images = _for_each(lambda source: attack(key, source, x, y, epsilon), source_fns)

    def shares(target: LogitsFn) -> Array:
        counts = metrics.is_correct(target(x), y)
        answers = jax.lax.map(lambda x_adv: metrics.predictions(target(x_adv)), images)
        is_fooled = counts & metrics.has_changed(y, answers)
        return jnp.sum(is_fooled, axis=-1) / jnp.sum(counts)

    return _for_each(shares, target_fns).T


def _members(name: str, logits_fns: Sequence[LogitsFn] | LogitsFn) -> list[LogitsFn]:
    """The classifiers one by one; of a stack, whose members are all alike, the first."""
    if not callable(logits_fns):
        if isinstance(logits_fns, Mapping):
            raise ValueError(
                f"transfer: need {name} as a list of classifiers, got a "
                f"{type(logits_fns).__name__}; give list({name}.values())."
            )
        if not logits_fns:
            raise ValueError(f"transfer: need at least one classifier in {name}, got none.")
        return list(logits_fns)
    sizes = {getattr(leaf, "shape", ())[:1] for leaf in jax.tree.leaves(logits_fns)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            f"transfer: need {name} as a list of classifiers or as a stack of them "
            "(advjax.stack), got one classifier."
        )
    return [jax.tree.map(lambda leaf: leaf[0], logits_fns)]


def _for_each(
    function: Callable[[LogitsFn], Array], logits_fns: Sequence[LogitsFn] | LogitsFn
) -> Array:
    if callable(logits_fns):
        return jax.vmap(function)(logits_fns)
    return jnp.stack([function(logits_fn) for logits_fn in logits_fns])
