"""Networks that make triggers, and what attacks look at inside a classifier."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from advjax.core.typing import Array
from advjax.models import layers


class UNet(nn.Module):
    """A small U-Net: convolutions down to coarser maps, and up again beside the finer ones.

    It has no batch normalisation, so a trigger does not depend on the other images of a batch.

    Fields:
        outputs: channels of the result.
        features: channels at each resolution, the finest first; each halves the one before.
    """

    outputs: int
    features: tuple[int, ...] = (8, 16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images f32[b, h, w, c], of any height and width, to f32[b, h, w, outputs]."""
        maps = []
        for i, features in enumerate(self.features):
            x = nn.relu(layers.Conv(features, strides=1 if i == 0 else 2, name=f"down{i}")(x))
            maps.append(x)
        for i in reversed(range(len(maps) - 1)):
            x = jnp.concatenate([enlarged(x, 2, maps[i].shape[1:3]), maps[i]], axis=-1)
            x = nn.relu(layers.Conv(self.features[i], name=f"up{i}")(x))
        return layers.Conv(self.outputs, name="output")(x)


class BitsEncoder(nn.Module):
    """A change of an image that hides bits in it: the bits as a coarse map beside the image.

    Fields:
        features: of the `UNet`.
    """

    features: tuple[int, ...] = (8, 16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array, bits: jax.Array) -> jax.Array:
        """Images f32[b, h, w, c] and bits f32[b, n] of 0 and 1 to f32[b, h, w, c]."""
        _, height, width, channels = x.shape
        # As many channels as the U-Net starts with: with the image's, a small one has no room.
        coarse = (-(-height // 8), -(-width // 8), self.features[0])
        message = nn.relu(nn.Dense(math.prod(coarse), name="bits")(bits - 0.5))
        message = enlarged(message.reshape(-1, *coarse), 8, (height, width))
        return UNet(channels, self.features, name="unet")(
            jnp.concatenate([x - 0.5, message], axis=-1)
        )


class BitsDecoder(nn.Module):
    """Reads the bits: convolutions that halve the map, then dense layers.

    Fields:
        num_bits: how many.
        features: channels of the convolutions; all but the first have stride 2.
        hidden: width of the dense layer.
    """

    num_bits: int
    features: tuple[int, ...] = (16, 32, 32, 64)
    hidden: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images f32[b, h, w, c] to logits of the bits, f32[b, num_bits]."""
        x = x - 0.5
        for i, features in enumerate(self.features):
            x = nn.relu(layers.Conv(features, strides=1 if i == 0 else 2, name=f"conv{i}")(x))
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_bits, name="bits")(x)


def enlarged(x: Array, factor: int, size: Sequence[int]) -> Array:
    """Each pixel as `factor` x `factor` of them, cut to `size` at the bottom and the right."""
    b, h, w, c = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (b, h, factor, w, factor, c))
    return wide.reshape(b, h * factor, w * factor, c)[:, : size[0], : size[1]]


def bounded(x: Array, change: Array, epsilon: ArrayLike) -> Array:
    """`clip(x + epsilon tanh(change), 0, 1)`."""
    return jnp.clip(x + epsilon * jnp.tanh(change), 0, 1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _LastInput:
    """What a module's last dense layer is given."""

    module: nn.Module

    def __call__(self, variables: Mapping[str, Any], x: Array) -> Array:
        return _dense_calls(self.module, variables, x)[-1][1]


def _dense_calls(module: nn.Module, variables: Mapping[str, Any], x: Array):
    """Path and input of every call of a dense layer, in order."""
    calls = []

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            calls.append((context.module.path, args[0]))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
        module.apply(variables, x)
    return calls


def last_layer(module: nn.Module, variables: Mapping[str, Any], x: Array) -> tuple[Partial, Array]:
    """A classifier cut before its last dense layer.

    Args:
      module: a classifier that ends with a `flax.linen.Dense`.
      variables: its variables.
      x: an example of its images, f32[b, h, w, c], for the shapes.

    Returns:
      `features_fn`, images to what that layer is given, f32[b, features], and the layer's weights
      f32[features, k].

    Raises:
      ValueError: a network without a dense layer.

    Example:
      >>> import jax
      >>> from advjax import models
      >>> net, x = models.make("mlp", num_classes=10), jax.numpy.zeros((2, 8, 8, 1))
      >>> features_fn, weights = last_layer(net, net.init(jax.random.key(0), x), x)
      >>> features_fn(x).shape, weights.shape
      ((2, 256), (256, 10))
    """
    path: list[tuple[str, ...]] = []

    def trace(x):
        path.extend(name for name, _ in _dense_calls(module, variables, x))

    jax.eval_shape(trace, x)
    if not path:
        raise ValueError(
            f"last_layer: need a network with a dense layer, got {type(module).__name__}."
        )
    params = variables["params"]
    for name in path[-1]:
        params = params[name]
    return Partial(_LastInput(module), dict(variables)), params["kernel"]
