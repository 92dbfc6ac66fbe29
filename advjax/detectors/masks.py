"""Neural Cleanse: a class that a small mask leads to from everywhere."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from advjax.core import checks, classifier, losses, metrics, random
from advjax.core.typing import Array, Key, LogitsFn
from advjax.detectors import inputs, outliers
from advjax.detectors.detections import Detection


class _Controls(NamedTuple):
    """Numbers that a sweep may vary: traced, so that none of them recompiles."""

    learning_rate: ArrayLike
    initial_weight: ArrayLike
    multiplier: ArrayLike
    patience: ArrayLike
    success_threshold: ArrayLike
    stall_ratio: ArrayLike
    stall_patience: ArrayLike


class _Trigger(NamedTuple):
    """A mask f32[h, w] and a pattern f32[h, w, c]; before `_squash`, any real numbers."""

    mask: Array
    pattern: Array


class _Search(NamedTuple):
    """The search for one class's mask, between two rounds."""

    round: Array
    raw: _Trigger
    opt_state: Any
    weight: Array  # of the mask's norm in the loss
    num_above: Array  # rounds in a row with enough success
    num_below: Array
    was_raised: Array  # the weight, since it was set
    was_lowered: Array
    best: _Trigger
    best_norm: Array  # infinite while no mask had enough success
    num_stalled: Array  # rounds in a row in which the best norm did not fall
    is_done: Array


def _squash(raw: _Trigger) -> _Trigger:
    return _Trigger(*(jnp.tanh(value) / 2 + 0.5 for value in raw))


def _stamp(trigger: _Trigger, x: Array) -> Array:
    mask = trigger.mask[..., None]
    return (1 - mask) * x + mask * trigger.pattern


def _next_weight(search: _Search, success: Array, controls: _Controls) -> _Search:
    """The cost controller: heavier after enough rounds of success, lighter after as many without.

    The weight is 0 until the success has held for the first time.
    """
    is_above = success >= controls.success_threshold
    num_above = jnp.where(is_above, search.num_above + 1, 0)
    num_below = jnp.where(is_above, 0, search.num_below + 1)
    is_set = (search.weight == 0) & (num_above >= controls.patience)
    weight = jnp.where(is_set, controls.initial_weight, search.weight)
    num_above = jnp.where(is_set, 1, num_above)
    is_raised, is_lowered = num_above >= controls.patience, num_below >= controls.patience
    weight = jnp.where(is_raised, weight * controls.multiplier, weight)
    weight = jnp.where(is_lowered, weight / controls.multiplier**1.5, weight)
    return search._replace(
        weight=weight,
        num_above=jnp.where(is_raised, 0, num_above),
        num_below=jnp.where(is_lowered, 0, num_below),
        was_raised=(search.was_raised & ~is_set) | is_raised,
        was_lowered=(search.was_lowered & ~is_set) | is_lowered,
    )


def _keep_best(search: _Search, success: Array, controls: _Controls) -> _Search:
    """Keeps the least mask with enough success; done when it no longer falls."""
    trigger = _squash(search.raw)
    norm = jnp.sum(trigger.mask)
    is_better = (success >= controls.success_threshold) & (norm < search.best_norm)
    best_norm = jnp.where(is_better, norm, search.best_norm)
    is_stalled = best_norm >= controls.stall_ratio * search.best_norm
    num_stalled = jnp.where(is_stalled, search.num_stalled + 1, 0)
    num_stalled = jnp.where(jnp.isfinite(best_norm), num_stalled, 0)
    return search._replace(
        best=jax.tree.map(lambda new, old: jnp.where(is_better, new, old), trigger, search.best),
        best_norm=best_norm,
        num_stalled=num_stalled,
        is_done=search.was_raised & search.was_lowered & (num_stalled >= controls.stall_patience),
    )


def _reverse_one(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    label: Array,
    controls: _Controls,
    num_steps: int,
    batch_size: int,
) -> _Search:
    """The search for the mask of one class."""
    optimizer = optax.adam(jnp.asarray(controls.learning_rate), b1=0.5, b2=0.9)
    batches_per_round = len(x) // batch_size
    labels = jnp.full(batch_size, label)

    def loss(raw, images, weight):
        trigger = _squash(raw)
        logits = logits_fn(_stamp(trigger, images))
        wrong = jnp.mean(losses.cross_entropy(logits, labels))
        return wrong + weight * jnp.sum(trigger.mask), jnp.mean(metrics.is_correct(logits, labels))

    def one_round(search: _Search) -> _Search:
        key_round = jax.random.fold_in(random.named(key, "order"), search.round)
        order = jax.random.permutation(key_round, len(x))[: batches_per_round * batch_size]

        def step(carry, rows):
            raw, opt_state = carry
            gradient, success = jax.grad(loss, has_aux=True)(raw, x[rows], search.weight)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(raw, updates), opt_state), success

        (raw, opt_state), successes = jax.lax.scan(
            step, (search.raw, search.opt_state), order.reshape(batches_per_round, batch_size)
        )
        success = jnp.mean(successes)
        search = search._replace(round=search.round + 1, raw=raw, opt_state=opt_state)
        return _next_weight(_keep_best(search, success, controls), success, controls)

    key_start = jax.random.fold_in(random.named(key, "start"), label)
    key_mask, key_pattern = jax.random.split(key_start)
    uniform = functools.partial(jax.random.uniform, minval=1e-4, maxval=1 - 1e-4)
    start = _Trigger(uniform(key_mask, x.shape[1:3]), uniform(key_pattern, x.shape[1:]))
    raw = _Trigger(*(jnp.arctanh(2 * value - 1) for value in start))
    weight, none, no = jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return jax.lax.while_loop(
        lambda search: (search.round < num_steps) & ~search.is_done,
        one_round,
        _Search(
            none, raw, optimizer.init(raw), weight, none, none, no, no,
            start, jnp.asarray(jnp.inf), none, no,
        ),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("num_classes", "num_steps", "batch_size", "together"))
def _reverse(key, logits_fn, x, controls, *, num_classes, num_steps, batch_size, together):
    """The masks of all classes and what they say, all arrays."""
    labels = jnp.arange(num_classes)
    found = jax.lax.map(
        lambda label: _reverse_one(key, logits_fn, x, label, controls, num_steps, batch_size),
        labels,
        batch_size=together,
    )
    is_found = jnp.isfinite(found.best_norm)
    kept = jax.tree.map(
        lambda best, last: jax.vmap(jnp.where)(is_found, best, last), found.best, _squash(found.raw)
    )

    def judged(each):
        logits = logits_fn(_stamp(each[0], x))
        return jnp.mean(metrics.is_correct(logits, each[1])), jnp.all(jnp.isfinite(logits))

    success, is_finite = jax.lax.map(judged, (kept, labels))
    norms = jnp.where(is_found, found.best_norm, x.shape[1] * x.shape[2])
    indices = outliers.anomaly_indices(norms, is_found)
    answers = jnp.all(is_finite)
    names_one = answers & (jnp.sum(is_found) >= outliers.MIN_VALUES)
    least = jnp.argmin(jnp.where(is_found, norms, jnp.inf))
    return Detection(
        jnp.where(answers, jnp.max(indices), jnp.nan),
        jnp.where(names_one, least, -1).astype(jnp.int32),
        {
            "norms": norms,
            "anomaly_indices": indices,
            "masks": kept.mask,
            "patterns": kept.pattern,
            "success": success,
            "is_found": is_found,
            "num_rounds": found.round,
            "num_images": jnp.asarray(len(x), jnp.int32),
        },
    )


def neural_cleanse(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array | None = None,
    *,
    num_classes: int,
    num_steps: int = 1000,
    batch_size: int = 32,
    learning_rate: ArrayLike = 0.1,
    initial_weight: ArrayLike = 1e-3,
    multiplier: ArrayLike = 2.0,
    patience: ArrayLike = 5,
    success_threshold: ArrayLike = 0.99,
    stall_ratio: ArrayLike = 1.0,
    stall_patience: ArrayLike = 25,
    class_batch: int | None = None,
) -> Detection:
    """Neural Cleanse: the class that the smallest mask leads to is the target, if it is an outlier.

    For each class c Adam (0.5, 0.9) minimises `mean CE(f((1 - m) x + m p), c) + weight ||m||_1`
    over a mask m (one for all channels) and a pattern p, both `tanh(.) / 2 + 1 / 2`. After a round
    over the images the weight, 0 at first, is set or multiplied where the attack has had enough
    success `patience` rounds in a row, and divided by `multiplier**1.5` where it has not. A class
    ends when its best norm has stalled and the weight has been both raised and lowered.

    The defaults are those of the authors' example on GTSRB. BackdoorBench starts with the weight
    1e-3, not 0, and all masks at 0.88, asks for a success of 0.98 and counts a fall of less than
    1 % as none; ART has a multiplier of 1.5, stops after 10 such rounds and takes the L2 norm.

    A class whose attack never has enough success does not count: median and deviation are those of
    the classes that were found, so that it is never the outlier nor makes one of another class. The
    authors' code takes its last mask.

    The whole search is one compiled program, and weights are arguments of it: many models of one
    architecture, one after the other, compile once. It also runs under `jit` and `vmap`.

    Args:
      key: a key, for the starts and the order of the images.
      logits_fn: classifier, images to logits f32[b, k].
      x: clean images, f32[n, h, w, c] in [0, 1]; the authors use as many as they have.
      y: not used; images of the class itself count as successes, as in the authors' code.
      num_classes: k, at least 3.
      num_steps: rounds over the images, at most.
      batch_size: images a step of Adam; at most n is used.
      learning_rate: of Adam.
      initial_weight: of the norm, once the success has held.
      multiplier: of the weight, above 1.
      patience: rounds in a row before the weight changes.
      success_threshold: share of the stamped images that must reach the class, over a round.
      stall_ratio: the norm counts as fallen if it is below this times the best one.
      stall_patience: rounds in a row without a fall before a class ends.
      class_batch: classes that are searched at once, to bound the memory; all if None.

    Returns:
      A `Detection`: the score is the anomaly index of the least norm, `(median - min) /
      (1.4826 MAD)` over the classes that were found, never negative; above 2 is an outlier. The
      target is the class with the least norm. If fewer than three were found, the score is 0 and
      the target -1; if a logit on a stamped image is not finite, they are NaN and -1. Details:
      `norms` f32[k], h * w for a class that was not found, `anomaly_indices` f32[k], 0 for such a
      class, `masks` f32[k, h, w], `patterns` f32[k, h, w, c], `success` f32[k] of these masks on
      all of x, `is_found` bool[k], `num_rounds` int32[k], `num_images`.

    Static: num_classes, num_steps, batch_size, class_batch.

    Raises:
      ValueError: images that are not floats in [0, 1], fewer than three classes, another number of
        classes than the classifier has, a count below 1, a multiplier that is not above 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def logits_fn(x):  # one bright pixel is enough for class 1, the others need many
      ...     return x.reshape(len(x), -1) @ (jnp.eye(9, 3) + jnp.zeros((9, 3)).at[8, 1].set(20))
      >>> x = jax.random.uniform(jax.random.key(0), (32, 3, 3, 1)).at[:, 2, 2].set(0)
      >>> found = neural_cleanse(jax.random.key(1), logits_fn, x, num_classes=3, num_steps=50)
      >>> int(found.target_label)
      1

    Source: B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
    Networks", IEEE S&P 2019.
    """
    x = inputs.clean_images("neural_cleanse", logits_fn, x, y, num_classes)
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        checks.at_least("neural_cleanse", name, value, 1)
    if class_batch is not None:
        checks.at_least("neural_cleanse", "class_batch", class_batch, 1)
    if checks.is_concrete(multiplier) and not np.all(np.asarray(multiplier) > 1):
        raise ValueError(f"neural_cleanse: need multiplier > 1, got multiplier={multiplier}.")
    controls = _Controls(
        learning_rate, initial_weight, multiplier, patience, success_threshold, stall_ratio,
        stall_patience,
    )  # fmt: skip
    for name, value in controls._asdict().items():
        checks.non_negative("neural_cleanse", name, value)
    return _reverse(
        random.as_typed(key), classifier.as_pytree(logits_fn), x, controls,
        num_classes=num_classes, num_steps=num_steps, batch_size=min(batch_size, len(x)),
        together=class_batch or num_classes,
    )  # fmt: skip
