"""What is learnt in federated training: a network, the data of the clients, and the test data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from advjax.core.typing import Array
from advjax.data import Dataset
from advjax.federated.partitions import Partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """A pytree of arrays, and the module.

    Attributes:
      images: all training images, uint8[examples, h, w, c]; a batch becomes float when it is used.
      labels: their labels, int32[examples].
      index: which of them each client has, int32[n, s], see `Partition`.
      counts: how many each client has, int32[n].
      test_images: uint8[t, h, w, c].
      test_labels: int32[t].
      module: flax module, images f32[b, h, w, c] in [0, 1] to logits f32[b, k]; static.
      num_classes: k; static.
    """

    images: Array
    labels: Array
    index: Array
    counts: Array
    test_images: Array
    test_labels: Array
    module: Any = dataclasses.field(metadata={"static": True})
    num_classes: int = dataclasses.field(metadata={"static": True})

    @property
    def num_clients(self) -> int:
        """The number of clients, n."""
        return self.index.shape[0]


def make_task(module: nn.Module, train: Dataset, test: Dataset, partition: Partition) -> Task:
    """Puts a network, its data and the partition of the data together.

    Args:
      module: flax module, as for `training.fit`.
      train: the data of the clients.
      test: what the global model is judged on.
      partition: of `train`, from one of the functions `partition_...`.

    Returns:
      A `Task`.

    Raises:
      ValueError: data sets that do not fit each other, no test data, a partition that does not fit
        the data, or a client without data.

    Example:
      >>> import jax
      >>> from advjax import data, federated, models
      >>> train, test = data.load("digits", "train"), data.load("digits", "test")
      >>> partition = federated.partition_iid(jax.random.key(0), train.labels, 10)
      >>> federated.make_task(models.make("mlp", 10), train, test, partition).num_clients
      10
    """
    if train.image_shape != test.image_shape or train.num_classes != test.num_classes:
        raise ValueError(
            "make_task: need training and test data of one kind, got images of shape "
            f"{train.image_shape} and {train.num_classes} classes, and {test.image_shape} and "
            f"{test.num_classes}."
        )
    if not len(test):
        raise ValueError("make_task: need at least one test image, got none.")
    index, counts = np.asarray(partition.index), np.asarray(partition.counts)
    if index.ndim != 2 or counts.shape != index.shape[:1]:
        raise ValueError(
            "make_task: need a partition with index [n, s] and counts [n], got shapes "
            f"{index.shape} and {counts.shape}."
        )
    if not index.size or not 1 <= counts.min() <= counts.max() <= index.shape[1]:
        worst = f"client {np.argmin(counts)} has {counts.min()}" if counts.size else "no clients"
        raise ValueError(
            f"make_task: need between 1 and {index.shape[1]} examples a client, but {worst}; leave "
            "out clients without data."
        )
    if index.min() < 0 or index.max() >= len(train):
        raise ValueError(
            f"make_task: the partition refers to examples {index.min()} ... {index.max()}, but "
            f"the training data has {len(train)}."
        )
    arrays = (train.images, train.labels, index, counts, test.images, test.labels)
    return Task(*map(jnp.asarray, arrays), module=module, num_classes=train.num_classes)


def check_mask(caller: str, name: str, mask: Array, num_clients: int) -> np.ndarray:
    """A mask of clients, bool[n], on the host."""
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != (num_clients,):
        raise ValueError(
            f"{caller}: need {name} as bool[{num_clients}], one a client, got {mask.dtype}"
            f"{list(mask.shape)}."
        )
    return mask


def poison_labels(task: Task, is_byzantine: Array, flip: Callable[[Array], Array]) -> Task:
    """Changes the labels of the malicious clients, who then train honestly on them.

    Args:
      task: what the clients would learn.
      is_byzantine: the malicious clients, bool[n].
      flip: labels to labels, int32[e] to int32[e], such as `lambda y: num_classes - 1 - y`.

    Returns:
      A task of the same shapes, for which nothing compiles again.

    Raises:
      ValueError: a mask of another length, or flipped labels of another shape, dtype or range.
    """
    is_byzantine = check_mask("poison_labels", "is_byzantine", is_byzantine, task.num_clients)
    labels, index = np.array(task.labels), np.asarray(task.index)
    rows = index[is_byzantine].ravel()  # a client's padding is its own examples
    flipped = np.asarray(flip(jnp.asarray(labels[rows])))
    if flipped.shape != rows.shape or not np.issubdtype(flipped.dtype, np.integer):
        raise ValueError(
            f"poison_labels: flip must return int32[{len(rows)}], got {flipped.dtype}"
            f"{list(flipped.shape)}."
        )
    low, high = flipped.min(initial=0), flipped.max(initial=0)
    if low < 0 or high >= task.num_classes:
        raise ValueError(
            f"poison_labels: need labels in 0 ... {task.num_classes - 1}, got {low} ... {high}."
        )
    labels[rows] = flipped
    return dataclasses.replace(task, labels=jnp.asarray(labels))
