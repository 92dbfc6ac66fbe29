"""MobileNetV3: inverted residuals with depthwise convolutions and squeeze-and-excitation.

Source: Howard et al., "Searching for MobileNetV3", ICCV 2019, table 1 (large).
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from advjax.models import layers

# kernel size, expanded channels, channels, squeeze-and-excitation, hard-swish (else ReLU), stride
Block = tuple[int, int, int, bool, bool, int]

LARGE: tuple[Block, ...] = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)

NANO: tuple[Block, ...] = (
    (3, 16, 16, False, False, 1),
    (3, 48, 24, False, False, 2),
    (3, 72, 24, True, True, 1),
    (3, 96, 40, True, True, 2),
    (3, 120, 40, True, True, 1),
)


def _round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but never less than 90 % of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class MobileNetV3(nn.Module):
    """MobileNetV3; the large one has 5,483,032 parameters for 3 channels and 1000 classes.

    Fields:
        num_classes: number of logits.
        blocks: the rows of the paper's table.
        last: channels of the last dense layer before the logits.
        total_stride: the network's stride. The table has its full stride (32 for the large one),
            which leaves one pixel of a 32x32 image; a smaller power of two takes the stride from
            the first layers that have one (8 leaves 4x4 pixels of 32x32). Weights keep their
            shapes. None: the table's own.
        dropout_rate: dropout before the logits, in training only (rng "dropout").
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.
        form: how convolutions are computed, see `layers.conv2d`.

    Batch norm: epsilon 0.001 and a running average with momentum 0.99, as in the paper.
    Initialisation: He normal (fan out) for convolutions, fan in for depthwise ones (whose fan out,
    counted over all groups, would make them vanish), N(0, 0.01^2) for dense layers.
    """

    num_classes: int
    blocks: tuple[Block, ...] = LARGE
    last: int = 1280
    total_stride: int | None = None
    dropout_rate: float = 0.2
    mean: Any = 0.0
    std: Any = 1.0
    form: str | tuple[str, str, str] = "auto"

    def _strides(self) -> list[int]:
        """Strides of the stem and of each block."""
        strides = [2, *(block[-1] for block in self.blocks)]
        full = 2 ** strides.count(2)
        total = full if self.total_stride is None else self.total_stride
        if total not in [2**i for i in range(strides.count(2) + 1)]:
            raise ValueError(
                f"mobilenet_v3: need total_stride a power of two up to {full}, got {total}."
            )
        for i, stride in enumerate(strides):
            if stride == 2 and full > total:
                strides[i] = 1
                full //= 2
        return strides

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        strides = self._strides()
        layers.check_images("mobilenet_v3", x, min_size=2 ** strides.count(2))
        norm = functools.partial(layers.batch_norm, train, momentum=0.99, epsilon=1e-3)
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))

        def conv_norm(x, features, size, name, strides=1, groups=1):
            x = layers.Conv(
                features,
                (size, size),
                strides,
                padding=size // 2,
                groups=groups,
                use_bias=False,
                form=self.form,
                kernel_init=layers.he_fan_out if groups == 1 else layers.he_fan_in,
                name=f"{name}_conv",
            )(x)
            return norm(name=f"{name}_bn")(x)

        x = layers.normalize(x, self.mean, self.std)
        x = nn.hard_swish(conv_norm(x, 16, 3, "stem", strides[0]))
        for i, (size, expanded, features, excite, swish, _) in enumerate(self.blocks):
            name, activation = f"block{i + 1}", nn.hard_swish if swish else nn.relu
            y = x
            if expanded != x.shape[-1]:
                y = activation(conv_norm(y, expanded, 1, f"{name}_expand"))
            y = conv_norm(y, expanded, size, f"{name}_depthwise", strides[i + 1], expanded)
            y = activation(y)
            if excite:
                s = y.mean(axis=(1, 2))
                init = layers.he_fan_out
                s = nn.Dense(
                    _round_channels(expanded / 4), kernel_init=init, name=f"{name}_squeeze"
                )(s)
                s = nn.Dense(expanded, kernel_init=init, name=f"{name}_excite")(nn.relu(s))
                y = y * nn.hard_sigmoid(s)[:, None, None]
            y = conv_norm(y, features, 1, f"{name}_project")
            # The table's stride decides, so that `total_stride` keeps the shapes of the network.
            residual = self.blocks[i][-1] == 1 and x.shape[-1] == features
            x = x + y if residual else y
        x = nn.hard_swish(conv_norm(x, 6 * x.shape[-1], 1, "head"))
        x = nn.hard_swish(dense(self.last, name="last")(x.mean(axis=(1, 2))))
        if self.dropout_rate:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return dense(self.num_classes, name="logits")(x)
