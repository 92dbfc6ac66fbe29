"""The classifiers of a study: trained, restored, or with the weights of a file."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import advjax
from advjax import data, evaluation, models, training
from advjax.core import checks, metrics, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, LogitsFn
from advjax.experiments.runs import Run


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Which classifier a study is about; the configurations of studies inherit from it.

    Attributes:
      dataset: name for `data.load`.
      model: name for `models.make`.
      num_examples: images of the test split that are used; all if it has fewer.
      num_epochs: training epochs.
      batch_size: training images a step.
      learning_rate: of Adam, with a cosine schedule to 0.
      augment: random crops and flips, for photographs.
      weights: an npz file of reference weights for `models.from_reference_npz` in place of
        training; "" for none.
    """

    dataset: str = "digits"
    model: str = "cnn"
    num_examples: int = 512
    num_epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    augment: bool = False
    weights: str = ""

    def check_network(self, study: str) -> None:
        """Checks these settings before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        checks.known(study, "data set", self.dataset, data.NAMES)
        checks.known(study, "model", self.model, models.NAMES)
        if self.weights and not pathlib.Path(self.weights).is_file():
            raise ValueError(f"{study}: no weights file {self.weights!r}.")
        checks.non_negative(study, "learning_rate", self.learning_rate)
        for name in ("num_examples", "num_epochs", "batch_size"):
            checks.at_least(study, name, getattr(self, name), 1)


def trainer(
    config: Any, num_classes: int, data_dir: PathLike | None, run: Run
) -> Callable[[int], LogitsFn]:
    """Gives the classifier of a seed: trained, restored, or with the weights of a file.

    Args:
      config: what has the attributes of `NetworkConfig`.
      num_classes: k.
      data_dir: prepared tfds data.
      run: the run folder, which holds the checkpoints.

    Returns:
      `seed -> logits_fn`.
    """
    module = models.make(config.model, num_classes)
    if config.weights:
        variables = models.from_reference_npz(config.weights)
        shape = (1, *data.info(config.dataset).image_shape)
        wanted = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, "f4"))
        if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, dict(wanted)):
            raise ValueError(
                f"networks: the weights in {config.weights} are not those of {config.model} on "
                f"{config.dataset}."
            )
        logits_fn = advjax.bind(module, variables)
        return lambda seed: logits_fn
    dataset = data.load(config.dataset, "train", data_dir=data_dir)
    num_steps = config.num_epochs * max(1, len(dataset) // config.batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))
    augment = None
    if config.augment:
        crop = training.augment.random_crop(4)
        augment = training.augment.chain(crop, training.augment.random_flip)

    def train(seed: int) -> LogitsFn:
        fitted = training.fit(
            random.named(jax.random.key(seed), "train"), module, dataset,
            optimizer=optimizer, num_epochs=config.num_epochs, batch_size=config.batch_size,
            augment=augment,
            checkpoint_dir=run.workdir / "checkpoints" / f"{config.model}_seed_{seed}",
        )  # fmt: skip
        return advjax.bind(module, fitted.variables)

    return train


def clean_accuracy(
    study: str, name: str, logits_fn: LogitsFn, x: Array, y: Array, batch_size: int = 512
) -> float:
    """Accuracy on clean images of a network that answers for all of them.

    Args:
      study: name of the study, for the message.
      name: name of the network, for the message.
      logits_fn: classifier.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      batch_size: images at a time.

    Raises:
      ValueError: logits that are not finite.
    """
    logits = evaluation.predict(logits_fn, x, batch_size=batch_size)
    num_bad = int(np.sum(~np.isfinite(np.asarray(logits)).all(axis=-1)))
    if num_bad:
        raise ValueError(
            f"{study}: the network of {name} returns logits that are not finite for "
            f"{num_bad} of {len(x)} clean images; train it with a smaller learning rate."
        )
    return float(np.mean(np.asarray(metrics.is_correct(logits, y))))
