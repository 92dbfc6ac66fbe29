"""Classifiers as values: a network bound to its weights, and a stack of such networks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax.tree_util import Partial

from advjax.core.typing import Array, Key, LogitsFn


@dataclasses.dataclass(frozen=True)
class _Apply:
    """A module's `apply`, equal for equal modules, so that rebuilding one does not recompile."""

    module: nn.Module
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, variables: Mapping[str, Any], x: Array) -> Array:
        logits = self.module.apply(variables, x, **dict(self.options))
        return jnp.asarray(logits)


def bind(module: nn.Module, variables: Mapping[str, Any], **options: Any) -> Partial:
    """Binds a network to its weights: a classifier that is a pytree.

    Because the weights are leaves, new weights never recompile a jitted function that takes the
    classifier as an argument, and a stack of classifiers runs under `vmap`.

    Args:
      module: a flax module whose `__call__` maps images f32[b, h, w, c] in [0, 1] to logits
        f32[b, k]. The networks of `advjax.models` are in inference mode unless told otherwise:
        dropout is off and batch normalisation uses its running statistics.
      variables: the module's variables, `{"params": ..., "batch_stats": ...}`.
      **options: static keyword arguments for each call of the module.

    Returns:
      `logits_fn`, a `jax.tree_util.Partial` with `variables` as its leaves.

    Raises:
      ValueError: `variables` has no "params" collection.

    Example:
      >>> import advjax, jax
      >>> from advjax import models
      >>> net = models.make("mlp", num_classes=10)
      >>> x = jax.numpy.zeros((2, 8, 8, 1))
      >>> logits_fn = advjax.bind(net, net.init(jax.random.key(0), x))
      >>> logits_fn(x).shape
      (2, 10)
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        given = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"bind: variables need a 'params' collection, got {given}.")
    return Partial(_Apply(module, tuple(sorted(options.items()))), dict(variables))


def stack(logits_fns: Sequence[LogitsFn]) -> LogitsFn:
    """Stacks classifiers of one architecture into one with a leading model axis on its leaves.

    Args:
      logits_fns: what `bind` returned, at least one, all of the same architecture.

    Returns:
      A classifier for `vmap`: `jax.vmap(lambda f: f(x))(stack(fs))` is f32[models, b, k].

    Raises:
      ValueError: no classifier, or classifiers of different architectures.

    Example:
      >>> import advjax, jax
      >>> from advjax import models
      >>> net, x = models.make("mlp", num_classes=10), jax.numpy.zeros((2, 8, 8, 1))
      >>> fs = [advjax.bind(net, net.init(jax.random.key(seed), x)) for seed in range(3)]
      >>> jax.vmap(lambda f: f(x))(advjax.stack(fs)).shape
      (3, 2, 10)
    """
    if not logits_fns:
        raise ValueError("stack: need at least one classifier, got none.")
    signatures = [_signature(f) for f in logits_fns]
    for position, signature in enumerate(signatures):
        if signature != signatures[0]:
            raise ValueError(
                "stack: all classifiers must have one architecture, but number "
                f"{position} differs from number 0 in its structure or its shapes."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *logits_fns)


def stack_size(stack: Any) -> int:
    """How many functions a stack (`stack`) holds; 0 if it is no stack."""
    sizes = {
        jnp.shape(leaf)[:1] if hasattr(leaf, "dtype") else () for leaf in jax.tree.leaves(stack)
    }
    return sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 0


def _signature(logits_fn: LogitsFn):
    leaves, structure = jax.tree.flatten(logits_fn)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def as_pytree(logits_fn: LogitsFn) -> Any:
    """The classifier as something that may cross a jit boundary.

    Itself where it is a pytree of any kind, such as a `Partial` or a `Randomised`; else a `Partial`
    of it.
    """
    return Partial(logits_fn) if jax.tree_util.all_leaves([logits_fn]) else logits_fn


def _first_sentence(error: Exception) -> str:
    """What flax says, without the address of its page."""
    return " ".join(str(error).partition(" (https://")[0].split())


def num_classes(logits_fn: LogitsFn, x: Array) -> int:
    """Number of classes that the classifier tells apart, found from shapes alone.

    Raises:
      ValueError: the classifier does not take images of this shape, or does not return logits of
        shape [b, k], or is a network without its weights.
    """
    if isinstance(logits_fn, nn.Module):
        raise ValueError(
            f"logits_fn: need a classifier, advjax.bind(module, variables), got the module "
            f"{type(logits_fn).__name__} alone."
        )
    try:
        logits = jax.eval_shape(logits_fn, jax.ShapeDtypeStruct(x.shape, x.dtype))
    except ScopeParamShapeError as error:
        raise ValueError(
            f"logits_fn: the weights do not fit images of shape {tuple(x.shape)}: "
            f"{_first_sentence(error)}"
        ) from error
    if not hasattr(logits, "shape"):
        raise ValueError(f"logits_fn: need one array of logits, got {type(logits).__name__}.")
    shape = logits.shape
    if len(shape) != 2 or shape[0] != x.shape[0]:
        raise ValueError(
            f"logits_fn: need logits of shape [{x.shape[0]}, k] for images of shape "
            f"{tuple(x.shape)}, got {tuple(shape)}."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits_fn: need logits that are floats, got dtype {logits.dtype}.")
    return shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Randomised:
    """A classifier that draws random numbers, with the key of its draws: itself a classifier.

    Attributes:
      function: `(key, x) -> logits`; best a pytree, such as a `Partial` with the weights.
      key: a key, or one key an example [b] where the function takes that.
    """

    function: Any
    key: Key

    def __post_init__(self):
        # A plain function is no pytree. What jax puts here while it flattens stays as it is.
        if callable(self.function):
            object.__setattr__(self, "function", as_pytree(self.function))

    def __call__(self, x: Array) -> Array:
        return self.function(self.key, x)

    def mean_of(self, num_samples: int) -> Partial:
        """The classifier whose logits are the mean over draws (expectation over transformation).

        Args:
          num_samples: how many draws; always the same ones.
        """
        return Partial(_Mean(num_samples), self)


@dataclasses.dataclass(frozen=True)
class _Mean:
    num_samples: int

    def __call__(self, classifier: Randomised, x: Array) -> Array:
        keys = _split(classifier.key, self.num_samples)
        return jnp.mean(jax.lax.map(lambda key: classifier.function(key, x), keys), axis=0)


def _split(key: Key, num: int) -> Key:
    """New keys [num]; of a key for each example [b], keys [num, b]."""
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim:
        return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, num))(key), 1, 0)
    return jax.random.split(key, num)
