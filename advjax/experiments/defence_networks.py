"""What studies of defences in training share: networks by name and loss, and attacks on them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax

import advjax
from advjax import data, models, training
from advjax.core import checks, classifier, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, Key, LogitsFn, TrainingLoss
from advjax.experiments import networks
from advjax.experiments.runs import Run

BATCH = 500  # test images at a time

# (model, name, loss_fn) to a network; the name makes the key and the folder.
Trainer = Callable[[str, str, TrainingLoss], LogitsFn]


@dataclasses.dataclass(frozen=True)
class TrainingConfig(networks.NetworkConfig):
    """How the networks of a study are trained, whatever their loss.

    Attributes:
      num_train: training images that are used; 0 for all.
      seed: of everything.
    """

    num_train: int = 0
    seed: int = 0

    def check_training(self, study: str) -> None:
        """Checks these settings before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        if self.weights:
            raise ValueError(f"{study}: it trains its networks, so weights of one are of no use.")
        self.check_network(study)
        checks.at_least(study, "num_train", self.num_train, 0)


def trainer(config: TrainingConfig, run: Run, data_dir: PathLike | None) -> Trainer:
    """Gives networks by architecture, name and loss: trained, or restored where they are complete.

    Args:
      config: how.
      run: the run folder, which holds the checkpoints.
      data_dir: prepared tfds data.
    """
    dataset = data.load(config.dataset, "train", data_dir=data_dir)
    dataset = dataset.take(min(config.num_train or len(dataset), len(dataset)))
    num_steps = config.num_epochs * max(1, len(dataset) // config.batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))
    augment = None
    if config.augment:
        crop = training.augment.random_crop(4)
        augment = training.augment.chain(crop, training.augment.random_flip)
    done: dict[str, LogitsFn] = {}

    def train(model: str, name: str, loss_fn: TrainingLoss) -> LogitsFn:
        if name not in done:
            module = models.make(model, dataset.num_classes)
            with run.timed(f"training {name}"):
                fitted = training.fit(
                    random.named(jax.random.key(config.seed), f"train {name}"), module, dataset,
                    loss_fn=loss_fn, optimizer=optimizer, num_epochs=config.num_epochs,
                    batch_size=config.batch_size, augment=augment,
                    checkpoint_dir=run.workdir / "checkpoints" / name,
                )  # fmt: skip
            done[name] = advjax.bind(module, fitted.variables)
        return done[name]

    return train


@functools.partial(jax.jit, static_argnames="attack")
def _attacked(attack: Attack, keys: Key, logits_fn: LogitsFn, x, y, epsilon) -> Array:
    return attack(keys, logits_fn, x, y, epsilon)


def attacked(
    attack: Attack, key: Key, logits_fn: LogitsFn, x: Array, y: Array, epsilon: float
) -> np.ndarray:
    """Adversarial images in batches, by one program for all networks of an architecture.

    Args:
      attack: with one key an example; the same object each time, or it is compiled again.
      key: a key.
      logits_fn: classifier.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      epsilon: radius.
    """
    keys, logits_fn = random.example_keys(key, len(x)), classifier.as_pytree(logits_fn)
    parts = [
        _attacked(attack, keys[rows], logits_fn, x[rows], y[rows], epsilon)
        for rows in np.array_split(np.arange(len(x)), -(-len(x) // BATCH))
    ]
    return np.concatenate([np.asarray(part) for part in parts])
