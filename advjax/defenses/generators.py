"""Defense-GAN: each image is replaced by the nearest one that a generator makes."""

import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from advjax.core import checks, classifier, parallel, random
from advjax.core.classifier import Randomised
from advjax.core.io import PathLike
from advjax.core.typing import Array, Key, LogitsFn
from advjax.data import Dataset
from advjax.models import layers
from advjax.training import fitting
from advjax.training.checkpoints import Checkpoints

GRADIENTS = ("straight_through", "unrolled", "none")
_SECONDS_PER_CALL = 1.0  # how often the progress bar moves


class Generator(nn.Module):
    """A small DCGAN generator: a dense layer makes a coarse map, which is doubled twice.

    A map is doubled by a convolution to four times the channels, whose values become 2 x 2 pixels:
    on a CPU that costs a quarter of a convolution after the doubling.

    Fields:
        image_shape: (h, w, c).
        latent_size: length of z.
        features: channels after the first doubling; the coarse map has twice as many.
    """

    image_shape: tuple[int, int, int]
    latent_size: int = 64
    features: int = 16

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Latents f32[b, d] to images f32[b, h, w, c] in [0, 1]."""
        height, width, channels = self.image_shape
        coarse = (-(-height // 4), -(-width // 4), 2 * self.features)
        x = nn.relu(nn.Dense(math.prod(coarse), kernel_init=layers.he_fan_in, name="dense")(z))
        x = x.reshape(-1, *coarse)
        x = nn.relu(_pixels(layers.Conv(4 * self.features, name="conv1")(x)))
        x = _pixels(layers.Conv(4 * channels, name="conv2")(x))
        return nn.sigmoid(x[:, :height, :width])


def _pixels(x: jax.Array) -> jax.Array:
    """f32[b, h, w, 4 c] to f32[b, 2 h, 2 w, c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


class Critic(nn.Module):
    """A small DCGAN critic: convolutions of stride 2 and one number; without batch normalisation,
    which the gradient penalty, a matter of single images, does not allow.

    Fields:
        features: channels of each convolution.
    """

    features: tuple[int, ...] = (16, 32)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images f32[b, h, w, c] to f32[b], higher for real ones."""
        for i, features in enumerate(self.features):
            x = nn.leaky_relu(layers.Conv(features, strides=2, name=f"conv{i}")(x), 0.2)
        return nn.Dense(1, name="score")(x.reshape(x.shape[0], -1))[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratorFn:
    """A generator with its weights: latents f32[b, latent_size] to images f32[b, h, w, c].

    Attributes:
      function: what makes the images; best a pytree, such as a `Partial` with the weights.
      latent_size: length of z, static.
    """

    function: Any
    latent_size: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        # A plain function is no pytree. What jax puts here while it flattens stays as it is.
        if callable(self.function):
            object.__setattr__(self, "function", classifier.as_pytree(self.function))

    def __call__(self, z: Array) -> Array:
        return self.function(z)


# ------------------------------------------------------------------------------------ training


class _State(NamedTuple):
    step: Array
    params: dict[str, Any]  # of "generator" and "critic"
    opt_states: dict[str, Any]
    distance: Array  # the critic's estimate of the Wasserstein distance


class _Program(NamedTuple):
    """A training run but for its arrays."""

    generator: Generator
    critic: nn.Module
    batch_size: int
    num_critic_steps: int

    def init(self, key: Key, images: Array, optimizer) -> _State:
        key_generator, key_critic = jax.random.split(random.named(key, "init"))
        z = jnp.zeros((1, self.generator.latent_size))
        params = {
            "generator": self.generator.init(key_generator, z)["params"],
            "critic": self.critic.init(key_critic, fitting.as_float(images[:1]))["params"],
        }
        opt_states = {name: optimizer.init(values) for name, values in params.items()}
        return _State(jnp.zeros((), jnp.int32), params, opt_states, jnp.zeros(()))

    def step(self, key: Key, images: Array, optimizer, penalty: Array, state: _State) -> _State:
        """Steps of the critic, then one of the generator."""

        def make(params: Any, key: Key) -> Array:
            z = jax.random.normal(key, (self.batch_size, self.generator.latent_size))
            return jnp.asarray(self.generator.apply({"params": params}, z))

        def score(params: Any, x: Array) -> Array:
            return jnp.asarray(self.critic.apply({"params": params}, x))

        def critic_loss(params: Any, generator_params: Any, key: Key) -> tuple[Array, Array]:
            key_rows, key_latent, key_mix = jax.random.split(key, 3)
            rows = jax.random.randint(key_rows, (self.batch_size,), 0, len(images))
            real, fake = fitting.as_float(images[rows]), make(generator_params, key_latent)
            distance = jnp.mean(score(params, real)) - jnp.mean(score(params, fake))
            share = jax.random.uniform(key_mix, (self.batch_size, 1, 1, 1))
            slope = jax.grad(lambda x: jnp.sum(score(params, x)))(real + share * (fake - real))
            # A slope of zero has a length, but its length has no slope.
            length = jnp.sqrt(jnp.sum(slope**2, axis=(1, 2, 3)) + 1e-12)
            return penalty * jnp.mean((length - 1) ** 2) - distance, distance

        def generator_loss(params: Any, critic_params: Any, key: Key) -> Array:
            return -jnp.mean(score(critic_params, make(params, key)))

        def descend(state: _State, name: str, gradient: Any) -> _State:
            updates, opt_state = optimizer.update(gradient, state.opt_states[name])
            params = optax.apply_updates(state.params[name], updates)
            return state._replace(
                params=state.params | {name: params},
                opt_states=state.opt_states | {name: opt_state},
            )

        key = jax.random.fold_in(random.named(key, "step"), state.step)
        key_critic, key_generator = jax.random.split(key)

        def improve_critic(number: int, state: _State) -> _State:
            gradient, distance = jax.grad(critic_loss, has_aux=True)(
                state.params["critic"], state.params["generator"],
                jax.random.fold_in(key_critic, number),
            )  # fmt: skip
            return descend(state, "critic", gradient)._replace(distance=distance)

        state = jax.lax.fori_loop(0, self.num_critic_steps, improve_critic, state)
        gradient = jax.grad(generator_loss)(
            state.params["generator"], state.params["critic"], key_generator
        )
        return descend(state, "generator", gradient)._replace(step=state.step + 1)


def _adam(learning_rate: Any) -> optax.GradientTransformation:
    return optax.adam(learning_rate, b1=0.5, b2=0.9)


@functools.partial(jax.jit, static_argnames="program")
def _init(program: _Program, key: Key, images: Array, learning_rate: Array) -> _State:
    return program.init(key, images, _adam(learning_rate))


@functools.partial(jax.jit, static_argnames="program", donate_argnums=1)
def _run(program, state, key, images, learning_rate, penalty, stop) -> _State:
    step = functools.partial(program.step, key, images, _adam(learning_rate), penalty)
    return jax.lax.fori_loop(state.step, stop, lambda _, state: step(state), state)


def train_generator(
    key: Key,
    module: Generator,
    dataset: Dataset,
    *,
    critic: nn.Module | None = None,
    num_steps: int = 30_000,
    batch_size: int = 64,
    num_critic_steps: int = 5,
    learning_rate: ArrayLike = 1e-4,
    penalty: ArrayLike = 10.0,
    checkpoint_dir: PathLike | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> GeneratorFn:
    """Trains a generator as a Wasserstein GAN with gradient penalty.

    The critic C ascends `mean C(x) - mean C(G(z)) - penalty mean (||grad C(u)||_2 - 1)^2`, with u
    uniform on the line from a real image to a made one; after several of its steps the generator
    ascends `mean C(G(z))` by one; z is N(0, I). Batches are drawn with replacement.

    Args:
      key: a key.
      module: a `Generator`, or another flax module with a `latent_size`, from f32[b, latent_size]
        to images f32[b, h, w, c] in [0, 1].
      dataset: training images; the labels are not used.
      critic: flax module from images to f32[b]; `Critic()` if None.
      num_steps: steps of the generator.
      batch_size: images a step.
      num_critic_steps: steps of the critic for each.
      learning_rate: of Adam with decays 0.5 and 0.9.
      penalty: weight of the gradient penalty.
      checkpoint_dir: folder for checkpoints; if it holds one of this run, training goes on there.
      checkpoint_every: seconds between checkpoints; one is always written at the end.
      progress: show a progress bar with the critic's estimate of the distance.

    Returns:
      A `GeneratorFn`.

    Static: module, critic, num_steps, batch_size, num_critic_steps.

    Raises:
      ValueError: a generator for another image shape, a count below 1, an empty data set, a
        negative number.

    Source: I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville, "Improved Training of
    Wasserstein GANs", NeurIPS 2017.
    """
    caller = "train_generator"
    for name, count in (
        ("num_steps", num_steps), ("batch_size", batch_size),
        ("num_critic_steps", num_critic_steps), ("number of images", len(dataset)),
        ("latent_size", module.latent_size),
    ):  # fmt: skip
        checks.at_least(caller, name, count, 1)
    for name, value in (("learning_rate", learning_rate), ("penalty", penalty)):
        checks.non_negative(caller, name, value)
    key = random.as_typed(key)
    _check_makes_images(
        caller, lambda z: module.init_with_output(key, z)[0], module.latent_size,
        dataset.image_shape,
    )  # fmt: skip
    program = _Program(module, critic or Critic(), batch_size, num_critic_steps)
    images = jnp.asarray(dataset.images)
    learning_rate, penalty = jnp.asarray(learning_rate, "f4"), jnp.asarray(penalty, "f4")
    state = _init(program, key, images, learning_rate)
    checkpoints = None
    if checkpoint_dir is not None:
        description = {
            "program": " ".join(repr(program).split()), "num_steps": num_steps,
            "learning_rate": float(learning_rate), "penalty": float(penalty),
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "data": fitting.fingerprint(dataset.images),
        }  # fmt: skip
        checkpoints = Checkpoints(checkpoint_dir, description, caller=caller)
        restored = checkpoints.restore(state)
        state = state if restored is None else restored
    done, chunk, saved_at = int(state.step), 1, time.monotonic()
    is_quiet = not (progress and parallel.is_main_process()) or done == num_steps
    with tqdm(total=num_steps, initial=done, desc=caller, unit="step", disable=is_quiet) as bar:
        while done < num_steps:
            stop, started = min(done + chunk, num_steps), time.monotonic()
            state = _run(program, state, key, images, learning_rate, penalty, stop)
            bar.set_postfix(distance=f"{float(state.distance):.3f}", refresh=False)
            bar.update(stop - done)
            seconds = max(time.monotonic() - started, 1e-4)
            # The first call compiles; from then on aim at one call a second.
            chunk = 2 if done == 0 else max(1, round((stop - done) * _SECONDS_PER_CALL / seconds))
            done = stop
            is_due = time.monotonic() - saved_at >= checkpoint_every
            if checkpoints is not None:
                chunk, is_due = parallel.agree(chunk, is_due)
            if checkpoints is not None and (is_due or done == num_steps):
                checkpoints.save(done, state)
                saved_at = time.monotonic()
    variables = {"params": state.params["generator"]}
    return GeneratorFn(classifier.bind(module, variables), module.latent_size)


# ------------------------------------------------------------------------------ reconstruction


def reconstruct(
    key: Key,
    generator_fn: GeneratorFn,
    x: Array,
    *,
    num_steps: int = 200,
    num_restarts: int = 10,
    learning_rate: ArrayLike = 10.0,
    momentum: ArrayLike = 0.7,
) -> Array:
    """The generator's image nearest to each image: `argmin_z mean (G(z) - x)^2` over the pixels.

    Gradient descent with momentum from R starts `z ~ N(0, I / d)`, for all images at once; each
    keeps its best end. Starts are nearer to 0 than the latents of the training, as in the authors'
    code. Its learning rate is meant to fall to a tenth after 0.8 L steps, but stays as it is, and
    so does this one.

    Args:
      key: a key, or one key an example [b]. Example i starts from `fold_in(key, i)`, so its result
        does not depend on the batch.
      generator_fn: a `GeneratorFn`.
      x: images, f32[b, h, w, c] in [0, 1].
      num_steps: L.
      num_restarts: R.
      learning_rate: of the descent.
      momentum: of the descent.

    Returns:
      Images like `x`.

    Static: num_steps, num_restarts.

    Raises:
      ValueError: a generator for another image shape, a count below 1, a negative number, images
        that are not floats in [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> grey = GeneratorFn(lambda z: jnp.tile(z[:, :, None, None], (1, 4, 4, 1)), latent_size=1)
      >>> reconstruct(jax.random.key(0), grey, jnp.eye(4).reshape(1, 4, 4, 1), learning_rate=0.1,
      ...             num_steps=100)[0, 0, 0].round(3)
      Array([0.25], dtype=float32)

    Source: P. Samangouei, M. Kabkab, R. Chellappa, "Defense-GAN: Protecting Classifiers Against
    Adversarial Attacks Using Generative Models", ICLR 2018.
    """
    caller = "reconstruct"
    checks.images(caller, x)
    checks.four_axes(caller, x)
    _check_descent(caller, num_steps, num_restarts, learning_rate, momentum)
    _check_makes_images(caller, generator_fn, generator_fn.latent_size, x.shape[1:])
    b, d = x.shape[0], generator_fn.latent_size
    keys = random.example_keys(key, b)
    start = jax.vmap(lambda key: jax.random.normal(key, (num_restarts, d), x.dtype))(keys)
    start = start.reshape(b * num_restarts, d) / jnp.sqrt(d).astype(x.dtype)
    # One row a start: the restarts of an image are neighbours.
    targets = jnp.repeat(x, num_restarts, axis=0)
    # Under `shard_map` the descent varies over the devices as the images do.
    start = start + 0 * targets[:, :1, 0, 0]
    learning_rate, momentum = (jnp.asarray(value, x.dtype) for value in (learning_rate, momentum))

    def errors(z: Array) -> Array:
        return jnp.mean((generator_fn(z) - targets) ** 2, axis=(1, 2, 3))

    def descend(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        z, velocity = carry
        velocity = momentum * velocity + jax.grad(lambda z: jnp.sum(errors(z)))(z)
        return (z - learning_rate * velocity, velocity), None

    (z, _), _ = jax.lax.scan(descend, (start, jnp.zeros_like(start)), length=num_steps)
    error = errors(z).reshape(b, num_restarts)
    best = jnp.argmin(jnp.where(jnp.isfinite(error), error, jnp.inf), axis=1)
    chosen = jnp.take_along_axis(z.reshape(b, num_restarts, d), best[:, None, None], axis=1)
    return generator_fn(chosen[:, 0]).astype(x.dtype)


def defense_gan(
    logits_fn: LogitsFn,
    generator_fn: GeneratorFn,
    *,
    key: Key,
    num_steps: int = 200,
    num_restarts: int = 10,
    learning_rate: ArrayLike = 10.0,
    momentum: ArrayLike = 0.7,
    gradient: str = "straight_through",
) -> Randomised:
    """The classifier behind Defense-GAN: it sees the reconstruction of each image.

    Its gradient for attacks is a choice, which changes no answer: "straight_through" takes the
    reconstruction for the identity, so `attacks.pgd` on the result is BPDA; "unrolled"
    differentiates through all steps of the descent, with memory for each; "none" is zero.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      generator_fn: a `GeneratorFn`.
      key: of the starts of the descents, the same at each call; a key, or one key an example [b].
      num_steps: L of `reconstruct`.
      num_restarts: R of `reconstruct`.
      learning_rate: of `reconstruct`.
      momentum: of `reconstruct`.
      gradient: "straight_through", "unrolled" or "none".

    Returns:
      A `Randomised` classifier; its `mean_of` averages over starts.

    Static: num_steps, num_restarts, gradient.

    Raises:
      ValueError: an unknown gradient, a count below 1; when it is called, a generator for another
        image shape.

    Source: P. Samangouei, M. Kabkab, R. Chellappa, ICLR 2018; BPDA: A. Athalye, N. Carlini,
    D. Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018.
    """
    checks.known("defense_gan", "gradient", gradient, GRADIENTS)
    _check_descent("defense_gan", num_steps, num_restarts, learning_rate, momentum)
    behind = _Behind(num_steps, num_restarts, gradient)
    return Randomised(
        Partial(
            behind, classifier.as_pytree(logits_fn), generator_fn,
            jnp.asarray(learning_rate), jnp.asarray(momentum),
        ),
        key,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Behind:
    num_steps: int
    num_restarts: int
    gradient: str

    def __call__(
        self, logits_fn: LogitsFn, generator_fn: GeneratorFn, learning_rate: Array,
        momentum: Array, key: Key, x: Array,
    ) -> Array:  # fmt: skip
        image = reconstruct(
            key, generator_fn, x if self.gradient == "unrolled" else jax.lax.stop_gradient(x),
            num_steps=self.num_steps, num_restarts=self.num_restarts,
            learning_rate=learning_rate, momentum=momentum,
        )  # fmt: skip
        return logits_fn(_moving_with(x, image) if self.gradient == "straight_through" else image)


# `x + stop_gradient(image - x)` would have the same gradient, but is not quite the image.
@jax.custom_jvp
def _moving_with(x: Array, image: Array) -> Array:
    """The image, with the gradient of x."""
    del x
    return image


_moving_with.defjvps(lambda tangent, *_: tangent, None)


# -------------------------------------------------------------------------------------- checks


def _check_descent(
    caller: str, num_steps: int, num_restarts: int, learning_rate: ArrayLike, momentum: ArrayLike
) -> None:
    checks.at_least(caller, "num_steps", num_steps, 1)
    checks.at_least(caller, "num_restarts", num_restarts, 1)
    checks.non_negative(caller, "learning_rate", learning_rate)
    checks.non_negative(caller, "momentum", momentum)


def _check_makes_images(
    caller: str, generator_fn: Any, latent_size: int, image_shape: tuple[int, ...]
) -> None:
    try:
        z = jax.ShapeDtypeStruct((1, latent_size), jnp.float32)
        made = jax.eval_shape(generator_fn, z).shape[1:]
    except (flax.errors.FlaxError, TypeError) as error:
        raise ValueError(
            f"{caller}: need a generator of latents of length {latent_size}, got another one."
        ) from error
    if tuple(made) != tuple(image_shape):
        raise ValueError(
            f"{caller}: need a generator of images of shape {tuple(image_shape)}, got one that "
            f"makes {tuple(made)}."
        )
