"""Networks that are padded to a common width, so that many of unlike width are one program."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from advjax.core.typing import Array, Key
from advjax.models import layers

KINDS = ("fully_connected", "cnn")


def _padded_normal(is_input: Array, is_output: Array, gain: float):
    """Normal weights of variance gain / fan in between units that exist, 0 for the others."""

    def initialise(key: Key, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        taps = 1
        for size in shape[:-2]:
            taps *= size
        scale = jnp.sqrt(gain / (taps * jnp.sum(is_input)))
        weights = scale * jax.random.normal(key, shape, dtype)
        return jnp.where(is_input[:, None] & is_output, weights, 0)

    return initialise


class PaddedNetwork(nn.Module):
    """Hidden layers of one width, held in arrays of a larger one.

    What pads is zero: a unit without weights is silent (ReLU of 0), and as the ReLU's gradient at 0
    is 0, neither the weights into it nor those out of it ever move. So the network computes what an
    unpadded one does, and needs no mask but at its initialisation.

    "fully_connected" is dense layers with ReLU on the flattened image; "cnn" is 3x3 convolutions
    with ReLU and 2x2 max-pool. Dropout follows each hidden layer; a dense layer makes the logits.

    Fields:
        num_classes: number of logits.
        kind: one of `KINDS`.
        depth: number of hidden layers.
        padding: the width that the arrays have.

    Variables: "params", and "architecture" with `width` int32[] and `dropout` f32[], which `vmap`
    may vary from network to network.

    Initialisation: He normal (fan in) before each ReLU, LeCun normal for the logits, biases zero.
    """

    num_classes: int
    kind: str
    depth: int
    padding: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        width = self._architecture("width", jnp.int32)
        dropout = self._architecture("dropout", jnp.float32)
        is_unit = jnp.arange(self.padding) < width
        is_convolutional = self.kind == "cnn"
        if not is_convolutional:
            x = x.reshape(x.shape[0], -1)
        is_input = jnp.ones(x.shape[-1], bool)
        for i in range(self.depth):
            initialise = _padded_normal(is_input, is_unit, gain=2.0)
            name = f"hidden{i + 1}"
            if is_convolutional:
                x = layers.Conv(self.padding, pool=2, kernel_init=initialise, name=name)(x)
            else:
                x = nn.Dense(self.padding, kernel_init=initialise, name=name)(x)
            x, is_input = nn.relu(x), is_unit
            if train:
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - dropout, x.shape)
                x = jnp.where(keep, x / (1 - dropout), 0)
        if is_convolutional:
            is_input = jnp.tile(is_unit, x.shape[1] * x.shape[2])  # flattened in H, W, C order
            x = x.reshape(x.shape[0], -1)
        initialise = _padded_normal(is_input, jnp.ones(self.num_classes, bool), gain=1.0)
        return nn.Dense(self.num_classes, kernel_init=initialise, name="logits")(x)

    def _architecture(self, name: str, dtype: Any) -> jax.Array:
        """An entry of the architecture, which the caller gives; without it, nothing is padding."""
        unpadded = {"width": self.padding, "dropout": 0.0}[name]
        return self.variable("architecture", name, lambda: jnp.asarray(unpadded, dtype)).value


def initial_variables(
    module: nn.Module, key: Key, x: Array, architecture: Mapping[str, Array]
) -> dict[str, Any]:
    """The variables of an untrained network of that architecture.

    Args:
      module: a network that reads its architecture from the collection of that name.
      key: a key.
      x: images, f32[b, h, w, c]; only their shape counts.
      architecture: such as `{"width": ..., "dropout": ...}` for a `PaddedNetwork`.
    """
    _, variables = module.apply(
        {"architecture": architecture}, x, rngs={"params": key}, mutable=["params"]
    )
    return {"params": variables["params"], "architecture": dict(architecture)}


def unpadded(module: PaddedNetwork, variables: dict[str, Any]) -> tuple[PaddedNetwork, Any]:
    """The same network without padding, and its variables.

    Args:
      module: the padded network.
      variables: its variables, of one network and concrete.
    """
    width = int(variables["architecture"]["width"])
    params, is_first = {}, True
    for name in (*(f"hidden{i + 1}" for i in range(module.depth)), "logits"):
        kernel, bias = variables["params"][name]["kernel"], variables["params"][name]["bias"]
        if not is_first:
            # Of a flattened map every block of channels has its own padding.
            blocks = kernel.reshape(*kernel.shape[:-2], -1, module.padding, kernel.shape[-1])
            kernel = blocks[..., :width, :].reshape(*kernel.shape[:-2], -1, kernel.shape[-1])
        if name != "logits":
            kernel, bias = kernel[..., :width], bias[:width]
        params[name], is_first = {"kernel": kernel, "bias": bias}, False
    smaller = module.clone(padding=width)
    return smaller, {"params": params, "architecture": variables["architecture"]}
