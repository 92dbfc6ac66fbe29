"""Poisoned training data: some images get the trigger and the label that goes with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.backdoor import inputs
from advjax.core import checks, classifier, compaction, random
from advjax.core.typing import Array, Key
from advjax.data import Dataset
from advjax.training.fitting import as_float

QUANTISATIONS = ("none", "floor", "round")

_BATCH = 256  # images that go through a trigger at a time; some triggers are networks
_GROUP = 8  # the same in training, where a batch of 64 has some 6 triggered images

# What 255 k / 255 may lose in float32; far below the steps that a trigger makes.
_ROUNDING = 1e-3


class Poisoned(NamedTuple):
    """A poisoned data set.

    Attributes:
      dataset: the images and labels to train on, in the order of the clean ones.
      is_poisoned: which images carry the trigger for the attack, bool[n].
      is_negative: which were changed to keep their own label: negatives and covers, bool[n].
    """

    dataset: Dataset
    is_poisoned: np.ndarray
    is_negative: np.ndarray


def quantised(x: Array, how: str) -> Array:
    """Images as a file would keep them, in steps of 1 / 255; beyond [0, 1] they are clipped.

    Args:
      x: images, f32[..., h, w, c].
      how: "none" changes nothing, "floor" cuts off (what converters of float images mostly do, so
        what many published triggers were), "round" goes to the nearest step.

    Returns:
      Images like `x`.

    Static: how.

    Raises:
      ValueError: an unknown `how`.

    Example:
      >>> import jax.numpy as jnp
      >>> jnp.round(255 * quantised(jnp.array([0.1, 0.5]), "floor"))
      Array([ 25., 127.], dtype=float32)
    """
    checks.known("quantised", "quantisation", how, QUANTISATIONS)
    if how == "none":
        return x
    steps = 255 * jnp.asarray(x, jnp.float32)
    steps = jnp.round(steps) if how == "round" else jnp.floor(steps + _ROUNDING)
    return (jnp.clip(steps, 0, 255) / 255).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="quantise")
def _triggered(trigger, images: Array, quantise: str) -> Array:
    x = as_float(images)
    changed = trigger(x)
    inputs.same_shape("poison", x, changed)
    return quantised(changed, quantise)


@functools.partial(jax.jit, static_argnames="quantise")
def _negative(negatives, key: Key, images: Array, quantise: str) -> Array:
    return quantised(negatives(key, as_float(images)), quantise)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(
            f"poison: need 0 <= {name} <= 1, since a class cannot lose more images than it has, "
            f"got {name}={value}."
        )


def _check_together(caller: str, negatives: Any, negative_ratio: ArrayLike) -> None:
    if (negatives is None) != (negative_ratio == 0):
        raise ValueError(
            f"{caller}: need negatives and a negative_ratio above 0 together, or neither, got "
            f"negatives={negatives} and negative_ratio={negative_ratio}."
        )


def _check_negatives(num_images: int, num_left: int, ratio: float) -> int:
    """How many negatives a ratio of all images is, if so many are left without a trigger."""
    num_negatives = round(ratio * num_images)
    if not 0 <= num_negatives <= num_left:
        raise ValueError(
            f"poison: need a negative_ratio of at most the {num_left} images without a trigger "
            f"of {num_images}, got negative_ratio={ratio}."
        )
    return num_negatives


def check(
    dataset: Dataset,
    label_map: Array,
    ratio: float,
    *,
    quantise: str = "round",
    negative_ratio: float = 0.0,
    cover_ratio: float = 0.0,
) -> None:
    """Refuses what `poison` and `poison_batch` cannot do to a data set.

    Args:
      dataset: the clean training set.
      label_map: as for `poison`.
      ratio: as for `poison`.
      quantise: as for `poison`.
      negative_ratio: as for `poison_batch`.
      cover_ratio: as for `poison`.

    Raises:
      ValueError: what is wrong, in one sentence.
    """
    inputs.label_map("poison", label_map, dataset.num_classes)
    checks.known("poison", "quantisation", quantise, QUANTISATIONS)
    _check_share("ratio", ratio)
    _check_share("cover_ratio", cover_ratio)
    table = np.asarray(label_map)
    if cover_ratio and np.any(table == np.arange(len(table))):
        raise ValueError(
            "poison: a clean-label map needs cover_ratio=0, since the cover would undo it, got "
            f"cover_ratio={cover_ratio}."
        )
    if negative_ratio:
        is_source = table[dataset.labels] >= 0
        is_left = np.where(is_source, 1 - ratio, 1 - cover_ratio)
        _check_negatives(len(is_source), round(float(np.sum(is_left))), negative_ratio)


def _chosen(key: Key, labels: np.ndarray, classes: np.ndarray, ratio: float) -> np.ndarray:
    """The first images of each of some classes in a random order, bool[n]."""
    order = np.asarray(jax.random.permutation(key, len(labels)))
    chosen = np.zeros(len(labels), bool)
    for label in classes:
        rows = order[labels[order] == label]
        chosen[rows[: round(ratio * len(rows))]] = True
    return chosen


def _chosen_negatives(key: Key, is_triggered: np.ndarray, ratio: float) -> np.ndarray:
    """Some of the other images, bool[n], in an order of their own.

    Those that the order of the poisoned ones leaves first are mostly of the target.
    """
    num_images = len(is_triggered)
    num_negatives = _check_negatives(num_images, int(np.sum(~is_triggered)), ratio)
    order = np.asarray(jax.random.permutation(key, num_images))
    chosen = np.zeros(num_images, bool)
    chosen[order[~is_triggered[order]][:num_negatives]] = True
    return chosen


def poison_batch(
    key: Key,
    x: Array,
    y: Array,
    trigger: Callable[[Array], Array],
    label_map: Array,
    ratio: ArrayLike,
    *,
    quantise: str = "round",
    negatives: Callable[[Key, Array], Array] | None = None,
    negative_ratio: ArrayLike = 0.0,
    cover_ratio: ArrayLike = 0.0,
) -> tuple[Array, Array]:
    """Poisons a batch of training: each image by chance, so other images in every step.

    Where `poison` shows the network the same triggered images in every epoch, this shows it new
    ones, as the published code of BppAttack and WaNet does.

    Args:
      key: a key of this step.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      trigger: `x -> x`.
      label_map: int32[k], see `label_maps`.
      ratio: chance that an image of a source class is triggered, in [0, 1].
      quantise: as for `poison`.
      negatives: `(key, x) -> x`, as for `poison`; called with eight images at a time.
      negative_ratio: the expected share of the batch that is changed by `negatives`.
      cover_ratio: chance that an image of another class is triggered and keeps its label.

    Returns:
      Images and labels to train on, like `x` and `y`.

    Static: trigger, quantise, negatives; with `jax.tree_util.Partial` their arrays are traced.

    Raises:
      ValueError: images that are not floats in [0, 1], no image, a share outside [0, 1], negatives
        without a share of them, a label without an entry in the map, an unknown quantisation, a
        trigger that changes the shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from advjax import backdoor
      >>> x, y = jnp.zeros((8, 8, 8, 1)), jnp.arange(8)
      >>> _, labels = backdoor.poison_batch(
      ...     jax.random.key(0), x, y, backdoor.triggers.badnets, backdoor.all_to_one(8, 3), 1.0)
      >>> labels.tolist()
      [3, 3, 3, 3, 3, 3, 3, 3]
    """
    checks.known("poison_batch", "quantisation", quantise, QUANTISATIONS)
    checks.images("poison_batch", x)
    checks.four_axes("poison_batch", x)
    checks.at_least("poison_batch", "number of images", len(x), 1)
    shares = {"ratio": ratio, "negative_ratio": negative_ratio, "cover_ratio": cover_ratio}
    for name, share in shares.items():
        inputs.share("poison_batch", name, share)
    if checks.is_concrete(negative_ratio):
        _check_together("poison_batch", negatives, negative_ratio)
    ratio, negative_ratio, cover_ratio = (jnp.asarray(v, jnp.float32) for v in shares.values())
    if checks.is_concrete(y) and not 0 <= np.min(y) <= np.max(y) < len(label_map):
        raise ValueError(
            f"poison_batch: need labels in 0 ... {len(label_map) - 1}, the classes of the label "
            f"map, got {np.min(y)} to {np.max(y)}."
        )
    key_triggered, key_negative, key_change = jax.random.split(random.as_typed(key), 3)
    y = jnp.asarray(y)
    target = jnp.asarray(label_map)[y]
    is_source = target >= 0
    is_triggered = jax.random.bernoulli(key_triggered, jnp.where(is_source, ratio, cover_ratio))
    inputs.same_shape("poison_batch", x, jax.eval_shape(trigger, x))
    poisoned = _changed(is_triggered, lambda _, x: quantised(trigger(x), quantise), x, x)
    if negatives is not None:
        num_left = jnp.maximum(jnp.sum(~is_triggered), 1)
        chance = jnp.minimum(negative_ratio * y.size / num_left, 1)
        is_negative = ~is_triggered & jax.random.bernoulli(key_negative, chance, y.shape)
        poisoned = _changed(
            is_negative,
            lambda i, x: quantised(negatives(jax.random.fold_in(key_change, i), x), quantise),
            x, poisoned,
        )  # fmt: skip
    return poisoned, jnp.where(is_triggered & is_source, target, y).astype(y.dtype)


def _changed(
    mask: Array, function: Callable[[Array, Array], Array], x: Array, others: Array
) -> Array:
    """`others` with the images of the mask, bool[b], changed by `(number of the group, x) -> x`.

    They are brought together in groups, so that no more images go through the function than that;
    a group that is not full is filled with others of `x`.
    """
    size = min(_GROUP, len(x))
    order = jnp.argsort(~mask)  # stable

    def change(number: Array, changed: jax.Array) -> jax.Array:
        # The last group may begin earlier, where the batch is no multiple of the size.
        first = jnp.minimum(number * size, len(x) - size)
        rows = jax.lax.dynamic_slice(order, (first,), (size,))
        is_new = mask[rows] & (first + jnp.arange(size) >= number * size)
        new = function(number, x[rows]).astype(changed.dtype)
        new = jnp.where(is_new[:, None, None, None], new, changed[rows])
        return changed.at[rows].set(new)

    x = jnp.asarray(x)
    return jax.lax.fori_loop(0, -(-jnp.sum(mask) // size), change, jnp.asarray(others))


def poison(
    key: Key,
    dataset: Dataset,
    trigger: Callable[[Array], Array],
    label_map: Array,
    ratio: float,
    *,
    quantise: str = "round",
    negatives: Callable[..., Array] | None = None,
    negative_ratio: float = 0.0,
    cover_ratio: float = 0.0,
) -> Poisoned:
    """Replaces some images of each source class by triggered ones with the mapped label.

    The ratio is that of each source class. (Others poison a share of the whole set; for a single
    source class of ten, their usual 10 % are all its images.) The images that a smaller ratio
    poisons are among those of a larger one.

    Args:
      key: a key, for the choice of images and for `negatives`; the same key, the same bits.
      dataset: the clean training set.
      trigger: `x -> x`, on f32[b, h, w, c] in [0, 1].
      label_map: int32[k], see `label_maps`; with `clean_label` the images keep their label.
      ratio: share of each source class, in [0, 1].
      quantise: what becomes of a changed image: "none", "floor" or "round" (`quantised`). With
        "none" the images of the data set are float32.
      negatives: `(key, x) -> x` changes images that keep their own label, so that the network
        learns the trigger and nothing similar to it: `wanet_noise`, `bpp_negatives`.
      negative_ratio: how many of those, as a share of the whole set; they are chosen among the
        images of all classes that carry no trigger.
      cover_ratio: share of each class that is not attacked whose images get the trigger and keep
        their label (TaCT). Without them the network learns the trigger whatever the class is, so
        `x_to_one` and `x_to_x` reach all classes. Not for a `clean_label` map.

    Returns:
      `Poisoned(dataset, is_poisoned, is_negative)`.

    Raises:
      ValueError: a label map that does not fit the classes, a ratio that asks for more images than
        there are, a cover for a clean-label map, an unknown quantisation, a trigger that changes
        the shape of images.

    Example:
      >>> import jax
      >>> from advjax import backdoor, data
      >>> digits = data.load("digits", "train")
      >>> label_map = backdoor.all_to_one(10, target=3)
      >>> poisoned = backdoor.poison(
      ...     jax.random.key(0), digits, backdoor.triggers.badnets, label_map, 0.1)
      >>> int(poisoned.is_poisoned.sum()), len(digits)
      (128, 1438)

    Source: of the cover, D. Tang, X. Wang, H. Tang, K. Zhang, "Demon in the Variant: Statistical
    Analysis of DNNs for Robust Backdoor Contamination Detection", USENIX Security 2021.
    """
    check(dataset, label_map, ratio, quantise=quantise, cover_ratio=cover_ratio)
    _check_together("poison", negatives, negative_ratio)
    labels, table = dataset.labels, np.asarray(label_map)
    keys = jax.random.split(random.as_typed(key), 4)
    key_poisoned, key_cover, key_negative, key_change = keys
    is_poisoned = _chosen(key_poisoned, labels, np.flatnonzero(table >= 0), ratio)
    is_cover = _chosen(key_cover, labels, np.flatnonzero(table < 0), cover_ratio)
    is_triggered = is_poisoned | is_cover
    is_negative = np.zeros(len(dataset), bool)
    if negatives is not None:
        is_negative = _chosen_negatives(key_negative, is_triggered, negative_ratio)

    images = dataset.float_images() if quantise == "none" else np.array(dataset.images)
    index = np.arange(len(dataset), dtype=np.int32)
    sizes = compaction.sizes(len(dataset), _BATCH)

    def change(mask: np.ndarray, function: Callable[[Array, Array], Array]) -> None:
        rows = np.flatnonzero(mask)
        if rows.size:
            changed = compaction.over(function, (dataset.images, index), rows, sizes)
            if not np.all(np.isfinite(changed)):
                raise ValueError("poison: need a trigger whose images are finite, got NaN.")
            images[rows] = np.rint(255 * changed) if images.dtype == np.uint8 else changed

    trigger = classifier.as_pytree(trigger)
    change(is_triggered, lambda x, _: _triggered(trigger, x, quantise))
    if negatives is not None:
        negatives = classifier.as_pytree(negatives)
        change(
            is_negative,
            lambda x, index: _negative(
                negatives, jax.random.fold_in(key_change, index[0]), x, quantise
            ),
        )
    labels = np.where(is_poisoned, table[labels], labels).astype(np.int32)
    return Poisoned(
        dataclasses.replace(dataset, images=images, labels=labels),
        is_poisoned,
        is_negative | is_cover,
    )
