"""What the studies of defences at test time share: splits, classifiers, attacks, batches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

import advjax
from advjax import attacks, data, models, training
from advjax.core import checks, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, Key, LogitsFn
from advjax.experiments.networks import NetworkConfig
from advjax.experiments.runs import Run


@dataclasses.dataclass(frozen=True)
class DefenceConfig(NetworkConfig):
    """A study of a defence at test time.

    Attributes:
      num_train: training images that are used; 0 for all.
      num_held_out: the last of them, which no network sees.
      num_steps: steps of bim and pgd.
      cw_num_steps: steps of Carlini and Wagner's l2 attack; the linf one has a quarter a round.
      cw_num_search_steps: search steps of the l2 one for the constant.
      cw_num_rounds: rounds of the linf one.
      cw_learning_rate: their step of Adam.
      attack_batch_size: images attacked at a time.
      seed: of everything.
    """

    num_train: int = 0
    num_held_out: int = 200
    num_steps: int = 20
    cw_num_steps: int = 200
    cw_num_search_steps: int = 5
    cw_num_rounds: int = 20
    cw_learning_rate: float = 0.1
    attack_batch_size: int = 200
    seed: int = 0

    def check_defence(self, study: str) -> None:
        """Checks these settings before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network(study)
        for name in (
            "num_held_out", "num_steps", "cw_num_steps", "cw_num_search_steps", "cw_num_rounds",
            "attack_batch_size",
        ):  # fmt: skip
            checks.at_least(study, name, getattr(self, name), 1)
        checks.at_least(study, "num_train", self.num_train, 0)
        checks.non_negative(study, "cw_learning_rate", self.cw_learning_rate)
        if 0 < self.num_train <= self.num_held_out:
            raise ValueError(
                f"{study}: need num_held_out < num_train, got num_held_out={self.num_held_out} and "
                f"num_train={self.num_train}."
            )

    def key(self, name: str) -> Key:
        """The key of a thing of that name."""
        return random.named(jax.random.key(self.seed), name)


class Splits(NamedTuple):
    """The training images of a study.

    Attributes:
      train: what networks are trained on.
      held_out: what no network is trained on.
    """

    train: data.Dataset
    held_out: data.Dataset


def load_splits(config: DefenceConfig, data_dir: PathLike | None) -> Splits:
    """Loads the training images and cuts off the held-out ones.

    Raises:
      ValueError: no image left to train on.
    """
    whole = data.load(config.dataset, "train", data_dir=data_dir)
    whole = whole.take(min(config.num_train or len(whole), len(whole)))
    size = len(whole) - config.num_held_out
    if size < 1:
        raise ValueError(
            f"load_splits: need num_held_out < {len(whole)}, the training images in use, got "
            f"num_held_out={config.num_held_out}."
        )
    held_out = dataclasses.replace(whole, images=whole.images[size:], labels=whole.labels[size:])
    return Splits(whole.take(size), held_out)


def fit_classifier(
    config: DefenceConfig, name: str, model: str, dataset: data.Dataset, run: Run
) -> Partial:
    """A classifier: trained, restored, or of the weights of the configuration's file.

    Args:
      config: the study.
      name: of the classifier; its key and its checkpoints go by it.
      model: name for `models.make`.
      dataset: what it is trained on.
      run: the run folder.
    """
    module = models.make(model, dataset.num_classes)
    if config.weights:
        return advjax.bind(module, config.read_weights("fit_classifier"))
    num_steps = config.num_epochs * max(1, len(dataset) // config.batch_size)
    fitted = training.fit(
        config.key(name), module, dataset,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps)),
        num_epochs=config.num_epochs, batch_size=config.batch_size,
        checkpoint_dir=run.workdir / "checkpoints" / name,
    )  # fmt: skip
    return advjax.bind(module, fitted.variables)


@functools.cache
def catalogue(config: DefenceConfig) -> dict[str, Attack]:
    """The attacks by name; what they take for epsilon is the strength of a row.

    That is the radius in linf, or the confidence of Carlini and Wagner's attacks. DeepFool has
    none, and "none" leaves the images as they are.
    """

    def none(key: Key, logits_fn: LogitsFn, x: Array, y: Array, strength: ArrayLike) -> Array:
        return x

    def deepfool(key: Key, logits_fn: LogitsFn, x: Array, y: Array, strength: ArrayLike) -> Array:
        return attacks.deepfool(key, logits_fn, x, y).x_adv

    def carlini_wagner_l2(
        key: Key, logits_fn: LogitsFn, x: Array, y: Array, strength: ArrayLike, **options: Any
    ) -> Array:
        return attacks.carlini_wagner_l2(
            key, logits_fn, x, y, confidence=strength, num_steps=config.cw_num_steps,
            num_search_steps=config.cw_num_search_steps, learning_rate=config.cw_learning_rate,
            initial_constant=1.0, **options,
        ).x_adv  # fmt: skip

    def carlini_wagner_linf(
        key: Key, logits_fn: LogitsFn, x: Array, y: Array, strength: ArrayLike
    ) -> Array:
        return attacks.carlini_wagner_linf(
            key, logits_fn, x, y, confidence=strength, num_steps=config.cw_num_steps // 4 or 1,
            num_rounds=config.cw_num_rounds, learning_rate=config.cw_learning_rate,
        ).x_adv  # fmt: skip

    return {
        "none": none,
        "fgsm": attacks.fgsm,
        "rand_fgsm": attacks.rand_fgsm,
        "bim": functools.partial(attacks.bim, num_steps=config.num_steps),
        "pgd": functools.partial(attacks.pgd, num_steps=config.num_steps),
        "deepfool": deepfool,
        "carlini_wagner_l2": carlini_wagner_l2,
        "carlini_wagner_l2_targeted": functools.partial(carlini_wagner_l2, targeted=True),
        "carlini_wagner_linf": carlini_wagner_linf,
    }


@functools.partial(jax.jit, static_argnames="attack")
def _attacked(attack, keys, logits_fn, x, y, strength) -> Array:
    return attack(keys, logits_fn, x, y, strength)


def attacked(
    attack: Attack,
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    strength: float,
    *,
    batch_size: int,
) -> np.ndarray:
    """Adversarial images of all images, in batches, f32[n, h, w, c].

    Args:
      attack: one of `catalogue`.
      key: a key; each example has its own.
      logits_fn: what is attacked, a pytree.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      strength: its epsilon or confidence.
      batch_size: images at a time.
    """
    keys = random.example_keys(key, len(x))
    return in_batches(
        lambda *batch: _attacked(attack, batch[0], logits_fn, *batch[1:], strength),
        batch_size, keys, x, y,
    )  # fmt: skip


def in_batches(function: Callable[..., Any], batch_size: int, *arrays: Any) -> Any:
    """What a function gives for arrays [n, ...], a batch at a time, as NumPy arrays."""
    starts = range(0, len(arrays[0]), batch_size)
    results = [function(*(a[i : i + batch_size] for a in arrays)) for i in starts]
    return jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts]), *results)


def label(name: str, strength: float) -> str:
    """An attack and its strength, for tables and pictures."""
    if name in ("none", "deepfool"):
        return name
    unit = "kappa" if name.startswith("carlini_wagner") else "epsilon"
    return f"{name}, {unit} {strength:g}"
