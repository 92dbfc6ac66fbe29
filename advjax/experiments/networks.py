"""What a study starts from: its run folder, its images, its classifiers."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import advjax
from advjax import data, evaluation, models, training
from advjax.core import checks, io, metrics, parallel, random
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
        if self.weights:
            self.read_weights(study)
        checks.non_negative(study, "learning_rate", self.learning_rate)
        for name in ("num_examples", "num_epochs", "batch_size"):
            checks.at_least(study, name, getattr(self, name), 1)

    def read_weights(self, study: str) -> Mapping[str, Any]:
        """The weights of the file.

        Raises:
          ValueError: no file, no npz file of arrays, weights of another model or data set.
        """
        path = pathlib.Path(self.weights).expanduser()
        if not path.is_file():
            raise ValueError(f"{study}: no weights file {self.weights!r}.")
        variables = models.from_reference_npz(path)
        info = data.info(self.dataset)
        image = jax.ShapeDtypeStruct((1, *info.image_shape), "f4")
        module = models.make(self.model, info.num_classes)
        wanted = jax.eval_shape(module.init, jax.random.key(0), image)
        if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, dict(wanted)):
            raise ValueError(
                f"{study}: the weights in {self.weights} are not those of {self.model} on "
                f"{self.dataset}."
            )
        return variables


class Opened(NamedTuple):
    """A study that is about to run.

    Attributes:
      study: its name.
      run: its folder.
      test: the test images in use.
      x: the same as f32[n, h, w, c] in [0, 1].
      y: their labels, int32[n].
    """

    study: str
    run: Run
    test: data.Dataset
    x: np.ndarray
    y: np.ndarray


def open_study(
    config: Any,
    workdir: PathLike,
    *,
    study: str,
    key_columns: Sequence[str],
    data_dir: PathLike | None,
) -> Opened:
    """Checks a configuration, loads its test images and opens its folder, in this order.

    Args:
      config: a dataclass with `dataset`, `num_examples` and a method `check`, such as a
        `NetworkConfig`.
      workdir: the run folder.
      study: name of the study.
      key_columns: the columns that tell rows apart.
      data_dir: prepared tfds data.

    Raises:
      ValueError: a bad configuration, a folder of another one.
    """
    config.check()
    # The data first: without it there is nothing to do and no folder to write.
    test = data.load(config.dataset, "test", data_dir=data_dir)
    test = test.take(min(config.num_examples, len(test)))
    run = Run(workdir, config, study=study, key_columns=key_columns)
    weights = getattr(config, "weights", "")  # a backdoor study has none
    if weights:
        _check_same_weights(run, pathlib.Path(weights).expanduser())
    return Opened(study, run, test, test.float_images(), test.labels)


def _check_same_weights(run: Run, weights: pathlib.Path) -> None:
    """Writes down which weights a run is of, or compares: a file may change under its name."""
    path = run.workdir / "weights.json"
    ours = {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    if run.rows and path.exists():  # older folders have none
        if io.read_json(path) != ours:
            raise ValueError(
                f"{run.workdir} holds results of other weights than are now in {weights}; use "
                "another --workdir."
            )
    elif parallel.is_main_process():
        io.write_json(path, ours)


def trainer(
    config: NetworkConfig, num_classes: int, data_dir: PathLike | None, run: Run
) -> Callable[[int], LogitsFn]:
    """Gives the classifier of a seed: trained, restored, or with the weights of a file.

    Args:
      config: which classifier.
      num_classes: k.
      data_dir: prepared tfds data.
      run: the run folder, which holds the checkpoints.

    Returns:
      `seed -> logits_fn`.
    """
    module = models.make(config.model, num_classes)
    if config.weights:
        variables = config.read_weights("trainer")
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


def only_classifier(
    config: Any, opened: Opened, data_dir: PathLike | None
) -> tuple[LogitsFn, float]:
    """The classifier of a study that has one, and its accuracy on the clean images.

    Args:
      config: a `NetworkConfig` with a `seed`.
      opened: the study.
      data_dir: prepared tfds data.

    Raises:
      ValueError: logits that are not finite.
    """
    with opened.run.timed("training"):
        train = trainer(config, opened.test.num_classes, data_dir, opened.run)
        logits_fn = train(config.seed)
    name = f"seed {config.seed}"
    return logits_fn, clean_accuracy(opened.study, name, logits_fn, opened.x, opened.y)
