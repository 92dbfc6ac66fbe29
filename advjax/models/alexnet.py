"""AlexNet for 32x32 images: five convolutions, three max-pools, one dense layer.

Source: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NeurIPS 2012; the reduction to CIFAR is the one that studies of federated poisoning use.
"""

from typing import Any

import flax.linen as nn
import jax

from advjax.models import layers


class AlexNet(nn.Module):
    """AlexNet without local response normalisation, dropout and the wide dense layers.

    2,472,266 parameters for 32x32x3 images and 10 classes.

    Fields:
        num_classes: number of logits.
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.
        form: how convolutions are computed, see `layers.conv2d`.

    Initialisation: He normal (fan in), biases zero; LeCun normal for the logits.
    """

    num_classes: int
    mean: Any = 0.0
    std: Any = 1.0
    form: str | tuple[str, str, str] = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        layers.check_images("alexnet", x, min_size=29)
        x = layers.normalize(x, self.mean, self.std)
        for i, (features, size, strides, pool) in enumerate(
            ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 2))
        ):
            conv = layers.Conv(
                features, (size, size), strides=strides, padding=size // 2, pool=pool,
                form=self.form, name=f"conv{i + 1}",
            )  # fmt: skip
            x = nn.relu(conv(x))
        return nn.Dense(self.num_classes, name="logits")(x.reshape(x.shape[0], -1))
