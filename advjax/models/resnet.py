"""Residual networks for small images: the CIFAR ResNets and the pre-activation ResNets.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016 (section
4.2: ResNet-20, shortcut A); "Identity Mappings in Deep Residual Networks", ECCV 2016
(pre-activation).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from advjax.models import layers


class ResNet(nn.Module):
    """CIFAR ResNet of 6n + 2 layers: three stages of n basic blocks, global mean, one dense layer.

    The shortcut across a stage has no weights: every second pixel, and zeros for the new channels
    (option A). 269,722 parameters for n = 3, 3 image channels and 10 classes.

    Fields:
        num_classes: number of logits.
        blocks: n, the residual blocks of each stage.
        width: channels of the first stage; doubled from stage to stage.
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.
        form: how convolutions are computed, see `layers.conv2d`.

    Initialisation: He normal (fan in); batch norm scale 1; LeCun normal for the logits.
    """

    num_classes: int
    blocks: int = 3
    width: int = 16
    mean: Any = 0.0
    std: Any = 1.0
    form: str | tuple[str, str, str] = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        layers.check_images("resnet", x, min_size=4)
        conv = functools.partial(layers.Conv, padding=1, use_bias=False, form=self.form)
        norm = functools.partial(layers.batch_norm, train)
        x = layers.normalize(x, self.mean, self.std)
        x = nn.relu(norm(name="bn1")(conv(self.width, name="conv1")(x)))
        for stage in range(3):
            features = self.width * 2**stage
            for block in range(self.blocks):
                name = f"stage{stage + 1}_block{block + 1}"
                strides = 2 if stage and not block else 1
                y = conv(features, strides=strides, name=f"{name}_conv1")(x)
                y = nn.relu(norm(name=f"{name}_bn1")(y))
                y = norm(name=f"{name}_bn2")(conv(features, name=f"{name}_conv2")(y))
                if strides == 2:
                    extra = (features - x.shape[-1]) // 2
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (extra, extra)))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes, name="logits")(x.mean(axis=(1, 2)))


class PreActResNet(nn.Module):
    """Pre-activation ResNet for small images: batch norm and ReLU before each convolution.

    The stem is one 3x3 convolution without stride or pooling. Parameters for 3 image channels and
    10 classes: 11,171,146 (stages 2, 2, 2, 2) and 21,279,306 (3, 4, 6, 3).

    Fields:
        num_classes: number of logits.
        stages: blocks in each stage.
        width: channels of the first stage; doubled from stage to stage.
        final_norm: batch norm and ReLU after the last block, as in the paper. The published
            parameter counts, and the networks that backdoor studies train, are without it.
        use_norm, use_shortcuts, use_global_mean: without one of them, the same network with no
            batch norm, no way around a block, or all pixels of the last feature map given to the
            dense layer: for studies of what a result depends on.
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.
        form: how convolutions are computed, see `layers.conv2d`.

    Initialisation: He normal (fan in); batch norm scale 1; LeCun normal for the logits.
    """

    num_classes: int
    stages: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    final_norm: bool = False
    use_norm: bool = True
    use_shortcuts: bool = True
    use_global_mean: bool = True
    mean: Any = 0.0
    std: Any = 1.0
    form: str | tuple[str, str, str] = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        layers.check_images("preact_resnet", x, min_size=2 ** (len(self.stages) - 1))
        conv = functools.partial(layers.Conv, use_bias=False, form=self.form)
        norm = functools.partial(layers.batch_norm, train) if self.use_norm else _no_norm
        x = layers.normalize(x, self.mean, self.std)
        x = conv(self.width, padding=1, name="conv1")(x)
        for stage, blocks in enumerate(self.stages):
            features = self.width * 2**stage
            for block in range(blocks):
                name = f"stage{stage + 1}_block{block + 1}"
                strides = 2 if stage and not block else 1
                y = nn.relu(norm(name=f"{name}_bn1")(x))
                # The projection reads the activated input, the identity the raw one.
                if self.use_shortcuts and (strides > 1 or x.shape[-1] != features):
                    x = conv(features, (1, 1), strides, padding=0, name=f"{name}_shortcut")(y)
                y = conv(features, strides=strides, padding=1, name=f"{name}_conv1")(y)
                y = nn.relu(norm(name=f"{name}_bn2")(y))
                y = conv(features, padding=1, name=f"{name}_conv2")(y)
                x = x + y if self.use_shortcuts else y
        if self.final_norm:
            x = nn.relu(norm(name="bn_final")(x))
        x = x.mean(axis=(1, 2)) if self.use_global_mean else x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, name="logits")(x)


def _no_norm(name: str) -> Callable[[jax.Array], jax.Array]:
    """In the place of a batch norm, whatever its name."""
    return lambda x: x
