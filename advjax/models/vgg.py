"""VGG for small images: 3x3 convolutions with batch norm, max-pools, one dense layer.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
ICLR 2015, configuration D (VGG-16); batch norm after Ioffe, Szegedy, "Batch Normalization", ICML
2015.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from advjax.models import layers

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """VGG with batch norm and one dense layer, the variant used on CIFAR.

    The convolutions keep their bias, and the global mean of the last feature map (1x1 for 32x32
    images) goes to a single dense layer instead of the paper's three: 14,728,266 parameters for
    VGG-16, 3 image channels and 10 classes.

    Fields:
        num_classes: number of logits.
        stages: the widths of the convolutions before each 2x2 max-pool.
        dropout_rate: dropout before the dense layer, in training only (rng "dropout").
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.
        form: how convolutions are computed, see `layers.conv2d`.

    Initialisation: He normal (fan in), biases zero; batch norm scale 1; LeCun normal for the
    logits.
    """

    num_classes: int
    stages: tuple[tuple[int, ...], ...] = VGG16
    dropout_rate: float = 0.0
    mean: Any = 0.0
    std: Any = 1.0
    form: str | tuple[str, str, str] = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        layers.check_images("vgg", x, min_size=2 ** len(self.stages))
        norm = functools.partial(layers.batch_norm, train)
        x = layers.normalize(x, self.mean, self.std)
        for stage, widths in enumerate(self.stages):
            for i, features in enumerate(widths):
                name = f"stage{stage + 1}_{{}}{i + 1}"
                x = layers.Conv(features, padding=1, form=self.form, name=name.format("conv"))(x)
                x = norm(name=name.format("bn"))(x)
                # max and ReLU commute; pooling first leaves a quarter of the ReLUs.
                x = nn.relu(layers.max_pool(x) if i == len(widths) - 1 else x)
        x = x.mean(axis=(1, 2))
        if self.dropout_rate:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="logits")(x)
