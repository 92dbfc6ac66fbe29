"""Triggers that hide a message in each image (SSBA)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from advjax.backdoor import networks
from advjax.core import checks, classifier, random
from advjax.core.typing import Array, Key

_ENOUGH_BITS = 0.9  # from this share of bits on, the change of the images costs
_MEMORY = 0.9  # of the moving average of that share
_NUM_MEASURED = 256


class SSBA(NamedTuple):
    """A trained steganography.

    Attributes:
      trigger: `x -> x`, hides the secret, f32[..., h, w, c] to the same shape.
      encode: `(x, bits) -> x`, hides other bits, f32[b, num_bits], in images f32[b, h, w, c].
      decode: images f32[b, h, w, c] to logits of the bits, f32[b, num_bits]; positive is 1.
      secret: the bits of the trigger, f32[num_bits].
      bit_accuracy: share of random bits that are read from images rounded to 1 / 255, f32[].
      psnr: peak signal-to-noise ratio of those images, in dB, f32[].
    """

    trigger: Partial
    encode: Partial
    decode: Partial
    secret: Array
    bit_accuracy: Array
    psnr: Array


@dataclasses.dataclass(frozen=True)
class _Encode:
    """An encoder's `apply`, equal for equal encoders, with the bits as its last argument."""

    module: networks.BitsEncoder

    def __call__(self, variables: Any, epsilon: ArrayLike, x: Array, bits: Array) -> Array:
        change = jnp.asarray(self.module.apply(variables, x, bits))
        return networks.bounded(x, change, epsilon)


def _hide(encode: Any, secret: Array, x: Array) -> Array:
    """The secret in images of any leading axes."""
    images = x.reshape(-1, *x.shape[-3:])
    bits = jnp.broadcast_to(secret, (len(images), *secret.shape))
    return encode(images, bits).reshape(x.shape)


def ssba(
    key: Key,
    x: Array,
    *,
    num_bits: int = 8,
    epsilon: ArrayLike = 0.1,
    num_steps: int = 1000,
    batch_size: int = 32,
    learning_rate: ArrayLike = 1e-3,
    distance_weight: ArrayLike = 20.0,
    likeness_weight: ArrayLike = 0.2,
    features: tuple[int, ...] = (8, 16, 32, 64),
) -> SSBA:
    """Sample-specific triggers: a network hides a message in each image, another one reads it.

    Encoder E and decoder D are trained on random bits,

        x' = clip(x + epsilon tanh(E(x, bits)), 0, 1),
        loss = BCE(D(x' + u), bits) + r (distance_weight mean (x' - x)^2 + likeness_weight C),

    `u` uniform in +-1 / 510, which stands for the rounding to uint8. Two images of a batch have the
    same bits, and C is the mean size of the cosine between their changes: without it a network this
    small adds nearly one pattern to all images. The ramp `r` grows from 0 to 1 over a quarter of
    the steps, from when a moving average of the share of bits that are read passes 0.9.

    The trigger hides one secret, drawn from the key, in all images; how it does that changes from
    image to image. The published form trains a larger encoder that paints the whole image, for 20
    epochs. The bounded change, the rounding and C are choices of this one.

    Args:
      key: a key.
      x: training images, f32[n, h, w, c] in [0, 1].
      num_bits: length of the message.
      epsilon: largest change of a pixel.
      num_steps: number of steps.
      batch_size: images a step, an even number.
      learning_rate: of Adam.
      distance_weight: of the mean squared change.
      likeness_weight: of C.
      features: channels of the encoder's `UNet`.

    Returns:
      `SSBA(trigger, encode, decode, secret, bit_accuracy, psnr)`.

    Static: num_bits, num_steps, batch_size, features.

    Raises:
      ValueError: images that are not floats in [0, 1] or none at all, a bad count.

    Source: Y. Li, Y. Li, B. Wu, L. Li, R. He, S. Lyu, "Invisible Backdoor Attack with
    Sample-Specific Triggers", ICCV 2021; M. Tancik, B. Mildenhall, R. Ng, "StegaStamp: Invisible
    Hyperlinks in Physical Photographs", CVPR 2020.
    """
    checks.images("ssba", x)
    checks.four_axes("ssba", x)
    for name, count in (
        ("number of images", len(x)), ("num_bits", num_bits), ("num_steps", num_steps),
        ("batch_size", batch_size),
    ):  # fmt: skip
        checks.at_least("ssba", name, count, 1)
    for name, number in (
        ("epsilon", epsilon), ("learning_rate", learning_rate),
        ("distance_weight", distance_weight), ("likeness_weight", likeness_weight),
    ):  # fmt: skip
        checks.non_negative("ssba", name, number)
    if batch_size % 2:
        raise ValueError(f"ssba: need an even batch_size, got batch_size={batch_size}.")
    x = jnp.asarray(x)
    key_encoder, key_decoder, key_secret, key_measure, key_steps = jax.random.split(
        random.as_typed(key), 5
    )
    encoder, decoder = networks.BitsEncoder(tuple(features)), networks.BitsDecoder(num_bits)
    optimizer = optax.adam(jnp.asarray(learning_rate))

    def draw(key: Key, size: int) -> tuple[Array, Array]:
        """Images and random bits."""
        key_rows, key_bits = jax.random.split(key)
        rows = jax.random.randint(key_rows, (size,), 0, len(x))
        return x[rows], jax.random.bernoulli(key_bits, shape=(size, num_bits)).astype(x.dtype)

    def parts(params: Any) -> tuple[Partial, Partial]:
        encode = Partial(_Encode(encoder), params["encoder"], epsilon)
        return encode, classifier.bind(decoder, params["decoder"])

    def step(number: int, carry: _Training) -> _Training:
        key_images, key_noise = jax.random.split(jax.random.fold_in(key_steps, number))
        images, bits = draw(key_images, batch_size)
        bits = jnp.tile(bits[: batch_size // 2], (2, 1))
        ramp = jnp.clip(carry.num_charged / max(1, num_steps // 4), 0, 1)

        def loss(params: Any) -> tuple[Array, Array]:
            encode, decode = parts(params)
            marked = encode(images, bits)
            noise = jax.random.uniform(key_noise, images.shape, x.dtype, -1 / 510, 1 / 510)
            logits = decode(marked + noise)
            unread = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, bits))
            change = (marked - images).reshape(2, batch_size // 2, -1)
            cost = distance_weight * jnp.mean(change**2)
            cost += likeness_weight * jnp.mean(
                jnp.abs(optax.cosine_similarity(*change, epsilon=1e-4))
            )
            return unread + ramp * cost, _share_read(logits, bits)

        gradient, share = jax.grad(loss, has_aux=True)(carry.params)
        changes, opt_state = optimizer.update(gradient, carry.opt_state, carry.params)
        share = _MEMORY * carry.share_read + (1 - _MEMORY) * share
        is_charged = (carry.num_charged > 0) | (share > _ENOUGH_BITS)
        return _Training(
            optax.apply_updates(carry.params, changes), opt_state, share,
            carry.num_charged + is_charged,
        )  # fmt: skip

    params = {
        "encoder": encoder.init(key_encoder, x[:1], jnp.zeros((1, num_bits))),
        "decoder": decoder.init(key_decoder, x[:1]),
    }
    start = _Training(params, optimizer.init(params), jnp.zeros(()), jnp.zeros((), jnp.int32))
    encode, decode = parts(jax.lax.fori_loop(0, num_steps, step, start).params)
    secret = jax.random.bernoulli(key_secret, shape=(num_bits,)).astype(x.dtype)
    images, bits = draw(key_measure, _NUM_MEASURED)
    marked = jnp.round(encode(images, bits) * 255) / 255
    psnr = -10 * jnp.log10(jnp.mean((marked - images) ** 2))
    trigger = Partial(_hide, encode, secret)
    return SSBA(trigger, encode, decode, secret, _share_read(decode(marked), bits), psnr)


class _Training(NamedTuple):
    """Weights, the moving share of bits that are read, and for how long the distance has cost."""

    params: Any
    opt_state: Any
    share_read: Array
    num_charged: Array


def _share_read(logits: Array, bits: Array) -> Array:
    return jnp.mean((logits > 0) == (bits > 0.5))
