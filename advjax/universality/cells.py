"""A small space of cells, all of them one program: a child network is a list of choices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from advjax.core.typing import Array
from advjax.models import layers

CHANNELS = (2, 4, 6, 8)
# What can be chosen: how many channels; for both nodes of the cell the size of the kernel, the
# activation, and whether the node's input is added to its output; where the second node's input
# comes from; and how the cell ends.
CHOICES = {
    "channels": CHANNELS,
    "kernel_1": (1, 3),
    "activation_1": ("relu", "tanh", "elu"),
    "skip_1": (False, True),
    "kernel_2": (1, 3),
    "activation_2": ("relu", "tanh", "elu"),
    "skip_2": (False, True),
    "input_2": ("node", "cell"),
    "pool": ("max", "mean"),
}
SIZES = tuple(len(values) for values in CHOICES.values())
_NUM_CELLS = 2
_CENTRE = np.zeros((3, 3), bool)
_CENTRE[1, 1] = True


class ChildNetwork(nn.Module):
    """A 1x1 convolution, two copies of a cell with a pooling of 2 after each, and a dense layer.

    A cell is two convolutions with activations. The choices are an array, so that children of
    all kinds train side by side: every kernel is 3x3 between the most channels that there can be,
    and a mask makes it smaller.

    Fields:
        num_classes: number of logits.

    Variables: "params", and "architecture" with `choices` int32[9], one index for each entry of
    `CHOICES`.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        choices = self.variable("architecture", "choices", lambda: jnp.zeros(9, jnp.int32)).value
        chosen = dict(zip(CHOICES, choices, strict=True))
        width = jnp.array(CHANNELS)[chosen["channels"]]
        x = self._convolution(x, width, jnp.int32(0), "stem")
        for cell in range(_NUM_CELLS):
            first = self._node(x, width, chosen, 1, cell)
            entering = jnp.where(chosen["input_2"] == 0, first, x)
            x = self._node(entering, width, chosen, 2, cell)
            mean = layers.avg_pool(x, 2)
            x = jnp.where(chosen["pool"] == 0, layers.max_pool(x, 2), mean)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, name="logits")(x)

    def _node(self, x, width, chosen, node: int, cell: int) -> jax.Array:
        y = self._convolution(x, width, chosen[f"kernel_{node}"], f"cell{cell + 1}_node{node}")
        activation = chosen[f"activation_{node}"]
        y = jnp.where(
            activation == 0, nn.relu(y), jnp.where(activation == 1, jnp.tanh(y), nn.elu(y))
        )
        return jnp.where(chosen[f"skip_{node}"] == 1, x + y, y)

    def _convolution(self, x, width, kernel_choice, name: str) -> jax.Array:
        """A convolution from and to the channels that exist; the others stay 0."""
        is_output = jnp.arange(max(CHANNELS)) < width
        is_input = is_output if name != "stem" else jnp.ones(x.shape[-1], bool)
        is_tap = jnp.where(kernel_choice == 0, _CENTRE, True)
        mask = is_tap[..., None, None] & is_input[:, None] & is_output

        def initialise(key, shape):
            scale = jnp.sqrt(2 / (jnp.sum(is_tap) * jnp.sum(is_input)))
            return scale * jax.random.normal(key, shape)

        kernel = self.param(f"{name}_kernel", initialise, mask.shape)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (max(CHANNELS),))
        return layers.conv2d(x, jnp.where(mask, kernel, 0)) + jnp.where(is_output, bias, 0)


def num_parameters(
    choices: Array, image_shape: tuple[int, int, int], num_classes: int
) -> np.ndarray:
    """Parameters of children, those that a mask takes away left out, int64[m].

    Args:
      choices: int32[m, 9].
      image_shape: height, width and channels of an image.
      num_classes: k.
    """
    chosen = dict(zip(CHOICES, np.asarray(choices).T, strict=True))
    width = np.array(CHANNELS)[chosen["channels"]]
    taps = sum(
        np.array(CHOICES[f"kernel_{node}"])[chosen[f"kernel_{node}"]] ** 2 for node in (1, 2)
    )
    sites = (image_shape[0] >> _NUM_CELLS) * (image_shape[1] >> _NUM_CELLS)
    cells = _NUM_CELLS * (taps * width**2 + 2 * width)
    return (image_shape[2] + 1) * width + cells + (sites * width + 1) * num_classes
