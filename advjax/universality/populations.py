"""Random architectures, hundreds of them trained in one program."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from advjax import training
from advjax.core import checks, random
from advjax.core.typing import Array, Key, TrainingLoss
from advjax.data import Dataset
from advjax.training import fitting
from advjax.universality.networks import KINDS, PaddedNetwork, initial_variables


class Range(NamedTuple):
    """What may be sampled, ends included."""

    depth: tuple[int, int]
    width: tuple[int, int]
    paddings: tuple[int, ...]


# A padded layer costs what its padding costs, and every padding a compilation.
RANGES = {
    "fully_connected": Range((1, 4), (30, 2000), (64, 128, 256, 512, 768, 1024, 1408, 1700, 2000)),
    "cnn": Range((1, 3), (4, 64), (8, 16, 24, 32, 48, 64)),
}
MOST_DROPOUT = 0.5
_LARGEST_SIDE_BY_SIDE = 128


class Architectures(NamedTuple):
    """A list of architectures, on the host.

    Attributes:
      index: the number of each, which makes its key, int32[m].
      depth: hidden layers, int32[m].
      width: units (or channels) of each hidden layer, int32[m].
      dropout: share of the units that training drops, f32[m].
    """

    index: np.ndarray
    depth: np.ndarray
    width: np.ndarray
    dropout: np.ndarray

    def take(self, rows: Any) -> "Architectures":
        """Some of them, by rows or by a mask."""
        return Architectures(*(field[rows] for field in self))


def sample_architectures(
    key: Key,
    num: int,
    *,
    kind: str = "fully_connected",
    depth: tuple[int, int] | None = None,
    width: tuple[int, int] | None = None,
    dropout: tuple[float, float] = (0.0, MOST_DROPOUT),
) -> Architectures:
    """Draws architectures.

    The depth is uniform, the width log-uniform and the same in all hidden layers of a network, the
    dropout rate uniform. The paper's 1 to 4 hidden layers of 30 to 2,000 units are the default;
    log-uniform and of one width is our choice, three times cheaper than uniform.

    Args:
      key: a key.
      num: how many.
      kind: "fully_connected", or "cnn": 1 to 3 convolutions of 4 to 64 channels.
      depth: fewest and most hidden layers, within the range of the kind; that range if None.
      width: least and largest width, likewise.
      dropout: least and largest rate, within 0 to 0.5.

    Returns:
      `Architectures`; number i depends on the key and i alone.

    Raises:
      ValueError: an unknown kind, or what lies outside of its range.

    Example:
      >>> import jax
      >>> sample_architectures(jax.random.key(0), 3, depth=(2, 2), width=(30, 30)).width
      array([30, 30, 30], dtype=int32)

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017.
    """
    checks.known("sample_architectures", "kind", kind, KINDS)
    checks.at_least("sample_architectures", "num", num, 1)
    depth, width = depth or RANGES[kind].depth, width or RANGES[kind].width
    _check_range("sample_architectures", kind, depth=depth, width=width, dropout=dropout)
    key = random.as_typed(key)

    def draw(index: Array) -> tuple[Array, ...]:
        key_depth, key_width, key_dropout = jax.random.split(jax.random.fold_in(key, index), 3)
        logs = jnp.log(jnp.array(width, jnp.float32))
        widths = jnp.exp(jax.random.uniform(key_width, (), minval=logs[0], maxval=logs[1]))
        return (
            jax.random.randint(key_depth, (), depth[0], depth[1] + 1),
            jnp.clip(jnp.round(widths).astype(jnp.int32), *width),
            jax.random.uniform(key_dropout, (), minval=dropout[0], maxval=dropout[1]),
        )

    index = np.arange(num, dtype=np.int32)
    return Architectures(index, *map(np.asarray, jax.vmap(draw)(index)))


def _check_range(caller: str, kind: str, **given: Sequence[float]) -> None:
    limits = {
        "depth": RANGES[kind].depth, "width": RANGES[kind].width, "dropout": (0.0, MOST_DROPOUT)
    }  # fmt: skip
    for name, values in given.items():
        low, high = limits[name]
        if not low <= min(values) <= max(values) <= high or list(values) != sorted(values):
            raise ValueError(
                f"{caller}: need {low} <= {name} <= {high} for {kind}, got {name}={values}."
            )


class Group(NamedTuple):
    """Architectures that are one program.

    Attributes:
      module: their padded network.
      members: which they are.
    """

    module: PaddedNetwork
    members: Architectures


def group_architectures(
    architectures: Architectures,
    num_classes: int,
    *,
    kind: str = "fully_connected",
    paddings: Sequence[int] | None = None,
    size: int = 32,
) -> list[Group]:
    """Puts architectures of one depth and like width together.

    Args:
      architectures: what `sample_architectures` returned, or some of them.
      num_classes: k.
      kind: as there.
      paddings: the widths of the arrays; each architecture gets the least that holds it. By default
        nine from 64 to 2000 (six from 8 to 64 for "cnn").
      size: architectures a group, at most; a further group of the same size does not compile.

    Returns:
      A list of `Group`, every architecture in one of them.

    Raises:
      ValueError: an architecture out of the range of its kind or wider than all paddings.
    """
    checks.known("group_architectures", "kind", kind, KINDS)
    checks.at_least("group_architectures", "size", size, 1)
    for name in ("depth", "width", "dropout"):
        for value in getattr(architectures, name):
            _check_range("group_architectures", kind, **{name: (value.item(),)})
    sizes = np.sort(RANGES[kind].paddings if paddings is None else paddings)
    if architectures.width.max() > sizes[-1]:
        raise ValueError(
            f"group_architectures: need paddings up to the largest width "
            f"{architectures.width.max()}, got {sizes.tolist()}."
        )
    held = sizes[np.searchsorted(sizes, architectures.width)]
    groups = []
    for depth, padding in sorted(
        set(zip(architectures.depth.tolist(), held.tolist(), strict=True))
    ):
        rows = np.flatnonzero((architectures.depth == depth) & (held == padding))
        module = PaddedNetwork(num_classes, kind, depth, padding)
        groups.extend(
            Group(module, architectures.take(rows[first : first + size]))
            for first in range(0, len(rows), size)
        )
    return groups


class Trained(NamedTuple):
    """A group of trained networks.

    Attributes:
      module: their padded network; `advjax.bind(module, variables)` is a stack.
      members: which they are.
      variables: with a leading model axis.
    """

    module: PaddedNetwork
    members: Architectures
    variables: Any


_ADAM = optax.adam(1e-3)


def train_architectures(
    key: Key,
    groups: Sequence[Group],
    dataset: Dataset,
    *,
    loss_fn: TrainingLoss = training.cross_entropy,
    optimizer: optax.GradientTransformation = _ADAM,
    num_epochs: int = 3,
    batch_size: int = 64,
    method: str | None = None,
) -> Iterator[Trained]:
    """Trains architectures group by group.

    One group after the other is trained and handed out, so that thousands need the memory of one
    group, and what is done with a group can be written down before the next. A network's key is
    that of its index: which others are trained with it, or before it, does not matter.

    Args:
      key: a key; another one than `sample_architectures` had.
      groups: what `group_architectures` returned, or those that are still missing.
      dataset: training images and labels.
      loss_fn: `(key, logits_fn, x, y) -> f32[b]`.
      optimizer: an optax optimiser; Adam at 1e-3 by default. One that is made anew compiles anew.
      num_epochs: passes over the data, each in a new order and without the last incomplete batch.
      batch_size: images a step.
      method: "vmap" trains a group side by side, "map" one network after the other; by default side
        by side up to a width of 128, beyond which a CPU gains nothing by it.

    Yields:
      A `Trained` for each group.

    Static: loss_fn, optimizer, num_epochs, batch_size, method.

    Raises:
      ValueError: a count below 1, an unknown method, an empty data set, networks of too few
        classes.
    """
    checks.at_least("train_architectures", "num_epochs", num_epochs, 1)
    checks.at_least("train_architectures", "batch_size", batch_size, 1)
    checks.known("train_architectures", "method", str(method), ("None", "vmap", "map"))
    checks.at_least("train_architectures", "number of images", len(dataset), 1)
    for module, _ in groups:
        if dataset.num_classes > module.num_classes:
            raise ValueError(
                f"train_architectures: need networks of {dataset.num_classes} classes, as the data "
                f"set has, got num_classes={module.num_classes}."
            )
    images, labels = jnp.asarray(dataset.images), jnp.asarray(dataset.labels)
    key = random.as_typed(key)
    for module, members in groups:
        chosen = method or ("vmap" if module.padding <= _LARGEST_SIDE_BY_SIDE else "map")
        variables = train_group(
            random.fold_in_each(key, members.index),
            {"width": members.width, "dropout": members.dropout}, images, labels,
            module=module, loss_fn=loss_fn, optimizer=optimizer, num_epochs=num_epochs,
            batch_size=min(batch_size, len(dataset)), method=chosen,
        )  # fmt: skip
        yield Trained(module, members, variables)


@functools.partial(
    jax.jit,
    static_argnames=("module", "loss_fn", "optimizer", "num_epochs", "batch_size", "method"),
)
def train_group(
    keys: Key,
    architectures: Mapping[str, Array],
    images: Array,
    labels: Array,
    *,
    method: str,
    **settings: Any,
) -> Any:
    """Trains networks of one module, in one program.

    Args:
      keys: one a network, [m].
      architectures: what `networks.initial_variables` takes, with a leading model axis.
      images: training images.
      labels: their labels, int32[n].
      method: "vmap" or "map".
      **settings: module, loss_fn, optimizer, num_epochs, batch_size.

    Returns:
      The variables, with a leading model axis.
    """
    train_one = functools.partial(_train_one, images=images, labels=labels, **settings)
    if method == "vmap":
        return jax.vmap(train_one)(keys, architectures)
    return jax.lax.map(lambda one: train_one(*one), (keys, architectures))


def _train_one(
    key: Key,
    architecture: Mapping[str, Array],
    *,
    images: Array,
    labels: Array,
    module: nn.Module,
    loss_fn: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    num_epochs: int,
    batch_size: int,
) -> Any:
    """A training run as a pure function."""
    key_init, key_order, key_step = jax.random.split(key, 3)
    variables = initial_variables(module, key_init, fitting.as_float(images[:1]), architecture)
    statistics = {"architecture": variables["architecture"]}
    num_steps = images.shape[0] // batch_size

    def epoch(number, state):
        order = jax.random.permutation(jax.random.fold_in(key_order, number), images.shape[0])

        def step(i, state):
            params, opt_state = state
            done = number * num_steps + i
            key = jax.random.fold_in(key_step, done)
            key_loss, key_dropout = jax.random.split(key)
            rows = jax.lax.dynamic_slice(order, (i * batch_size,), (batch_size,))
            x, y = fitting.as_float(images[rows]), labels[rows]

            def mean_loss(params):
                logits_fn = fitting.TrainingClassifier(
                    module, params, statistics, key_dropout, done / (num_epochs * num_steps)
                )
                return jnp.mean(loss_fn(key_loss, logits_fn, x, y))

            updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return jax.lax.fori_loop(0, num_steps, step, state)

    state = (variables["params"], optimizer.init(variables["params"]))
    params, _ = jax.lax.fori_loop(0, num_epochs, epoch, state)
    return {"params": params, **statistics}


def num_parameters(group: Group | Trained, image_shape: Sequence[int]) -> np.ndarray:
    """Parameters of each member without its padding, int64[m].

    Args:
      group: the networks.
      image_shape: height, width and channels of an image.
    """
    module, width = group.module, group.members.width.astype(np.int64)
    height, breadth, channels = image_shape
    if module.kind == "cnn":
        first, taps = 9 * channels, 9
        sites = (height >> module.depth) * (breadth >> module.depth)
    else:
        first, taps, sites = height * breadth * channels, 1, 1
    hidden = (first + 1) * width + (module.depth - 1) * (taps * width + 1) * width
    return hidden + (sites * width + 1) * module.num_classes
