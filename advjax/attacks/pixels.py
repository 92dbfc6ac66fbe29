"""The one-pixel attack: differential evolution over where to paint a few pixels, and how."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.attacks import ascent, patches, queries
from advjax.core import balls, checks, losses, random, traits
from advjax.core.typing import Array, AttackLoss, Key, LogitsFn

STRATEGIES = ("rand1", "best1")


def _first_generation(key: Key, x: Array, population: int, num_pixels: int) -> Array:
    """Genomes of one image, f32[population, num_pixels, 2 + c] in [0, 1]: row, column, colour.

    Places are uniform and colours N(128, 127) of 255. The first individual repaints its pixels in
    their own colours, so that the clean image is judged as one of the population.
    """
    key_place, key_colour = jax.random.split(key)
    place = jax.random.uniform(key_place, (population, num_pixels, 2))
    colour = jax.random.normal(key_colour, (population, num_pixels, x.shape[-1]))
    colour = jnp.clip((128 + 127 * colour) / 255, 0, 1)
    rows, columns = _position(place[0], x)
    colour = colour.at[0].set(x[rows, columns].astype(colour.dtype))
    return jnp.concatenate([place, colour], axis=-1)


def _position(place: Array, x: Array) -> tuple[Array, Array]:
    """Row and column of each place, f32[..., 2] in [0, 1], of an image [h, w, c]."""
    height, width = x.shape[:2]
    rows = jnp.minimum(place[..., 0] * height, height - 1).astype(jnp.int32)
    columns = jnp.minimum(place[..., 1] * width, width - 1).astype(jnp.int32)
    return rows, columns


def _strokes(genome: Array, x: Array, epsilon: ArrayLike) -> tuple[Array, Array, Array]:
    """Row, column and new colour [c] of each pixel of a genome, as `paint` has it."""
    rows, columns = _position(genome, x)
    before = x[rows, columns]
    # A colour further away than epsilon stands for the nearest that is allowed.
    return rows, columns, balls.linf.project(genome[:, 2:].astype(x.dtype), before, epsilon)


def paint(genome: Array, x: Array, epsilon: ArrayLike) -> Array:
    """The image with the pixels of a genome painted over it, one after the other.

    Args:
      genome: row, column and colour of each pixel, f32[num_pixels, 2 + c] in [0, 1].
      x: one image, [h, w, c].
      epsilon: largest change of a value.

    Returns:
      [h, w, c].
    """
    rows, columns, colours = _strokes(genome, x, epsilon)

    def one(i, image):  # in turn: where two pixels coincide, the later one is seen
        return image.at[rows[i], columns[i]].set(colours[i])

    return jax.lax.fori_loop(0, len(genome), one, x)


def _three_others(uniform: Array) -> Array:
    """For each individual three others, all different: int32[3, population] from f32 in [0, 1)."""
    population = uniform.shape[1]
    # Places in the circle of the others, each drawn from those that are left.
    left = population - 1 - jnp.arange(3)[:, None]
    first, second, third = jnp.minimum(uniform * left, left - 1).astype(jnp.int32)
    second = second + (second >= first)
    third = third + (third >= jnp.minimum(first, second))
    third = third + (third >= jnp.maximum(first, second))
    return (jnp.arange(population) + 1 + jnp.stack([first, second, third])) % population


def _offspring(key: Key, genomes: Array, loss: Array, strategy: str) -> Array:
    """Every individual's challenger, `base + F (b - c)`, without crossover."""
    population, num_pixels, _ = genomes.shape
    # All draws in one: a call of jax.random takes long to compile.
    uniform = jax.random.uniform(key, (4 + 2 * num_pixels, population))
    a, b, c = _three_others(uniform[:3])
    if strategy == "rand1":
        base, scale = genomes[a], 0.5
    else:
        base, scale = genomes[jnp.argmax(loss)], 0.5 + 0.5 * uniform[3, 0]
    genome = base + scale * (genomes[b] - genomes[c])
    # A place outside the image is drawn anew, since the edges would collect them; a colour beyond
    # black or white is black or white.
    place = genome[..., :2]
    is_inside = (place >= 0) & (place <= 1)
    place = jnp.where(is_inside, place, uniform[4:].T.reshape(place.shape))
    return jnp.concatenate([place, jnp.clip(genome[..., 2:], 0, 1)], axis=-1)


@traits.declare(example_keys=True)
def one_pixel(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike = 1.0,
    *,
    num_pixels: int = 1,
    population: int = 400,
    generations: int = 100,
    strategy: str = "best1",
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
    batch_size: int | None = None,
    is_local: bool | None = None,
) -> Array:
    """One-pixel attack: differential evolution of the place and the colour of a few pixels.

    An individual is `num_pixels` times (row, column, colour); each generation every individual is
    challenged by a mixture of others, `a + F (b - c)`, and the one with the larger loss stays. The
    loss is asked for, never its gradient. An image asks the classifier
    `population * (generations + 1)` times, the clean image included; the populations of all images
    are evaluated in one call.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: largest change of a value; 1 leaves the colour free. Scalar or [b].
      num_pixels: how many pixels, with all their channels, may change.
      population: individuals of each image, at least 4.
      generations: how often they are challenged.
      strategy: "best1" is that of SciPy, which the peers' code uses: `a` is the best individual
        and F is drawn from [0.5, 1) each generation. "rand1" is the paper's: `a` is any
        individual and F is 0.5; it needs more queries for the same success.
      loss_fn: logits and labels to f32[b]. Only its order matters, so the cross-entropy is the
        paper's probability of the label without its saturation.
      targeted: descend the loss of `y` instead.
      batch_size: individuals of each image that are evaluated at a time, which bounds memory; the
        whole population by default.
      is_local: for one pixel, compute of each convolution and pooling only the places that the
        pixel reaches, and take the rest from the clean image; the logits are the same up to
        rounding. By default on a CPU for images of at least 16x16 pixels, where it makes small
        convolutional networks 1.6 to 4 times faster and leaves others as they are, but for a
        longer compilation; on other devices it has not been measured.

    Returns:
      Adversarial images, like `x`: for each example the best of the first generation that
      succeeds, else the best of all, else the clean image. Logits that are not finite are never
      a success.

    Static: num_pixels, population, generations, strategy, loss_fn, targeted, batch_size, is_local.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon,
        more pixels than the image has, a budget of nothing, an unknown strategy.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> logits_fn = lambda x: jnp.stack([x[:, 1, 2, 0], 0.5 + 0 * x[:, 0, 0, 0]], axis=-1)
      >>> x, y = jnp.ones((1, 4, 4, 1)), jnp.array([0])
      >>> attack = functools.partial(one_pixel, population=50, generations=10)
      >>> x_adv = jax.jit(attack, static_argnums=1)(jax.random.key(0), logits_fn, x, y)
      >>> bool(x_adv[0, 1, 2, 0] < 0.5), int(jnp.sum(x_adv != x))
      (True, 1)

    Source: J. Su, D. Vargas, K. Sakurai, "One Pixel Attack for Fooling Deep Neural Networks",
    IEEE Transactions on Evolutionary Computation 2019.
    """
    x, y = checks.attack_inputs("one_pixel", logits_fn, x, y, epsilon)
    _check_options(x, num_pixels, population, generations, strategy, batch_size)
    if is_local is None:
        is_local = jax.default_backend() == "cpu" and min(x.shape[1:3]) >= 16
    goal = queries.objective(loss_fn, y, targeted)
    wide = jnp.promote_types(x.dtype, jnp.float32)  # in bfloat16 epsilon could be rounded up
    epsilon = jnp.broadcast_to(jnp.asarray(epsilon, wide), x.shape[:1])

    def judged(genomes: Array) -> tuple[Array, Array]:
        """Success bool[b, p] and loss f32[b, p] of genomes [b, p, num_pixels, 2 + c]."""

        def of_all(function):
            return jax.vmap(jax.vmap(function, (0, None, None)))(genomes, x, epsilon)

        if is_local and num_pixels == 1:
            rows, columns, colours = (value[:, :, 0] for value in of_all(_strokes))
            logits = patches.answers(logits_fn, x, rows, columns, colours)
            return queries.judge_answers(goal, logits)
        return queries.judge(goal, logits_fn, of_all(paint))

    def evaluate(genomes: Array) -> tuple[Array, ascent.Judged]:
        """The loss of every individual, f32[b, population], and each image's best one."""
        if batch_size is None:
            success, loss = judged(genomes)
        else:
            of_one = jax.lax.map(
                lambda genome: judged(genome[:, None]), jnp.moveaxis(genomes, 1, 0),
                batch_size=batch_size,
            )  # fmt: skip
            success, loss = (values[..., 0].T for values in of_one)
        any_success = jnp.any(success, axis=1)
        lowest = jnp.finfo(loss.dtype).min
        eligible = jnp.where(success == any_success[:, None], jnp.maximum(loss, lowest), -jnp.inf)
        best = queries.pick(genomes, jnp.argmax(eligible, axis=1))
        x_adv = jax.vmap(paint)(best, x, epsilon)
        return loss, ascent.Judged(x_adv, any_success, jnp.max(eligible, axis=1))

    keys = random.example_keys(key, x.shape[0])

    def keys_of(number: ArrayLike) -> Key:
        return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)

    def generation(number, carry):
        genomes, loss, best = carry
        trials = jax.vmap(_offspring, (0, 0, 0, None))(keys_of(number), genomes, loss, strategy)
        trial_loss, found = evaluate(trials)
        # An equal one wins too, so that a population drifts over a plateau.
        wins = trial_loss >= loss
        genomes = jnp.where(wins[..., None, None], trials, genomes)
        # An image that has succeeded is done: whatever is found later does not replace it.
        found = found._replace(success=found.success & ~best.success)
        return genomes, jnp.where(wins, trial_loss, loss), ascent.better(found, best)

    start = jax.vmap(_first_generation, (0, 0, None, None))
    genomes = start(keys_of(0), x, population, num_pixels)
    carry = (genomes, *evaluate(genomes))
    _, _, best = jax.lax.fori_loop(1, generations + 1, generation, carry)
    return best.x_adv


def _check_options(x, num_pixels, population, generations, strategy, batch_size) -> None:
    if x.ndim != 4:
        raise ValueError(f"one_pixel: need images of shape [b, h, w, c], got {x.shape}.")
    checks.at_least("one_pixel", "num_pixels", num_pixels, 1)
    checks.at_least("one_pixel", "population", population, 4)
    checks.at_least("one_pixel", "generations", generations, 1)
    checks.known("one_pixel", "strategy", strategy, STRATEGIES)
    if batch_size is not None:
        checks.at_least("one_pixel", "batch_size", batch_size, 1)
    height, width = x.shape[1:3]
    if num_pixels > height * width:
        raise ValueError(
            f"one_pixel: need num_pixels <= {height * width} for images of {height} x {width}, "
            f"got num_pixels={num_pixels}."
        )
