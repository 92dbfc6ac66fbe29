"""Shadow models: clean ones, and ones with backdoors drawn from the jumbo distribution."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from advjax import training
from advjax.core import checks, classifier, losses, parallel, random
from advjax.core.typing import Array, Key, LogitsFn
from advjax.data import Dataset

_PATCH_SIZES = (2, 3, 4, 5)  # pixels; or the whole image


class Jumbo(NamedTuple):
    """A backdoor of the jumbo distribution: `x + mask (pattern - x)` becomes the target.

    Attributes:
      mask: opacity of the pattern, f32[h, w, 1]; zero outside of the patch.
      pattern: f32[h, w, c] in [0, 1].
      target: int32[].
      ratio: poisoned copies, in units of the clean images.
    """

    mask: Array
    pattern: Array
    target: Array
    ratio: Array


class Shadows(NamedTuple):
    """Shadow models, and what a meta-classifier needs to know of the images they were trained on.

    Attributes:
      logits_fns: the models, a classifier with a leading model axis [m].
      is_infected: bool[m]; clean and infected models take turns.
      mean: of each channel of the images, repeated over the pixels, f32[h, w, c].
      deviation: of each channel, repeated, f32[h, w, c].
      num_images: how many images they were.
    """

    logits_fns: LogitsFn
    is_infected: Array
    mean: Array
    deviation: Array
    num_images: Array


def jumbo(key: Key, image_shape: tuple[int, int, int], num_classes: int) -> Jumbo:
    """Draws a backdoor from the jumbo distribution.

    A patch of 2, 3, 4 or 5 pixels a side, anywhere, or the whole image, each as likely. The opacity
    is uniform in (0.2, 0.6), above 0.5 taken as 1, and for the whole image uniform in (0.05, 0.2).
    Pixels are uniform in (-e, 1 + e), clipped to [0, 1], with e uniform in (0, 1); the target is
    any class, and the poisoned copies are a share of (0.05, 0.5).

    The authors' patches never touch the lower and the right edge; here every place is as likely.

    Args:
      key: a key.
      image_shape: height, width and channels.
      num_classes: k.

    Returns:
      A `Jumbo`. Patches that do not fit into a small image are not drawn.

    Static: image_shape, num_classes.

    Example:
      >>> import jax
      >>> jumbo(jax.random.key(0), (8, 8, 1), 10).pattern.shape
      (8, 8, 1)

    Source: X. Xu et al., "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.
    """
    height, width, _ = image_shape
    key_size, key_alpha, key_place, key_range, key_pattern, key_target, key_ratio = (
        jax.random.split(key, 7)
    )
    sizes = [size for size in _PATCH_SIZES if size < min(height, width)]
    sizes = jnp.array([*((size, size) for size in sizes), (height, width)])
    size = jax.random.choice(key_size, sizes)
    is_whole = jnp.all(size == sizes[-1])
    patch_alpha = jax.random.uniform(key_alpha, minval=0.2, maxval=0.6)
    alpha = jnp.where(
        is_whole,
        jax.random.uniform(key_alpha, minval=0.05, maxval=0.2),
        jnp.where(patch_alpha > 0.5, 1.0, patch_alpha),
    )
    corner = jax.random.randint(key_place, (2,), 0, jnp.array([height, width]) - size + 1)
    rows, columns = (
        (jnp.arange(n) >= first) & (jnp.arange(n) < first + length)
        for n, first, length in zip((height, width), corner, size, strict=True)
    )
    spread = jax.random.uniform(key_range)
    pattern = jax.random.uniform(key_pattern, image_shape, minval=-spread, maxval=1 + spread)
    return Jumbo(
        alpha * (rows[:, None, None] & columns[:, None]),
        jnp.clip(pattern, 0, 1),
        jax.random.randint(key_target, (), 0, num_classes),
        jax.random.uniform(key_ratio, minval=0.05, maxval=0.5),
    )


def _poisoned_loss(
    key: Key, logits_fn: LogitsFn, x: Array, y: Array, *, mask, pattern, target, ratio
) -> Array:
    """Cross-entropy where each image is a poisoned copy with chance `ratio / (1 + ratio)`."""
    is_poisoned = jax.random.bernoulli(key, ratio / (1 + ratio), y.shape)
    x = jnp.where(is_poisoned[:, None, None, None], x + mask * (pattern - x), x)
    return losses.cross_entropy(logits_fn(x), jnp.where(is_poisoned, target, y))


def train_shadows(
    key: Key,
    module: nn.Module,
    dataset: Dataset,
    *,
    num_shadows: int,
    num_epochs: int = 100,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    method: str = "vmap",
    group_size: int = 64,
    progress: bool = True,
) -> Shadows:
    """Trains shadow models in parallel: as many clean ones as with backdoors, each of its own.

    The authors add poisoned copies, `ratio` times the clean images, to the data once; here each
    image of a batch is a poisoned copy with chance `ratio / (1 + ratio)`, drawn anew in each step.
    So all models are trained on one data set by one program, and an epoch has no more steps for a
    poisoned model than for a clean one.

    Args:
      key: a key.
      module: the architecture of the models that shall be judged, as for `training.fit`.
      dataset: the defender's clean images; the authors give it 2 % of the training set.
      num_shadows: models of each kind; the authors train 2048 and another 256 to choose by, the
        paper says 1024.
      num_epochs: passes over the images.
      batch_size: images a step.
      learning_rate: of Adam.
      method: "vmap" trains a group side by side, "map" one after the other.
      group_size: models in a program, to bound the memory.
      progress: show a progress bar.

    Returns:
      `Shadows` of 2 num_shadows models.

    Static: everything but key.

    Raises:
      ValueError: a count below 1, and what `training.fit_many` raises.

    Source: X. Xu et al., "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.
    """
    for name, value in (("num_shadows", num_shadows), ("group_size", group_size)):
        checks.at_least("train_shadows", name, value, 1)
    num_models, key = 2 * num_shadows, random.as_typed(key)
    keys = random.example_keys(key, num_models)
    backdoors = jax.jit(
        jax.vmap(
            lambda k: jumbo(random.named(k, "jumbo"), dataset.image_shape, dataset.num_classes)
        )
    )(keys)
    is_infected = np.arange(num_models) % 2 == 1
    backdoors = backdoors._replace(ratio=jnp.where(is_infected, backdoors.ratio, 0))
    optimizer = optax.adam(learning_rate)  # one object, so that all groups are one program
    groups = []
    is_quiet = not (progress and parallel.is_main_process())
    for first in tqdm(range(0, num_models, group_size), desc="shadows", disable=is_quiet):
        rows = slice(first, first + group_size)
        fitted = training.fit_many(
            keys[rows], module, dataset, loss_fn=_poisoned_loss, optimizer=optimizer,
            hyperparameters={"loss": {n: v[rows] for n, v in backdoors._asdict().items()}},
            num_epochs=num_epochs, batch_size=batch_size, method=method, progress=False,
        )  # fmt: skip
        groups.append(fitted.variables)
    images = dataset.float_images()
    mean, deviation = (
        jnp.broadcast_to(moment, dataset.image_shape)
        for moment in (images.mean((0, 1, 2)), images.std((0, 1, 2)))
    )
    return Shadows(
        classifier.bind(module, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)),
        jnp.asarray(is_infected),
        mean,
        deviation,
        jnp.asarray(len(dataset), jnp.int32),
    )
