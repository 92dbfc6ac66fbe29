"""MagNet: autoencoders that pull images back to where the data lie, and that notice who does not.

An image is rejected by a detector, or its reformed copy is classified. Detectors are functions
from images to scores f32[b], not negative, a higher one meaning more suspicious.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from advjax import evaluation, training
from advjax.core import checks, classifier, random
from advjax.core.classifier import Randomised
from advjax.core.io import PathLike
from advjax.core.typing import Array, Key, LogitsFn
from advjax.data import Dataset
from advjax.models import layers

Detector = Callable[[Array], Array]
_SHARPNESS = 10.0  # logits by which twice the threshold speaks for a rejection
_LARGEST_EXCESS = 1e6  # of a score over its threshold, in thresholds


class Autoencoder(nn.Module):
    """Convolutions of 3 x 3 with sigmoids, as narrow as the image: MagNet's two architectures.

    The published detector I, which is also the reformer, has `widths=(3, 3)`: convolution,
    average-pooling, convolution, then the mirror image of these and one convolution to the image's
    channels. Detector II has `widths=(3,)`: three convolutions in a row.

    Fields:
        widths: channels of the encoder's convolutions; between two of them the map is halved.
    """

    widths: tuple[int, ...] = (3, 3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to images like them."""
        factor = 2 ** (len(self.widths) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"Autoencoder: need a height and width that {factor} divides, got images of shape "
                f"{x.shape[1:]}."
            )
        channels = x.shape[-1]
        for i, width in enumerate(self.widths):
            x = layers.avg_pool(x) if i else x
            x = _convolution(width, f"encode{i}")(x)
        for i, width in reversed(list(enumerate(self.widths))):
            x = _convolution(width, f"decode{i}")(x)
            x = _doubled(x) if i else x
        return _convolution(channels, "output")(x)


def _convolution(features: int, name: str) -> Callable[[jax.Array], jax.Array]:
    # He's initialisation is for ReLU; through sigmoids, whose slope is 1/4, Glorot's is the custom.
    convolve = layers.Conv(features, kernel_init=nn.initializers.glorot_uniform(), name=name)
    return lambda x: nn.sigmoid(convolve(x))


def _doubled(x: jax.Array) -> jax.Array:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class _Side(nn.Module):
    """Networks of one architecture side by side: f32[b, ...] to f32[count, b, ...]."""

    module: nn.Module
    count: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        apply = nn.vmap(
            lambda module, x: module(x), in_axes=None, axis_size=self.count,
            variable_axes={"params": 0}, split_rngs={"params": True},
        )  # fmt: skip
        return apply(self.module, x)


# ------------------------------------------------------------------------------------ training


def _denoising(
    key: Key, logits_fn: LogitsFn, x: Array, y: Array, *, noise: ArrayLike, alpha: ArrayLike
) -> Array:
    del y
    noisy = jnp.clip(x + noise * jax.random.normal(key, x.shape, x.dtype), 0, 1)
    # What `fit` takes for logits are images here, of which it can tell no accuracy.
    images = training.inference(logits_fn)(noisy)
    errors = _pixel_mean((images - x) ** 2)
    spread = _pixel_mean((images - jnp.mean(images, axis=0)) ** 2)
    return jnp.sum(errors - alpha * spread, axis=0)


def _pixel_mean(values: Array) -> Array:
    return jnp.mean(values, axis=(-3, -2, -1))


def train_autoencoders(
    key: Key,
    module: nn.Module,
    dataset: Dataset,
    *,
    num_autoencoders: int = 8,
    alpha: ArrayLike = 0.2,
    noise: ArrayLike = 0.1,
    optimizer: optax.GradientTransformation | None = None,
    num_epochs: int = 100,
    batch_size: int = 256,
    checkpoint_dir: PathLike | None = None,
    progress: bool = True,
) -> Partial:
    """Trains autoencoders that differ, so that an attack on one of them does not fit the others.

    `sum_i MSE(x, AE_i(x')) - alpha sum_i MSE(AE_i(x'), mean_j AE_j(x'))`, where
    `x' = clip(x + noise N(0, I), 0, 1)`. The noise is new in each step, where the authors' code
    draws it once for all epochs: a copy that stays the same could be learned by heart. By the
    parallel axis theorem the loss is `(1 - alpha) sum_i MSE(AE_i, mean) + m MSE(x, mean)`, so it is
    bounded for alpha < 1 and needs no training without alpha beforehand.

    Args:
      key: a key.
      module: flax module from images f32[b, h, w, c] to images like them, such as `Autoencoder()`.
      dataset: training images; the labels are not used.
      num_autoencoders: m.
      alpha: weight of the diversity, below 1; at 0 they are trained independently, near 1 only
        their mean has to be a good copy.
      noise: standard deviation of the training noise.
      optimizer: an optax optimiser; Adam at 1e-3 if None.
      num_epochs: passes over the data.
      batch_size: images a step.
      checkpoint_dir: folder for checkpoints, as for `training.fit`.
      progress: show a progress bar.

    Returns:
      The autoencoders as a stack: images to images, with a leading axis [m] on every leaf, as
      `advjax.stack` would make it.

    Static: module, num_autoencoders, optimizer, num_epochs, batch_size.

    Raises:
      ValueError: a count below 1, a negative noise, alpha outside [0, 1), a module that does not
        give images like its input.

    Source: D. Meng, H. Chen, "MagNet: a Two-Pronged Defense against Adversarial Examples",
    CCS 2017.
    """
    caller = "train_autoencoders"
    checks.at_least(caller, "num_autoencoders", num_autoencoders, 1)
    checks.non_negative(caller, "noise", noise)
    if checks.is_concrete(alpha) and not 0 <= np.asarray(alpha) < 1:
        raise ValueError(f"{caller}: need 0 <= alpha < 1, got alpha={alpha}.")
    _check_makes_images(
        caller, lambda x: module.init_with_output(jax.random.key(0), x)[0], dataset.image_shape
    )
    fitted = training.fit_many(
        random.as_typed(key)[None], _Side(module, num_autoencoders), dataset,
        loss_fn=_denoising, hyperparameters={"loss": {
            "noise": jnp.asarray(noise, jnp.float32)[None],
            "alpha": jnp.asarray(alpha, jnp.float32)[None],
        }},
        optimizer=optimizer, num_epochs=num_epochs, batch_size=batch_size,
        checkpoint_dir=checkpoint_dir, progress=progress,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: leaf[0], fitted.variables["params"]["module"])
    return classifier.bind(module, {"params": params})


def train_autoencoder(
    key: Key, module: nn.Module, dataset: Dataset, *, noise: ArrayLike = 0.1, **options: Any
) -> Partial:
    """Trains a denoising autoencoder: `MSE(x, AE(clip(x + noise N(0, I), 0, 1)))`.

    Args:
      key: a key.
      module: flax module from images f32[b, h, w, c] to images like them, such as `Autoencoder()`.
      dataset: training images; the labels are not used.
      noise: standard deviation of the training noise, which is new in each step.
      **options: optimizer, num_epochs, batch_size, checkpoint_dir and progress of
        `train_autoencoders`.

    Returns:
      The autoencoder, images to images: a `Partial` with its weights as leaves.

    Static: module, optimizer, num_epochs, batch_size.

    Raises:
      ValueError: what `train_autoencoders` raises.

    Example:
      >>> import jax
      >>> from advjax import data
      >>> digits = data.load("digits", "train")
      >>> autoencoder = train_autoencoder(
      ...     jax.random.key(0), Autoencoder((3,)), digits, num_epochs=1, progress=False)
      >>> autoencoder(digits.take(5).float_images()).shape
      (5, 8, 8, 1)

    Source: D. Meng, H. Chen, "MagNet: a Two-Pronged Defense against Adversarial Examples",
    CCS 2017.
    """
    stack = train_autoencoders(
        key, module, dataset, num_autoencoders=1, alpha=0.0, noise=noise, **options
    )
    return member(stack, 0)


def member(autoencoders: Any, index: ArrayLike) -> Any:
    """One autoencoder of a stack.

    Args:
      autoencoders: what `train_autoencoders` returned.
      index: which one; may be traced.
    """
    return jax.tree.map(lambda leaf: leaf[index], autoencoders)


# ----------------------------------------------------------------------------------- detectors


def error_detector(autoencoder: Any, *, p: int = 2) -> Partial:
    """Detector by reconstruction error: `mean |x - AE(x)|^p` over the pixels.

    The published MagNet for MNIST has detector I with p = 2 and detector II with p = 1.

    Args:
      autoencoder: images to images.
      p: the exponent.

    Returns:
      The detector, images f32[b, h, w, c] to scores f32[b].

    Static: p.

    Raises:
      ValueError: p below 1; when it is called, an autoencoder for images of another shape.

    Source: D. Meng, H. Chen, CCS 2017.
    """
    checks.at_least("error_detector", "p", p, 1)
    return Partial(_Error(p), _as_pytree(autoencoder))


@dataclasses.dataclass(frozen=True)
class _Error:
    p: int

    def __call__(self, autoencoder: Any, x: Array) -> Array:
        return _pixel_mean(jnp.abs(x - _rebuild("error_detector", autoencoder, x)) ** self.p)


def divergence_detector(
    logits_fn: LogitsFn, autoencoder: Any, *, temperature: ArrayLike = 10.0
) -> Partial:
    """Detector by answers: how far the classifier's for the image and the reformed one differ.

    `JSD(softmax(z(x) / T), softmax(z(AE(x)) / T))` in nats, the Jensen-Shannon divergence. The
    temperature keeps classes visible that a confident softmax rounds to 0; published are 10 and 40.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      autoencoder: images to images.
      temperature: T, above 0.

    Returns:
      The detector, images f32[b, h, w, c] to scores f32[b].

    Raises:
      ValueError: a temperature that is not positive; when it is called, an autoencoder for images
        of another shape.

    Source: D. Meng, H. Chen, CCS 2017.
    """
    if checks.is_concrete(temperature) and not 0 < np.asarray(temperature) < np.inf:
        raise ValueError(
            f"divergence_detector: need a finite temperature > 0, got temperature={temperature}."
        )
    # As leaves of the detector all three may be traced.
    return Partial(_divergence, classifier.as_pytree(logits_fn), _as_pytree(autoencoder),
                   jnp.asarray(temperature, jnp.float32))  # fmt: skip


def _divergence(logits_fn: LogitsFn, autoencoder: Any, temperature: Array, x: Array) -> Array:
    reformed = _reform("divergence_detector", autoencoder, x)
    log_p, log_q = (jax.nn.log_softmax(logits_fn(images) / temperature) for images in (x, reformed))
    log_middle = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    divergences = (jnp.sum(jnp.exp(log) * (log - log_middle), axis=-1) for log in (log_p, log_q))
    return jnp.maximum(sum(divergences) / 2, 0)  # rounding may leave a little below 0


def magnet_scores(detectors: Sequence[Detector], x: Array) -> Array:
    """Scores of all detectors.

    Args:
      detectors: images to scores f32[b], at least one.
      x: images, f32[b, h, w, c] in [0, 1].

    Returns:
      f32[b, detectors].

    Raises:
      ValueError: no detector, images that are not floats in [0, 1].
    """
    _check_detectors("magnet_scores", detectors)
    checks.images("magnet_scores", x)
    return jnp.stack([detector(x) for detector in detectors], axis=-1)


def _check_detectors(caller: str, detectors: Sequence[Detector]) -> None:
    if not len(detectors):
        raise ValueError(f"{caller}: need at least one detector, got none.")


def thresholds(
    detectors: Sequence[Detector],
    x: Array,
    false_positive_rate: ArrayLike,
    *,
    batch_size: int | None = None,
) -> Array:
    """The threshold of each detector from a budget of false positives on held-out images.

    A budget of r on n images allows each detector to reject `floor(r n)` of them: its threshold is
    the next number above the score of rank `floor(r n) + 1`. Where r n rounds to zero that is above
    the largest score, so no held-out image is rejected.

    Args:
      detectors: images to scores f32[b], at least one.
      x: clean images that nothing was trained on, f32[n, h, w, c] in [0, 1].
      false_positive_rate: r, between 0 and 1, for each detector; 0.001 is published for MNIST. One
        rate or one a detector.
      batch_size: images at a time; all by default.

    Returns:
      f32[detectors].

    Static: batch_size.

    Raises:
      ValueError: no held-out images, no detector, a rate outside [0, 1], neither one rate nor one
        a detector.

    Example:
      >>> import jax.numpy as jnp
      >>> brightness = lambda x: jnp.max(x, axis=(1, 2, 3))
      >>> held_out = jnp.linspace(0, 1, 5).reshape(5, 1, 1, 1)
      >>> found = thresholds([brightness], held_out, 0.4)
      >>> magnet_detects([brightness], found, held_out)
      Array([False, False, False,  True,  True], dtype=bool)

    Source: D. Meng, H. Chen, CCS 2017.
    """
    _check_detectors("thresholds", detectors)
    if checks.is_concrete(false_positive_rate):
        rates = np.asarray(false_positive_rate)
        if not np.all((rates >= 0) & (rates <= 1)):
            raise ValueError(
                "thresholds: need 0 <= false_positive_rate <= 1, got false_positive_rate="
                f"{rates.tolist()}."
            )
    if np.shape(false_positive_rate) not in ((), (len(detectors),)):
        raise ValueError(
            f"thresholds: need one false_positive_rate or one a detector ({len(detectors)}), got "
            f"shape {np.shape(false_positive_rate)}."
        )
    if x is None or not len(x):
        raise ValueError("thresholds: need held-out images, got none.")
    scores = evaluation.predict(
        Partial(_scores, tuple(classifier.as_pytree(detector) for detector in detectors)), x,
        batch_size=batch_size,
    )  # fmt: skip
    descending = -jnp.sort(-scores, axis=0)
    # 0.29 * 100 is 28.999996 in float32: a count is taken as reached when it lacks that little.
    allowed = jnp.floor(jnp.asarray(false_positive_rate, jnp.float32) * len(x) + 1e-3)
    allowed = jnp.broadcast_to(allowed.astype(jnp.int32), (len(detectors),))
    rank = jnp.minimum(allowed, len(x) - 1)
    largest_accepted = jnp.take_along_axis(descending, rank[None], axis=0)[0]
    above = jnp.nextafter(largest_accepted, jnp.inf)
    # XLA takes a subnormal number, such as the next one above 0, for 0, which rejects everything.
    above = jnp.maximum(above, jnp.finfo(above.dtype).tiny)
    return jnp.where(allowed < len(x), above, 0)


def _scores(detectors: Sequence[Detector], x: Array) -> Array:
    return magnet_scores(detectors, x)


def magnet_detects(detectors: Sequence[Detector], thresholds: Array, x: Array) -> Array:
    """Which images at least one detector rejects: `score >= threshold`, bool[b].

    A score that is not a number, as of a broken network, rejects its image.

    Args:
      detectors: images to scores f32[b], at least one.
      thresholds: one a detector, as `thresholds` returns them, f32[detectors].
      x: images, f32[b, h, w, c] in [0, 1].

    Raises:
      ValueError: no detector, not one threshold a detector, images that are not floats in [0, 1].
    """
    scores = magnet_scores(detectors, x)
    _check_thresholds("magnet_detects", thresholds, detectors)
    return jnp.any(~(scores < jnp.asarray(thresholds)), axis=-1)


def _check_thresholds(caller: str, thresholds: Array, detectors: Sequence[Detector]) -> None:
    if thresholds is None or np.shape(thresholds) != (len(detectors),):
        got = "none" if thresholds is None else f"shape {np.shape(thresholds)}"
        raise ValueError(f"{caller}: need one threshold a detector ({len(detectors)}), got {got}.")


# ---------------------------------------------------------------------------------- classifiers


def magnet(logits_fn: LogitsFn, autoencoder: Any, *, key: Key | None = None) -> LogitsFn:
    """The classifier behind MagNet's reformer: `z(clip(AE(x), 0, 1))`.

    Gradients pass through the reformer, so any attack on the returned classifier is a white-box
    attack on it. Images that are rejected are the matter of `magnet_detects`, and for attacks that
    must get past that too of `magnet_rejecting`.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      autoencoder: images to images; with `key` a stack of them (`train_autoencoders`).
      key: draws for each image which autoencoder of the stack reforms it.

    Returns:
      A classifier; with `key` a `Randomised` one. Example i of a batch draws with
      `fold_in(key, i)`, or with a key of its own if `key` is [b].

    Raises:
      ValueError: a key without a stack; when it is called, an autoencoder for images of another
        shape, images that are not floats in [0, 1].

    Source: D. Meng, H. Chen, "MagNet: a Two-Pronged Defense against Adversarial Examples",
    CCS 2017.
    """
    logits_fn = classifier.as_pytree(logits_fn)
    if key is None:
        return Partial(_behind, logits_fn, _as_pytree(autoencoder))
    if not classifier.stack_size(autoencoder):
        raise ValueError(
            "magnet: need a stack of autoencoders with a key (train_autoencoders), got one."
        )
    return Randomised(Partial(_behind_random, logits_fn, autoencoder), key)


def _behind(logits_fn: LogitsFn, autoencoder: Any, x: Array) -> Array:
    return logits_fn(_reform("magnet", autoencoder, x))


def _behind_random(logits_fn: LogitsFn, autoencoders: Any, key: Key, x: Array) -> Array:
    count = len(jax.tree.leaves(autoencoders)[0])
    keys = random.example_keys(key, len(x))
    chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)
    reformed = jax.vmap(lambda autoencoder: _reform("magnet", autoencoder, x))(autoencoders)
    return logits_fn(reformed[chosen, jnp.arange(len(x))])


def magnet_rejecting(
    logits_fn: LogitsFn, detectors: Sequence[Detector], thresholds: Array
) -> Partial:
    """A classifier with one class more, "rejected", which wins where a detector fires.

    Its logit is `max_i z_i + 10 max_d (score_d / threshold_d - 1)`; it is finite, and above the
    others where `magnet_detects` says so. What is neither rejected nor answered as y is a success
    against all of MagNet: a targeted attack looks for that, an
    untargeted one would also take a rejection for a success.

    Args:
      logits_fn: classifier, such as what `magnet` returned, f32[b, k].
      detectors: images to scores f32[b], at least one.
      thresholds: one a detector, f32[detectors].

    Returns:
      A classifier, images f32[b, h, w, c] to logits f32[b, k + 1].

    Raises:
      ValueError: no detector, not one threshold a detector.

    Source: N. Carlini, D. Wagner, "Adversarial Examples Are Not Easily Detected", AISec 2017 (the
    combined classifier); N. Carlini, D. Wagner, "MagNet and 'Efficient Defenses Against Adversarial
    Attacks' Are Not Robust to Adversarial Examples", 2017.
    """
    _check_detectors("magnet_rejecting", detectors)
    _check_thresholds("magnet_rejecting", thresholds, detectors)
    detectors = tuple(classifier.as_pytree(detector) for detector in detectors)
    return Partial(_rejecting, classifier.as_pytree(logits_fn), detectors, jnp.asarray(thresholds))


def _rejecting(logits_fn: LogitsFn, detectors: Any, thresholds: Array, x: Array) -> Array:
    logits, scores = logits_fn(x), magnet_scores(detectors, x)
    highest = jnp.max(logits, axis=-1)
    excess = (scores - thresholds) / jnp.maximum(thresholds, 1e-12)
    # A score that is not a number counts as one at the threshold, which is rejected.
    excess = jnp.clip(jnp.where(jnp.isnan(excess), 0, excess), -_LARGEST_EXCESS, _LARGEST_EXCESS)
    rejected = highest + _SHARPNESS * jnp.max(excess, axis=-1)
    # A tie, or an excess that is lost in rounding, is a rejection too.
    lacking = jnp.nextafter(highest, jnp.inf) - rejected
    has_fired = jnp.any(~(scores < thresholds), axis=-1)
    rejected += jax.lax.stop_gradient(jnp.where(has_fired, jnp.maximum(lacking, 0), 0))
    return jnp.concatenate([logits, rejected[:, None]], axis=-1)


# --------------------------------------------------------------------------------------- images


def _as_pytree(autoencoder: Any) -> Any:
    """The autoencoder as something that may cross a jit boundary; a plain function may not."""
    is_function = jax.tree_util.treedef_is_leaf(jax.tree.structure(autoencoder))
    return Partial(autoencoder) if is_function else autoencoder


def _rebuild(caller: str, autoencoder: Any, x: Array) -> Array:
    checks.images(caller, x)
    _check_makes_images(caller, autoencoder, x.shape[1:])
    return autoencoder(x)


def _reform(caller: str, autoencoder: Any, x: Array) -> Array:
    return jnp.clip(_rebuild(caller, autoencoder, x), 0, 1)


def _check_makes_images(caller: str, autoencoder: Any, image_shape: Sequence[int]) -> None:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        made = tuple(jax.eval_shape(autoencoder, image).shape[1:])
    except (flax.errors.FlaxError, TypeError) as error:
        raise ValueError(
            f"{caller}: need an autoencoder for images of shape {tuple(image_shape)}, got one for "
            "images of another shape, or a stack of them."
        ) from error
    if made != tuple(image_shape):
        raise ValueError(
            f"{caller}: need an autoencoder that makes images of shape {tuple(image_shape)}, got "
            f"one that makes {made}."
        )
