"""Vision transformer.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale", ICLR 2021.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from advjax.models import layers


class ViT(nn.Module):
    """Vision transformer with a class token and learned positions.

    ViT-B/16 has 86,567,656 parameters at 224x224x3 with 1000 classes. The position table has one
    row per patch, so weights belong to one image size.

    Fields:
        num_classes: number of logits.
        patch: side of a patch in pixels; must divide the image.
        width, depth, heads: token width, number of blocks, attention heads.
        mlp_width: hidden width of each block's MLP.
        dropout_rate: dropout after attention and MLP, in training only (rng "dropout").
        mean, std: the input becomes `(x - mean) / std`; a number, or one per channel.
        form: how the patch convolution is computed, see `layers.conv2d`.

    Initialisation: Xavier uniform for dense layers, LeCun normal for patches, N(0, 0.02^2) for
    positions and logits (the paper sets the logits' weights to zero, with which an untrained
    network has no gradient to the image).
    """

    num_classes: int
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    dropout_rate: float = 0.0
    mean: Any = 0.0
    std: Any = 1.0
    form: str | tuple[str, str, str] = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images f32[b, h, w, c] in [0, 1] to logits f32[b, k]."""
        layers.check_images("vit", x, min_size=self.patch)
        b, h, w, _ = x.shape
        if h % self.patch or w % self.patch:
            raise ValueError(f"vit: need image sides divisible by patch={self.patch}, got {h}x{w}.")
        if self.width % self.heads:
            raise ValueError(
                f"vit: need width divisible by heads, got width={self.width}, heads={self.heads}."
            )
        x = layers.normalize(x, self.mean, self.std)
        x = layers.Conv(
            self.width,
            (self.patch, self.patch),
            self.patch,
            padding=0,
            form=self.form,
            kernel_init=nn.initializers.lecun_normal(),
            name="patches",
        )(x).reshape(b, -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (b, 1, self.width)), x], 1)
        if self.has_variable("params", "positions"):
            stored = self.get_variable("params", "positions").shape[1]
            if stored != x.shape[1]:
                raise ValueError(
                    f"vit: need images of the size the weights were made for ({stored - 1} "
                    f"patches), got {h}x{w} pixels ({x.shape[1] - 1} patches)."
                )
        init = nn.initializers.normal(0.02)
        x = x + self.param("positions", init, (1, x.shape[1], self.width)).astype(x.dtype)
        for i in range(self.depth):
            x = self._block(x, f"block{i + 1}", train)
        x = nn.LayerNorm(epsilon=1e-6, name="ln_final")(x[:, 0])
        return nn.Dense(self.num_classes, kernel_init=init, name="logits")(x)

    def _block(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        """Attention and MLP with residuals, f32[b, tokens, width] to the same."""
        b, tokens, width = x.shape

        def dense(features, part):
            init = nn.initializers.xavier_uniform()
            return nn.Dense(features, kernel_init=init, name=f"{name}_{part}")

        def dropout(y):
            if not self.dropout_rate:
                return y
            return nn.Dropout(self.dropout_rate, deterministic=not train)(y)

        y = nn.LayerNorm(epsilon=1e-6, name=f"{name}_ln1")(x)
        q, k, v = jnp.split(dense(3 * width, "qkv")(y), 3, axis=-1)
        shape = (b, tokens, self.heads, width // self.heads)
        y = jax.nn.dot_product_attention(q.reshape(shape), k.reshape(shape), v.reshape(shape))
        x = x + dropout(dense(width, "out")(y.reshape(b, tokens, width)))
        y = nn.LayerNorm(epsilon=1e-6, name=f"{name}_ln2")(x)
        y = nn.gelu(dense(self.mlp_width, "mlp1")(y), approximate=False)
        return x + dropout(dense(width, "mlp2")(y))
