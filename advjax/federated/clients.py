"""Local work: what a client makes of the global model and its own data in one round.

A client's random numbers are functions of its key alone, which the simulator makes of the round and
the client's number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from advjax.core import checks, random
from advjax.core.typing import Array, Key, TrainingLoss
from advjax.training import cross_entropy
from advjax.training.fitting import TrainingClassifier, as_float

Schedule = Callable[[Array], ArrayLike]


class Client(NamedTuple):
    """The data of one client, and its key of the round.

    Attributes:
      key: a key.
      images: the images of all clients, uint8[examples, h, w, c].
      labels: their labels, int32[examples].
      index: which of them are this client's, int32[s].
      count: how many of these are real.
    """

    key: Key
    images: Array
    labels: Array
    index: Array
    count: Array

    def order(self, epoch: ArrayLike) -> jax.Array:
        """The client's examples in random order, int32[s], the padding last."""
        key = jax.random.fold_in(random.named(self.key, "order"), epoch)
        position = jnp.arange(self.index.shape[0])
        draws = jnp.where(position < self.count, jax.random.uniform(key, position.shape), jnp.inf)
        return self.index[jnp.argsort(draws)]

    def batch(self, order: Array, first: ArrayLike, size: int) -> tuple[Array, Array, Array]:
        """The examples `first ... first + size - 1` of an order, and the weight of each.

        Beyond the last example the first ones follow, with weight 0: the network's batch
        statistics see examples of this client only.
        """
        position = first + jnp.arange(size)
        rows = order[position % self.count]
        weights = (position < self.count).astype(jnp.float32)
        return as_float(self.images[rows]), self.labels[rows], weights


def _gradient(
    module: nn.Module,
    loss_fn: TrainingLoss,
    key: Key,
    params: Any,
    statistics: Any,
    batch: tuple[Array, Array, Array],
) -> tuple[Any, Any]:
    """Gradient of the mean loss of a batch, and the running statistics after it."""
    x, y, weights = batch
    key_loss, key_dropout = jax.random.split(key)

    def mean_loss(params):
        logits_fn = TrainingClassifier(module, params, statistics, key_dropout)
        loss = loss_fn(key_loss, logits_fn, x, y)
        if loss.shape != y.shape:
            raise ValueError(
                f"simulate: loss_fn must return one value an image, {y.shape}, got {loss.shape}."
            )
        return jnp.sum(weights * loss) / jnp.sum(weights), logits_fn.statistics

    return jax.grad(mean_loss, has_aux=True)(params)


@dataclasses.dataclass(frozen=True)
class FedSGD:
    """One gradient a round: `update = -learning_rate * gradient`.

    With worker momentum a client sends `-learning_rate * m`, where
    `m = momentum * m + (1 - momentum) * gradient` starts at zero and only moves in the rounds in
    which the client is drawn.

    Attributes:
      learning_rate: a number, or a schedule of the round, from 0.
      batch_size: examples of the gradient, drawn without replacement; at most what the client has,
        and all of it if None.
      momentum: in [0, 1).
      loss_fn: `(key, logits_fn, x, y) -> f32[b]`.

    Source: B. McMahan et al., AISTATS 2017; worker momentum: S. P. Karimireddy, L. He, M. Jaggi,
    "Learning from History for Byzantine Robust Optimization", ICML 2021.
    """

    learning_rate: float | Schedule = 0.1
    batch_size: int | None = None
    momentum: float = 0.0
    loss_fn: TrainingLoss = cross_entropy

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            checks.at_least("FedSGD", "batch_size", self.batch_size, 1)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"FedSGD: need 0 <= momentum < 1, got momentum={self.momentum}.")

    def init(self, params: Any) -> Any:
        """What a client keeps from round to round: its momentum."""
        return jax.tree.map(jnp.zeros_like, params) if self.momentum else ()

    def train(
        self, module: nn.Module, client: Client, variables: Any, memory: Any, rate: jax.Array
    ) -> tuple[Any, Any]:
        """The change of the variables in one round, and what the client keeps.

        Args:
          module: flax module.
          client: the client.
          variables: of the global model.
          memory: what the client kept, see `init`.
          rate: the learning rate of the round.
        """
        params, statistics = _split(variables)
        size = client.index.shape[0]
        if self.batch_size is None or self.batch_size >= size:
            batch = client.batch(client.index, 0, size)
        else:
            batch = client.batch(client.order(0), 0, self.batch_size)
        key = random.named(client.key, "step")
        gradient, moved = _gradient(module, self.loss_fn, key, params, statistics, batch)
        if self.momentum:
            memory = gradient = jax.tree.map(
                lambda m, g: self.momentum * m + (1 - self.momentum) * g, memory, gradient
            )
        change = jax.tree.map(lambda g: -rate * g, gradient)
        return {"params": change, **_difference(moved, statistics)}, memory


@dataclasses.dataclass(frozen=True)
class FedAvg:
    """Several steps of an optimiser a round: `update = w_i - g`.

    Each epoch visits the client's examples in a new order, the last batch of an epoch holding what
    is left. A client with fewer examples takes fewer steps an epoch. The optimiser starts anew
    each round.

    Attributes:
      learning_rate: a number, or a schedule of the round, from 0.
      num_epochs: passes over the client's data; one if `num_steps` is not given either.
      num_steps: steps, in place of `num_epochs`; they go on from one epoch to the next.
      batch_size: examples a step.
      optimizer: learning rate to an optax optimiser, such as `optax.sgd`, `optax.adam`, or a
        `functools.partial(optax.sgd, momentum=0.5)`.
      loss_fn: `(key, logits_fn, x, y) -> f32[b]`.

    Source: B. McMahan et al., AISTATS 2017.
    """

    learning_rate: float | Schedule = 0.1
    num_epochs: int | None = None
    num_steps: int | None = None
    batch_size: int = 32
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.sgd
    loss_fn: TrainingLoss = cross_entropy

    def __post_init__(self) -> None:
        if self.num_epochs is not None and self.num_steps is not None:
            raise ValueError(
                "FedAvg: need num_epochs or num_steps, got both, "
                f"num_epochs={self.num_epochs} and num_steps={self.num_steps}."
            )
        for name in ("num_epochs", "num_steps", "batch_size"):
            if getattr(self, name) is not None:
                checks.at_least("FedAvg", name, getattr(self, name), 1)
        if not callable(self.optimizer):
            raise ValueError(
                "FedAvg: need optimizer as a function of the learning rate, such as optax.sgd, got "
                f"{type(self.optimizer).__name__}."
            )

    def init(self, params: Any) -> Any:
        """What a client keeps from round to round: nothing."""
        del params
        return ()

    def train(
        self, module: nn.Module, client: Client, variables: Any, memory: Any, rate: jax.Array
    ) -> tuple[Any, Any]:
        """The change of the variables in one round, and what the client keeps.

        Args and returns as `FedSGD.train`.
        """
        start = _split(variables)
        optimizer = self.optimizer(rate)
        size = min(self.batch_size, client.index.shape[0])
        steps_per_epoch = -(-client.count // size)
        num_steps = self.num_steps or (self.num_epochs or 1) * steps_per_epoch
        key_steps = random.named(client.key, "step")

        def run_epoch(epoch, carry):
            order, done = client.order(epoch), epoch * steps_per_epoch

            def step(number, carry):
                params, statistics, opt_state = carry
                key = jax.random.fold_in(key_steps, done + number)
                batch = client.batch(order, number * size, size)
                gradient, statistics = _gradient(
                    module, self.loss_fn, key, params, statistics, batch
                )
                changes, opt_state = optimizer.update(gradient, opt_state, params)
                return optax.apply_updates(params, changes), statistics, opt_state

            stop = jnp.minimum(steps_per_epoch, num_steps - done)
            return jax.lax.fori_loop(0, stop, step, carry)

        num_epochs = -(-num_steps // steps_per_epoch)
        carry = (*start, optimizer.init(start[0]))
        params, statistics, _ = jax.lax.fori_loop(0, num_epochs, run_epoch, carry)
        return _difference({"params": params, **statistics}, variables), memory


def _split(variables: Any) -> tuple[Any, Any]:
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


def _difference(new: Any, old: Any) -> Any:
    return jax.tree.map(jnp.subtract, new, old)
