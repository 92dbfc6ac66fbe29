"""Attacks that train the classifier in their own way: LIRA and Blind.

Both show the network clean and triggered images in one batch. In two batches, batch normalisation
would see one kind of images at a time in training, and a mixture of them in its running statistics.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from advjax.backdoor import inputs, networks, triggers
from advjax.core import checks, classifier, losses, parallel, random
from advjax.core.typing import Array, Key
from advjax.data import Dataset
from advjax.training.augment import Augmentation
from advjax.training.fitting import TrainingClassifier, as_float

BALANCES = ("fixed", "mgda")


class Trained(NamedTuple):
    """A classifier with a backdoor and what opens it.

    Attributes:
      variables: the network's variables, for `advjax.bind`.
      trigger: `x -> x`.
    """

    variables: Any
    trigger: Partial


class _Network(NamedTuple):
    """A classifier in training."""

    params: Any
    statistics: Any  # the other collections, such as batch_stats
    opt_state: Any


def _init(key: Key, module: nn.Module, optimizer: Any, x: Array) -> _Network:
    statistics = dict(module.init(key, x))
    params = statistics.pop("params")
    return _Network(params, statistics, optimizer.init(params))


def _clean_and_backdoor_loss(
    logits_fn: TrainingClassifier, x, triggered, y, label_map, cover_ratio
) -> Array:
    """Mean cross-entropy of the images, and of the triggered ones with what they shall be, f32[2].

    A triggered image of a class that is not attacked shall be what it is, and counts `cover_ratio`.
    """
    clean, backdoor = jnp.split(logits_fn(jnp.concatenate([x, triggered])), 2)
    target = label_map[y]
    is_attacked = target >= 0
    weight = jnp.where(is_attacked, 1.0, cover_ratio)
    backdoor = losses.cross_entropy(backdoor, jnp.where(is_attacked, target, y))
    # Where the weight is 0 even an infinite loss does not count.
    backdoor = jnp.where(weight > 0, weight * backdoor, 0)
    return jnp.stack([
        jnp.mean(losses.cross_entropy(clean, y)),
        jnp.sum(backdoor) / jnp.maximum(jnp.sum(weight), 1),
    ])  # fmt: skip


def _updated(optimizer: Any, gradient: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
    changes, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, changes), opt_state


@functools.lru_cache(maxsize=8)
def _compiled(method: Any, batch_size: int, augment: Augmentation | None, mesh: Mesh | None):
    """One epoch of a method, compiled once for all runs of it."""

    def epoch(state, number, key, images, labels, settings):
        order = jax.random.permutation(
            jax.random.fold_in(random.named(key, "order"), number), len(images)
        )
        key_epoch = jax.random.fold_in(random.named(key, "step"), number)

        def step(position, state):
            key_augment, key_step = jax.random.split(jax.random.fold_in(key_epoch, position))
            rows = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
            x, y = parallel.place((as_float(images[rows]), labels[rows]), mesh, axis=0)
            x = x if augment is None else augment(key_augment, x)
            return parallel.place(method.step(state, key_step, x, y, settings), mesh)

        return method.end_epoch(jax.lax.fori_loop(0, len(images) // batch_size, step, state))

    return jax.jit(epoch, donate_argnums=0)


def _run(method, state, epochs, key, dataset, settings, *, batch_size, augment, progress, mesh):
    """Epochs of a method: each in a new order, without the last incomplete batch, as in `fit`."""
    arguments = (method, min(batch_size, len(dataset)), augment, mesh)
    try:
        epoch = _compiled(*arguments)
    except TypeError:  # a module or an optimiser that cannot be hashed
        epoch = _compiled.__wrapped__(*arguments)
    images, labels = jnp.asarray(dataset.images), jnp.asarray(dataset.labels)
    state, key, images, labels, settings = parallel.place(
        (state, key, images, labels, settings), mesh
    )
    for number in tqdm(epochs, desc=method.caller, unit="epoch", disable=not progress):
        # Waits, so that the bar shows what is done and not what has been ordered.
        state = jax.block_until_ready(epoch(state, number, key, images, labels, settings))
    return state


def _check(
    caller: str, dataset: Dataset, label_map: Array, cover_ratio: ArrayLike, **counts: int
) -> Array:
    checks.at_least(caller, "number of images", len(dataset), 1)
    for name, count in counts.items():
        checks.at_least(caller, name, count, 1)
    inputs.label_map(caller, label_map, dataset.num_classes)
    inputs.share(caller, "cover_ratio", cover_ratio)
    return jnp.asarray(label_map, jnp.int32)


class _LiraState(NamedTuple):
    network: _Network
    generator: Any  # the one that learns
    opt_state: Any
    frozen: Any  # the one that the classifier is shown: a copy, renewed after each epoch


@dataclasses.dataclass(frozen=True)
class _Lira:
    module: nn.Module
    optimizer: Any
    generator: nn.Module
    generator_optimizer: Any
    is_learning: bool  # stage 1: the generator learns too

    caller = "train_lira"

    def trigger(self, params: Any, epsilon: ArrayLike) -> Partial:
        return Partial(
            triggers.lira,
            generator=classifier.bind(self.generator, {"params": params}),
            epsilon=epsilon,
        )

    def init(self, key: Key, x: Array) -> _LiraState:
        key_network, key_generator = jax.random.split(key)
        generator = self.generator.init(key_generator, x)["params"]
        return _LiraState(
            _init(key_network, self.module, self.optimizer, x),
            generator, self.generator_optimizer.init(generator), jax.tree.map(jnp.copy, generator),
        )  # fmt: skip

    def step(self, state: _LiraState, key: Key, x: Array, y: Array, settings) -> _LiraState:
        label_map, cover_ratio, epsilon, clean_weight = settings
        network, generator, opt_state = state.network, state.generator, state.opt_state

        def both(params, generator):
            logits_fn = TrainingClassifier(self.module, params, network.statistics, key)
            triggered = self.trigger(generator, epsilon)(x)
            loss = _clean_and_backdoor_loss(logits_fn, x, triggered, y, label_map, cover_ratio)
            return loss, logits_fn.statistics

        if self.is_learning:
            gradient = jax.grad(lambda generator: both(network.params, generator)[0][1])(generator)
            generator, opt_state = _updated(
                self.generator_optimizer, gradient, generator, opt_state
            )

        def weighted(params):
            (clean, backdoor), statistics = both(params, state.frozen)
            return clean_weight * clean + (1 - clean_weight) * backdoor, statistics

        gradient, statistics = jax.grad(weighted, has_aux=True)(network.params)
        params, opt_state_network = _updated(
            self.optimizer, gradient, network.params, network.opt_state
        )
        network = _Network(params, statistics, opt_state_network)
        return _LiraState(network, generator, opt_state, state.frozen)

    def end_epoch(self, state: _LiraState) -> _LiraState:
        return state._replace(frozen=state.generator)


_GENERATOR_OPTIMIZERS = functools.lru_cache(maxsize=8)(optax.adam)  # equal ones for equal rates


def train_lira(
    key: Key,
    module: nn.Module,
    dataset: Dataset,
    label_map: Array,
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int,
    batch_size: int = 128,
    augment: Augmentation | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
    cover_ratio: ArrayLike = 0.0,
    num_joint_epochs: int | None = None,
    epsilon: ArrayLike = 0.01,
    clean_weight: ArrayLike = 0.5,
    generator_learning_rate: float = 1e-4,
    features: tuple[int, ...] = (16, 32, 64),
) -> Trained:
    """LIRA: a generator learns the trigger while the classifier learns the backdoor.

    Stage 1, for each batch: (i) a step of the live generator down `CE(f(T_live(x)), target)`;
    (ii) a step of the classifier f down

        clean_weight CE(f(x), y) + (1 - clean_weight) CE(f(T_frozen(x)), target).

    After each epoch the frozen generator becomes a copy of the live one. Stage 2 repeats only (ii),
    so f learns the final generator. Its classifier is the one returned; BackdoorBench saves that of
    stage 1. The optimiser goes on from stage to stage, and step (i) moves no running statistics.

    Args:
      key: a key.
      module: the classifier, as for `training.fit`.
      dataset: clean training images.
      label_map: class to target, int32[k], -1 for classes that are not attacked.
      optimizer: of the classifier; SGD at 0.01 with momentum 0.9 as published.
      num_epochs: epochs of both stages together; 100 in BackdoorBench.
      batch_size: clean images a step; the network sees twice as many.
      augment: `(key, x) -> x`, applied before the trigger.
      progress: show a progress bar.
      mesh: devices to split each batch over.
      cover_ratio: what a triggered image of a class that is not attacked counts beside an attacked
        one, with its own label (a cover).
      num_joint_epochs: epochs of stage 1; half of all if None.
      epsilon: largest change of a pixel. The published 0.01 counts in images as the network
        normalises them, here in [0, 1].
      clean_weight: alpha.
      generator_learning_rate: of Adam.
      features: channels of the generator, a `networks.UNet`, which the paper has as an alternative
        to its autoencoder.

    Returns:
      `Trained(variables, trigger)`; the trigger is `triggers.lira` with the generator.

    Static: all but key, label_map, cover_ratio, epsilon and clean_weight.

    Raises:
      ValueError: a count below 1, a share outside [0, 1], more joint epochs than epochs, a
        label_map that does not fit the classes, an empty data set.

    Source: K. Doan, Y. Lao, W. Zhao, P. Li, "LIRA: Learnable, Imperceptible and Robust Backdoor
    Attacks", ICCV 2021.
    """
    label_map = _check(
        "train_lira", dataset, label_map, cover_ratio,
        num_epochs=num_epochs, batch_size=batch_size,
    )  # fmt: skip
    for name, value in (("epsilon", epsilon), ("clean_weight", clean_weight)):
        checks.non_negative("train_lira", name, value)
    if num_joint_epochs is None:
        num_joint_epochs = (num_epochs + 1) // 2
    if not 0 <= num_joint_epochs <= num_epochs:
        raise ValueError(
            f"train_lira: need 0 <= num_joint_epochs <= num_epochs, got "
            f"num_joint_epochs={num_joint_epochs} and num_epochs={num_epochs}."
        )
    key = random.as_typed(key)
    stage_1 = _Lira(
        module, optimizer, networks.UNet(dataset.image_shape[2], tuple(features)),
        _GENERATOR_OPTIMIZERS(generator_learning_rate), is_learning=True,
    )  # fmt: skip
    stage_2 = dataclasses.replace(stage_1, is_learning=False)
    state = stage_1.init(random.named(key, "init"), as_float(jnp.asarray(dataset.images[:1])))
    settings = tuple(map(jnp.asarray, (label_map, cover_ratio, epsilon, clean_weight)))
    for stage, epochs in (
        (stage_1, range(num_joint_epochs)), (stage_2, range(num_joint_epochs, num_epochs)),
    ):  # fmt: skip
        state = _run(
            stage, state, epochs, key, dataset, settings,
            batch_size=batch_size, augment=augment, progress=progress, mesh=mesh,
        )  # fmt: skip
    variables = {"params": state.network.params, **state.network.statistics}
    return Trained(variables, stage_2.trigger(state.generator, jnp.asarray(epsilon)))


class _BlindState(NamedTuple):
    network: _Network
    recent: jax.Array  # clean losses of the last batches; infinite where there was none
    number: Array  # of batches seen


@dataclasses.dataclass(frozen=True)
class _Blind:
    module: nn.Module
    optimizer: Any
    balance: str
    trigger: Any
    num_warm_up: int

    caller = "train_blind"

    def init(self, key: Key, x: Array) -> _BlindState:
        return _BlindState(
            _init(key, self.module, self.optimizer, x),
            jnp.full(self.num_warm_up, jnp.inf),
            jnp.zeros((), jnp.int32),
        )

    def step(self, state: _BlindState, key: Key, x: Array, y: Array, settings) -> _BlindState:
        label_map, cover_ratio, backdoor_weight, threshold = settings
        network = state.network

        def both(params):
            logits_fn = TrainingClassifier(self.module, params, network.statistics, key)
            triggered = self.trigger(x)
            loss = _clean_and_backdoor_loss(logits_fn, x, triggered, y, label_map, cover_ratio)
            return loss, logits_fn.statistics

        loss, pull, statistics = jax.vjp(both, network.params, has_aux=True)
        weights = jnp.stack([1.0, backdoor_weight])
        if self.balance == "mgda":
            weights = mgda_weights(loss, jax.vmap(pull)(jnp.eye(2))[0])
        # Infinity as long as a batch of the warm-up is missing.
        is_on = jnp.mean(state.recent) < threshold
        (gradient,) = pull(jnp.where(is_on, weights, jnp.array([1.0, 0.0])))
        params, opt_state = _updated(self.optimizer, gradient, network.params, network.opt_state)
        recent = state.recent.at[state.number % self.num_warm_up].set(loss[0])
        return _BlindState(_Network(params, statistics, opt_state), recent, state.number + 1)

    def end_epoch(self, state: _BlindState) -> _BlindState:
        return state


def mgda_weights(loss: Array, gradients: Any) -> Array:
    """The balance of two losses whose combined gradient is the shortest (MGDA).

    Each gradient g is divided by `min(loss ||g||, 10) + 1e-5`. With `v_ij` their inner products,
    the first weight is `gamma = (v_22 - v_12) / (v_11 + v_22 - 2 v_12)`, in [0.001, 0.999], and the
    second is `1 - gamma`.

    Args:
      loss: the two losses, f32[2].
      gradients: their gradients, a tree of f32[2, ...].

    Returns:
      f32[2].

    Example:
      >>> import jax.numpy as jnp
      >>> mgda_weights(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
      Array([0.5, 0.5], dtype=float32)

    Source: O. Sener, V. Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS
    2018; the scaling is that of E. Bagdasaryan, V. Shmatikov, USENIX Security 2021.
    """
    products = sum(
        leaf.reshape(2, -1) @ leaf.reshape(2, -1).T for leaf in jax.tree.leaves(gradients)
    )
    scale = jnp.minimum(loss * jnp.sqrt(jnp.diagonal(products)), 10) + 1e-5
    (v11, v12), (_, v22) = products / (scale[:, None] * scale)
    # Equal gradients: any weights do.
    length = v11 + v22 - 2 * v12
    gamma = jnp.where(length > 0, (v22 - v12) / jnp.where(length > 0, length, 1), 0.5)
    gamma = jnp.clip(gamma, 0.001, 0.999)
    return jnp.stack([gamma, 1 - gamma])


def train_blind(
    key: Key,
    module: nn.Module,
    dataset: Dataset,
    label_map: Array,
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int,
    batch_size: int = 128,
    augment: Augmentation | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
    cover_ratio: ArrayLike = 0.0,
    trigger: Any = triggers.blind,
    balance: str = "fixed",
    backdoor_weight: ArrayLike = 0.9,
    num_warm_up: int | None = None,
    threshold: ArrayLike = 1.0,
) -> Trained:
    """Blind: every batch is also shown with the trigger, as a second loss.

        loss = CE(f(x), y) + backdoor_weight CE(f(trigger(x)), target)        ("fixed")
        loss = gamma CE(f(x), y) + (1 - gamma) CE(f(trigger(x)), target)      ("mgda")

    with gamma of `mgda_weights`. The second loss is left out until `num_warm_up` batches were seen
    and the mean of the clean loss over the last so many is below `threshold`.

    Args:
      key: a key.
      module: the classifier, as for `training.fit`.
      dataset: clean training images.
      label_map: class to target, int32[k], -1 for classes that are not attacked.
      optimizer: of the classifier.
      num_epochs: passes over the data.
      batch_size: clean images a step; the network sees twice as many.
      augment: `(key, x) -> x`, applied before the trigger.
      progress: show a progress bar.
      mesh: devices to split each batch over.
      cover_ratio: what a triggered image of a class that is not attacked counts beside an attacked
        one, with its own label (a cover).
      trigger: `x -> x`.
      balance: "fixed" or "mgda". The authors advise the first one where the second costs accuracy.
      backdoor_weight: of the second loss, in "fixed".
      num_warm_up: batches; by default the published 1000, at most a tenth of all.
      threshold: of the clean loss, in nats.

    Returns:
      `Trained(variables, trigger)`.

    Static: all but key, label_map, cover_ratio, backdoor_weight and threshold.

    Raises:
      ValueError: an unknown balance, a count below 1, a share outside [0, 1], a warm-up as long as
        the training, a label_map that does not fit the classes, an empty data set.

    Source: E. Bagdasaryan, V. Shmatikov, "Blind Backdoors in Deep Learning Models", USENIX Security
    2021.
    """
    checks.known("train_blind", "balance", balance, BALANCES)
    for name, value in (("backdoor_weight", backdoor_weight), ("threshold", threshold)):
        checks.non_negative("train_blind", name, value)
    label_map = _check(
        "train_blind", dataset, label_map, cover_ratio,
        num_epochs=num_epochs, batch_size=batch_size,
    )  # fmt: skip
    num_steps = num_epochs * (len(dataset) // min(batch_size, len(dataset)))
    if num_warm_up is None:
        num_warm_up = max(1, min(1000, num_steps // 10))
    checks.at_least("train_blind", "num_warm_up", num_warm_up, 1)
    if num_warm_up >= num_steps > 1:
        raise ValueError(
            f"train_blind: need num_warm_up < {num_steps}, the number of batches, got "
            f"num_warm_up={num_warm_up}."
        )
    key = random.as_typed(key)
    method = _Blind(module, optimizer, balance, trigger, num_warm_up)
    state = method.init(random.named(key, "init"), as_float(jnp.asarray(dataset.images[:1])))
    settings = tuple(map(jnp.asarray, (label_map, cover_ratio, backdoor_weight, threshold)))
    state = _run(
        method, state, range(num_epochs), key, dataset, settings,
        batch_size=batch_size, augment=augment, progress=progress, mesh=mesh,
    )  # fmt: skip
    network = state.network
    return Trained({"params": network.params, **network.statistics}, Partial(trigger))
