"""The physical world: a differentiable print-and-photograph channel, and an attack through it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jax.typing import ArrayLike

from advjax.attacks import ascent, gradient
from advjax.core import balls, checks, losses, metrics, random, traits
from advjax.core.balls import Ball
from advjax.core.typing import Array, AttackLoss, Key, LogitsFn

# (keys [b], images) to what the classifier gets to see of them.
Channel = Callable[[Key, Array], Array]

# ------------------------------------------------------------------------------ where it is seen

_CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)


def _cross(u: Array, v: Array) -> Array:
    return u[0] * v[1] - u[1] * v[0]


def _displacement(offset: Array, place: Array) -> Array:
    """How far a homography moves points, from how far it moves the corners of the unit square.

    Written in differences from the identity, so that corners at rest keep every point exactly.

    Args:
      offset: of the corners (0, 0), (1, 0), (1, 1), (0, 1), f32[4, 2].
      place: points of the unit square, f32[..., 2].

    Source: P. Heckbert, "Fundamentals of Texture Mapping and Image Warping", UC Berkeley 1989.
    """
    corner = _CORNERS + offset
    twist = offset[0] - offset[1] + offset[2] - offset[3]
    one, three = corner[1] - corner[2], corner[3] - corner[2]
    g = _cross(twist, three) / _cross(one, three)
    h = _cross(one, twist) / _cross(one, three)
    s, t = place[..., :1], place[..., 1:]
    moved = (
        offset[0]
        + (offset[1] - offset[0] + g * corner[1]) * s
        + (offset[3] - offset[0] + h * corner[3]) * t
    )
    return (moved - place * (g * s + h * t)) / (1 + g * s + h * t)


def _view(key: Key, image: Array, perspective: Array, crop: Array) -> Array:
    """One bilinear resampling for the crop and the perspective; beyond the edge, the edge."""
    key_size, key_origin, key_jitter = jax.random.split(key, 3)
    cut = crop * jax.random.uniform(key_size)
    origin = cut * jax.random.uniform(key_origin, (2,))
    jitter = perspective * jax.random.uniform(key_jitter, (4, 2), minval=-1, maxval=1)
    offset = origin + (1 - cut) * jitter - cut * _CORNERS
    size = np.array(image.shape[:2], np.float32)
    index = np.moveaxis(np.indices(image.shape[:2], np.float32), 0, -1)
    position = index + size * _displacement(offset, (index + 0.5) / size)

    def resample(plane: Array) -> Array:
        coordinates = [position[..., 0], position[..., 1]]
        return map_coordinates(plane, coordinates, order=1, mode="nearest")

    return jax.vmap(resample, in_axes=-1, out_axes=-1)(image)


# ------------------------------------------------------------------------------ how it is seen


def _smoothing(size: int, deviation: Array) -> Array:
    """The matrix of a Gaussian blur of a line; its rows sum to one, also at the ends."""
    distance = np.subtract.outer(np.arange(size), np.arange(size)).astype(np.float32)
    weights = jnp.exp(-(distance**2) / (2 * jnp.maximum(deviation**2, 1e-12)))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _blurred(image: Array, deviation: Array) -> Array:
    height, width, _ = image.shape
    return jnp.einsum(
        "hi,wj,ijc->hwc", _smoothing(height, deviation), _smoothing(width, deviation), image,
        precision="highest",
    )  # fmt: skip


def _saturated(image: Array) -> Array:
    # Not jnp.clip, which halves the gradient of a pixel that is exactly 0 or 1.
    return jnp.where(image < 0, 0, jnp.where(image > 1, 1, image))


# ------------------------------------------------------------------------------ how it is stored

# The example tables of ITU-T T.81 (JPEG), annex K, for luminance and chrominance: quality 50.
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
_CHROMINANCE = np.full((8, 8), 99, np.float32)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# Red, green, blue to luminance and two chrominances (JFIF).
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_FROM_YCC = np.linalg.inv(_TO_YCC)

# The orthonormal discrete cosine transform of eight samples.
_DCT = np.cos(np.pi / 16 * np.outer(np.arange(8), 2 * np.arange(8) + 1)).astype(np.float32) / 2
_DCT[0] /= np.sqrt(2)


def _stored(image: Array, compression: Array) -> Array:
    """Rounds the DCT coefficients of 8 x 8 blocks to multiples of JPEG's tables.

    The image plus its rounding error: the gradient passes straight through, and no compression
    is exactly no error.
    """
    height, width, num_channels = image.shape
    is_colour = num_channels == 3
    tables = (_LUMINANCE, _CHROMINANCE, _CHROMINANCE) if is_colour else (_LUMINANCE,)
    step = compression * np.stack(tables, axis=-1)[:, None]
    planes = jax.lax.stop_gradient(255 * image)
    if is_colour:
        planes = jnp.einsum("hwc,dc->hwd", planes, _TO_YCC, precision="highest")
    planes = jnp.pad(planes, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    rows, columns, _ = planes.shape
    blocks = planes.reshape(rows // 8, 8, columns // 8, 8, num_channels)
    transform = functools.partial(jnp.einsum, precision="highest")
    coefficients = transform("iy,jx,aybxc->aibjc", _DCT, _DCT, blocks)
    divisor = jnp.where(step > 0, step, 1)
    error = jnp.where(step > 0, jnp.round(coefficients / divisor) * step - coefficients, 0)
    error = transform("iy,jx,aibjc->aybxc", _DCT, _DCT, error).reshape(planes.shape)
    error = error[:height, :width]
    if is_colour:
        error = jnp.einsum("hwd,cd->hwc", error, _FROM_YCC, precision="highest")
    return image + error / 255


# ---------------------------------------------------------------------------------- the channel


def photograph(
    key: Key,
    x: Array,
    *,
    perspective: ArrayLike = 0.04,
    crop: ArrayLike = 0.08,
    brightness: ArrayLike = 0.1,
    contrast: ArrayLike = 0.2,
    blur: ArrayLike = 0.02,
    noise: ArrayLike = 0.02,
    compression: ArrayLike = 0.4,
    strength: ArrayLike = 1.0,
) -> Array:
    """A random photograph of each printed image: differentiable, from view to JPEG.

    View (perspective and crop in one bilinear resampling), blur of the lens, light (contrast and
    brightness), noise of the sensor, saturation, compression. The gradient passes straight through
    the rounding of the compression.

    Every part is exactly the identity at 0, and all of them together at `strength=0`.

    Args:
      key: a key, or one key an example [b]; another key is another photograph.
      x: images, f32[b, h, w, c] in [0, 1].
      perspective: each corner moves by up to this share of a side along each axis; below 1/4,
        where corners would fall in line.
      crop: up to this share of a side is cut away, and the rest enlarged to the old size; below 1.
      brightness: up to this much is added to, or taken from, all pixels.
      contrast: distances from mid-grey change by up to this factor, `0.5 + (1 +- c) (x - 0.5)`.
      blur: the standard deviation of the Gaussian is up to this share of the height.
      noise: standard deviation of normal noise in each value.
      compression: multiple of JPEG's quantisation tables, in YCbCr for three channels: 1 is
        quality 50, 0.4 is 80, 0.1 is 95. The chrominance is not subsampled.
      strength: multiplies all of the above.

    Returns:
      Photographs in [0, 1], like `x`.

    Raises:
      ValueError: images that are not floats in [0, 1], a negative strength of something, corners
        or a crop that leave no image.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full((1, 8, 8, 1), 0.5)
      >>> photo = jax.jit(photograph)(jax.random.key(0), x, strength=0.0)
      >>> bool(jnp.all(photo == x))
      True

    Source: A. Kurakin, I. Goodfellow, S. Bengio, "Adversarial Examples in the Physical World",
    ICLR 2017 workshop (the channel, there with a printer and a telephone); A. Athalye et al.,
    "Synthesizing Robust Adversarial Examples", ICML 2018 (as a distribution of transformations).
    """
    checks.images("photograph", x)
    if jnp.ndim(x) != 4:
        raise ValueError(f"photograph: need images of shape [b, h, w, c], got {jnp.shape(x)}.")
    settings = dict(
        perspective=perspective, crop=crop, brightness=brightness, contrast=contrast, blur=blur,
        noise=noise, compression=compression,
    )  # fmt: skip
    for name, value in (*settings.items(), ("strength", strength)):
        checks.non_negative("photograph", name, value)
    for name, limit in (("perspective", 0.25), ("crop", 1.0)):
        if checks.is_concrete(settings[name], strength):
            value = float(np.asarray(settings[name])) * float(np.asarray(strength))
            if value >= limit:
                raise ValueError(
                    f"photograph: need strength * {name} < {limit}, got {value}; beyond it there "
                    "is nothing left to see."
                )
    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)  # a position of a pixel needs float32
    settings = {name: jnp.asarray(strength * value, wide) for name, value in settings.items()}

    def shoot(key: Key, image: Array) -> Array:
        key_view, key_blur, key_light, key_noise = jax.random.split(key, 4)
        image = _view(key_view, image, settings["perspective"], settings["crop"])
        deviation = settings["blur"] * image.shape[0] * jax.random.uniform(key_blur)
        image = _blurred(image, deviation)
        change, shift = jax.random.uniform(key_light, (2,), minval=-1, maxval=1)
        image = image + settings["contrast"] * change * (image - 0.5)
        image = image + settings["brightness"] * shift
        image = image + settings["noise"] * jax.random.normal(key_noise, image.shape)
        return _saturated(_stored(_saturated(image), settings["compression"]))

    keys = random.example_keys(key, x.shape[0])
    return jax.vmap(shoot)(keys, x.astype(wide)).astype(x.dtype)


# ----------------------------------------------------------------------- the attack through it


def _draws(keys: Key, number: ArrayLike, num_samples: int) -> Key:
    """Keys [b * s]: s of each example's, others for every number."""

    def of_example(key: Key) -> Key:
        key = jax.random.fold_in(key, number)
        return random.fold_in_each(key, jnp.arange(num_samples))

    return jax.vmap(of_example)(keys).reshape(-1)


def _on_average(
    loss_fn: AttackLoss, y: Array, num_samples: int, targeted: bool
) -> ascent.Objective:
    """The mean loss over the photographs of each image; success on more than half of them."""
    single = ascent.objective(loss_fn, jnp.repeat(y, num_samples), targeted)

    def mean(values: Array) -> Array:
        return jnp.mean(values.reshape(-1, num_samples), axis=1)

    def success(logits: Array) -> Array:
        # Logits that are not finite are no answer, and so no wrong one.
        is_answer = metrics.predictions(logits) >= 0
        return mean(single.success(logits) & is_answer) > 0.5

    return ascent.Objective(lambda logits: mean(single.loss(logits)), success)


@traits.declare(example_keys=True)
def photo(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    channel: Channel = photograph,
    num_samples: int = 8,
    num_held: int = 16,
    num_steps: int = 40,
    step_size: ArrayLike | None = None,
    relative_step_size: ArrayLike | None = None,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
) -> Array:
    """Expectation over transformations: steepest steps in the mean loss of random photographs.

    `x' = project(x' + step direction(grad E_t loss(t(x'), y)))`, the mean over draws that are
    fresh at every step. Iterates are compared on draws that are held for the whole attack, so that
    luck in one step's draws is not taken for progress: first whether more than half of the held
    photographs do what the attack wants, then their mean loss.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      channel: `(keys [b], images) -> images`, what is between the image and the classifier;
        differentiable. Its default is `photograph` at its defaults.
      num_samples: photographs of each image in a step.
      num_held: photographs of each image by which iterates are compared.
      num_steps: number of steps.
      step_size: length of a step in the norm of the ball; scalar or [b]. It wins over
        `relative_step_size`.
      relative_step_size: length of a step in units of epsilon, by default `2.5 / num_steps`.
      ball: the norm.
      loss_fn: logits and labels to f32[b].
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images before the channel, like `x`: the best iterate of each example, the clean
      image included. Logits that are not finite never count as success.

    Static: channel, num_samples, num_held, num_steps, ball, loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon
        or step, no samples.

    Source: A. Athalye, L. Engstrom, A. Ilyas, K. Kwok, "Synthesizing Robust Adversarial Examples",
    ICML 2018. Theirs penalises the distance; here it is bounded, as for the other attacks.
    """
    balls.check("photo", ball)
    x, y = checks.attack_inputs("photo", logits_fn, x, y, epsilon)
    counts = {"num_samples": num_samples, "num_held": num_held, "num_steps": num_steps}
    for name, count in counts.items():
        checks.at_least("photo", name, count, 1)
    relative = 2.5 / num_steps if relative_step_size is None else relative_step_size
    step_size = gradient._step_size("photo", x, epsilon, step_size, relative)
    step_size = balls.per_example(step_size, x)
    keys = random.example_keys(key, x.shape[0])

    def through(number: ArrayLike, num_samples: int) -> LogitsFn:
        draws = _draws(keys, number, num_samples)
        # An image's photographs lie side by side, so a batch that is split over devices stays so.
        return lambda images: logits_fn(channel(draws, jnp.repeat(images, num_samples, axis=0)))

    goal = _on_average(loss_fn, y, num_samples, targeted)
    judge = functools.partial(
        ascent.judge, _on_average(loss_fn, y, num_held, targeted), through(0, num_held)
    )

    def step(number, carry):
        x_adv, best = carry
        seen = through(number + 1, num_samples)
        _, slope = ascent.judge_with_gradient(goal, seen, x_adv)
        x_adv = ball.project(x_adv + step_size * ball.direction(slope, x_adv), x, epsilon)
        return x_adv, ascent.better(judge(x_adv), best)

    _, best = jax.lax.fori_loop(0, num_steps, step, (x, judge(x)))
    return best.x_adv
