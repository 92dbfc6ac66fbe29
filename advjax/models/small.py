"""Small networks: a multi-layer perceptron and the reference CNN, and its stored weights."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from advjax.models import layers

_NPZ_LAYERS = ("conv1", "conv2", "dense1", "dense2")


class MLP(nn.Module):
    """Dense layers with ReLU on the flattened image (H, W, C order).

    Fields:
        num_classes: number of logits.
        hidden: width of each hidden layer.
        dropout_rate: dropout after each hidden layer, in training only (rng "dropout").
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.

    Initialisation: He normal (fan in) before each ReLU, LeCun normal for the logits, biases zero.
    """

    num_classes: int
    hidden: tuple[int, ...] = (256, 256)
    dropout_rate: float = 0.0
    mean: Any = 0.0
    std: Any = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        layers.check_images("mlp", x)
        x = layers.normalize(x, self.mean, self.std).reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, kernel_init=layers.he_fan_in, name=f"dense{i + 1}")(x))
            if self.dropout_rate:
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="logits")(x)


class CNN(nn.Module):
    """The reference network: two 3x3 convolutions with ReLU and 2x2 max-pool, two dense layers.

    On 28x28 images it is the layout of the networks in `mnist_standard.npz` (see
    `from_reference_npz`); on 8x8 digits the feature maps are 8, 4 and 2 pixels wide.

    Fields:
        num_classes: number of logits.
        features: channels of the two convolutions.
        hidden: width of the dense layer.
        dropout_rate: dropout after the hidden dense layer, in training only (rng "dropout").
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.
        form: how convolutions are computed, see `layers.conv2d`.

    Initialisation: He normal (fan in) before each ReLU, LeCun normal for the logits, biases zero.
    """

    num_classes: int
    features: tuple[int, int] = (16, 32)
    hidden: int = 100
    dropout_rate: float = 0.0
    mean: Any = 0.0
    std: Any = 1.0
    form: str | tuple[str, str, str] = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        layers.check_images("cnn", x, min_size=4)
        x = layers.normalize(x, self.mean, self.std)
        for i, features in enumerate(self.features):
            # The maximum commutes with bias and ReLU; pooling first leaves a quarter of them.
            x = nn.relu(layers.Conv(features, pool=2, form=self.form, name=f"conv{i + 1}")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, kernel_init=layers.he_fan_in, name="dense1")(x))
        if self.dropout_rate:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="dense2")(x)


def from_reference_npz(source: str | Path | Mapping[str, np.ndarray]) -> dict:
    """Variables of `make("cnn", k)` from an npz file with keys `conv1_kernel` ... `dense2_bias`.

    Args:
        source: a path, or a mapping of arrays: `convN_kernel` f32[3, 3, c, features] (HWIO),
            `denseN_kernel` f32[inputs, outputs], and a `..._bias` for each.

    Returns:
        `{"params": {"conv1": {"kernel", "bias"}, "conv2": ..., "dense1": ..., "dense2": ...}}`,
        float32 JAX arrays.

    Raises:
        ValueError: an array is missing.
    """
    if isinstance(source, str | Path):
        try:
            with np.load(source, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (zipfile.BadZipFile, EOFError, ValueError, AttributeError) as error:
            raise ValueError(f"from_reference_npz: {source} is no npz file of arrays.") from error
        source = arrays
    missing = [
        f"{name}_{part}"
        for name in _NPZ_LAYERS
        for part in ("kernel", "bias")
        if f"{name}_{part}" not in source
    ]
    if missing:
        raise ValueError(f"from_reference_npz: missing arrays {', '.join(missing)}.")
    return {
        "params": {
            name: {
                part: jax.numpy.asarray(source[f"{name}_{part}"], jax.numpy.float32)
                for part in ("kernel", "bias")
            }
            for name in _NPZ_LAYERS
        }
    }
