"""How robust a classifier is: accuracy, robustness curves over epsilon, the worst of many attacks.

Unlike the attacks, these functions compile themselves: a curve is the outermost function of a
study, and eager users would otherwise compile it on every call. They still work inside `jit` and
`vmap` (all methods but "active").
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from advjax.core import checks, classifier, compaction, metrics, parallel, random, traits
from advjax.core.typing import Array, Attack, Key, LogitsFn, MinNorm

METHODS = ("map", "vmap", "bisect", "active")

# --------------------------------------------------------------------------- batches on a mesh


def _in_batches(tree: Any, num_examples: int, batch_size: int | None, mesh: Mesh | None) -> Any:
    """Arrays [n, ...] padded to [batches, batch, ...], each batch split over the mesh."""
    batch = num_examples if batch_size is None else min(batch_size, num_examples)
    batch = parallel.padded(max(batch, 1), 1 if mesh is None else mesh.size)
    total = parallel.padded(num_examples, batch)

    def split(leaf: Array) -> Array:
        # Padding repeats the last example: real images, whose results are dropped.
        host = jnp if isinstance(leaf, jax.core.Tracer) else np
        leaf = host.asarray(leaf)
        padding = host.repeat(leaf[-1:], total - num_examples, axis=0)
        return host.concatenate([leaf, padding]).reshape(-1, batch, *leaf.shape[1:])

    return parallel.place(jax.tree.map(split, tree), mesh, axis=1)


def _over_batches(function, batches: Any, num_examples: int) -> Any:
    """Maps over [batches, batch, ...]; the results are [n, ...] without the padding."""
    results = jax.lax.map(function, batches)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_examples], results)


def _check_data(caller: str, logits_fn: LogitsFn, x: Array, y: Array, batch_size: int | None):
    checks.images(caller, x)
    checks.labels(caller, y, x, logits_fn)
    if jnp.shape(x)[0] == 0:
        raise ValueError(f"{caller}: need at least one image, got none.")
    if batch_size is not None:
        checks.at_least(caller, "batch_size", batch_size, 1)


# ------------------------------------------------------------------------------------ accuracy


@functools.partial(jax.jit, static_argnames=("num_examples", "mesh"))
def _logits(logits_fn: LogitsFn, batches: Array, num_examples: int, mesh: Mesh | None) -> Array:
    return parallel.place(_over_batches(logits_fn, batches, num_examples), mesh)


def predict(
    logits_fn: LogitsFn, x: Array, *, batch_size: int | None = None, mesh: Mesh | None = None
) -> Array:
    """Logits of all images, in batches.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[n, h, w, c] in [0, 1].
      batch_size: images at a time; all by default.
      mesh: devices to split each batch over.

    Returns:
      f32[n, k].

    Static: batch_size, mesh.

    Raises:
      ValueError: images that are not floats in [0, 1], a batch size below 1.
    """
    checks.images("predict", x)
    if batch_size is not None:
        checks.at_least("predict", "batch_size", batch_size, 1)
    batches = _in_batches(x, x.shape[0], batch_size, mesh)
    logits_fn = parallel.place(classifier.as_pytree(logits_fn), mesh)
    return parallel.gather(_logits(logits_fn, batches, x.shape[0], mesh), mesh)


def accuracy(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Share of images that the classifier answers correctly.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      batch_size: images at a time; all by default.
      mesh: devices to split each batch over.

    Returns:
      f32[], between 0 and 1. Logits that are not finite count as wrong.

    Static: batch_size, mesh.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.eye(4).reshape(4, 1, 4, 1), jnp.array([0, 1, 2, 0])
      >>> float(accuracy(lambda x: x.reshape(-1, 4), x, y, batch_size=3))
      0.75
    """
    _check_data("accuracy", logits_fn, x, y, batch_size)
    logits = predict(logits_fn, x, batch_size=batch_size, mesh=mesh)
    return _share(metrics.is_correct(logits, jnp.asarray(y)))


def fooling_rate(
    logits_fn: LogitsFn,
    x: Array,
    x_adv: Array,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Share of images whose answer changes, whatever their labels are.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      x: clean images, f32[n, h, w, c] in [0, 1]; for a universal perturbation, images that it was
        not fitted to.
      x_adv: adversarial images, like `x`; or one perturbation for all, f32[h, w, c], which is
        applied as `clip(x + x_adv, 0, 1)`.
      batch_size: images at a time; all by default.
      mesh: devices to split each batch over.

    Returns:
      f32[], between 0 and 1. Logits that are not finite, before or after, are no change.

    Static: batch_size, mesh.

    Raises:
      ValueError: images that are not floats in [0, 1] or none at all, adversarial images of another
        shape.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.2, 0.4, 0.8]).reshape(3, 1, 1, 1)
      >>> logits_fn = lambda x: (x[:, 0, 0] - 0.5) * jnp.array([-1.0, 1.0])
      >>> fooling_rate(logits_fn, x, jnp.full((1, 1, 1), 0.2))
      Array(0.33333334, dtype=float32)

    Source: S.-M. Moosavi-Dezfooli, A. Fawzi, O. Fawzi, P. Frossard, "Universal Adversarial
    Perturbations", CVPR 2017.
    """
    checks.images("fooling_rate", x)
    if jnp.shape(x)[0] == 0:
        raise ValueError("fooling_rate: need at least one image, got none.")
    if jnp.shape(x_adv) not in (jnp.shape(x), jnp.shape(x)[1:]):
        raise ValueError(
            f"fooling_rate: need images of shape {jnp.shape(x)} or one perturbation of shape "
            f"{jnp.shape(x)[1:]}, got shape {jnp.shape(x_adv)}."
        )
    if jnp.ndim(x_adv) < jnp.ndim(x):
        x_adv = jnp.clip(x + jnp.asarray(x_adv), 0, 1).astype(x.dtype)
    checks.images("fooling_rate", x_adv)
    before, after = (
        metrics.predictions(predict(logits_fn, images, batch_size=batch_size, mesh=mesh))
        for images in (x, x_adv)
    )
    return _share(metrics.has_changed(before, after))


def _share(mask: Array) -> Array:
    """Share of true entries along the last axis: a whole count, divided once."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32) / mask.shape[-1]


# -------------------------------------------------------------------------------------- curves


def _attack_key(attack: Attack, key: Key, index: Array) -> Key:
    """One key an example for our attacks; for others one key a batch, that of its first example."""
    if traits.of(attack).example_keys:
        return random.fold_in_each(key, index)
    return jax.random.fold_in(key, index[0])


def _withstands(attack, key, logits_fn, x, y, index, epsilon) -> Array:
    x_adv = attack(_attack_key(attack, key, index), logits_fn, x, y, epsilon)
    return metrics.is_correct(logits_fn(x_adv), y)


def _withstands_each(attack, key, logits_fn, epsilons, batch, *, vectorised: bool) -> Array:
    """bool[b, epsilons]: whether the classifier is right about each image attacked at each."""
    x, y, index = batch

    def at(epsilon):
        return _withstands(attack, key, logits_fn, x, y, index, epsilon)

    correct = jax.vmap(at)(epsilons) if vectorised else jax.lax.map(at, epsilons)
    # An attack may move an image that is wrong by itself to its label.
    return (correct & metrics.is_correct(logits_fn(x), y)).T


def _withstands_by_bisection(attack, key, logits_fn, epsilons, batch) -> Array:
    """bool[b, epsilons] from a binary search of the first epsilon that breaks each image."""
    x, y, index = batch
    is_clean = metrics.is_correct(logits_fn(x), y)

    # Epsilons below `low` are withstood and from `high` on they are not.
    def halve(_, bounds):
        low, high = bounds
        middle = jnp.minimum((low + high) // 2, len(epsilons) - 1)
        correct = _withstands(attack, key, logits_fn, x, y, index, epsilons[middle])
        is_open = low < high
        low = jnp.where(is_open & correct, middle + 1, low)
        return low, jnp.where(is_open & ~correct, middle, high)

    low = index * 0
    high = jnp.where(is_clean, len(epsilons), 0).astype(index.dtype)
    num_attacks = math.ceil(math.log2(len(epsilons) + 1))
    first_broken, _ = jax.lax.fori_loop(0, num_attacks, halve, (low, high))
    return jnp.arange(len(epsilons)) < first_broken[:, None]


@functools.partial(jax.jit, static_argnames=("attack", "method", "num_examples", "mesh"))
def _survival(key, attack, logits_fn, batches, epsilons, *, method, num_examples, mesh) -> Array:
    """bool[epsilons, n] for epsilons in ascending order; each row is within the one before."""
    if method == "bisect":
        function = functools.partial(_withstands_by_bisection, attack, key, logits_fn, epsilons)
    else:
        function = functools.partial(
            _withstands_each, attack, key, logits_fn, epsilons, vectorised=method == "vmap"
        )
    correct = parallel.place(_over_batches(function, batches, num_examples).T, mesh)
    # Adversarial at epsilon is adversarial at every larger one.
    return jnp.cumprod(correct.astype(jnp.int8), axis=0).astype(bool)


@functools.partial(jax.jit, static_argnames="mesh")
def _correct_clean(logits_fn, x, y, *, mesh) -> Array:
    return parallel.place(metrics.is_correct(logits_fn(x), y), mesh)


@functools.partial(jax.jit, static_argnames=("attack", "mesh"))
def _correct_attacked(attack, key, logits_fn, x, y, index, epsilon, *, mesh) -> Array:
    return parallel.place(_withstands(attack, key, logits_fn, x, y, index, epsilon), mesh)


def _survival_of_active(key, attack, logits_fn, x, y, epsilons, batch_size, mesh) -> np.ndarray:
    """Walks up the epsilons on the host and attacks only the images that are still withstood."""
    arrays = np.asarray(x), np.asarray(y), np.arange(len(x), dtype=np.int32)
    sizes = compaction.sizes(len(x), batch_size, mesh)

    def among(function, alive: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(alive)
        result = np.zeros(len(alive), bool)
        if rows.size:
            result[rows] = compaction.over(function, arrays, rows, sizes, mesh)
        return result

    alive = among(lambda x, y, _: _correct_clean(logits_fn, x, y, mesh=mesh), np.ones(len(x), bool))
    survival = []
    for epsilon in epsilons:
        alive = among(
            lambda x, y, index, epsilon=epsilon: _correct_attacked(
                attack, key, logits_fn, x, y, index, epsilon, mesh=mesh
            ),
            alive,
        )
        survival.append(alive)
    return np.stack(survival)


def default_method(attack: Attack) -> str:
    """The method that `robust_accuracy` uses when none is named.

    "bisect" for attacks that declare themselves monotone, "map" for all others. Monotone are
    `apgd`, `apgd_targeted`, `auto_attack`, `bim`, `pgd` and `square`. In a curve each attack of
    `auto_attack` is run on every image; `attacks.cascade` and launch/auto_attack.py run it only on
    those that the attacks before left.

    On a CPU, work is time: bisection does the least of it, and `vmap` gains nothing over "map"
    (benchmarks/evasion.py). Accelerators have not been measured yet and get the same choice.

    Args:
      attack: the attack, or a `functools.partial` of it.
    """
    return "bisect" if traits.of(attack).monotone else "map"


def survival(
    key: Key,
    attack: Attack,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilons: ArrayLike,
    *,
    method: str | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Which images the classifier still answers correctly at each epsilon, image by image.

    `robust_accuracy` is its mean over the images; its arguments are explained there.

    Returns:
      bool[len(epsilons), n]. An image that an attack breaks at some epsilon is broken at every
      larger one.
    """
    checks.fixed_budget("robust_accuracy", attack)
    _check_data("robust_accuracy", logits_fn, x, y, batch_size)
    checks.non_negative("robust_accuracy", "epsilons", epsilons)
    # On the host if they can be, so that several processes can each place their part.
    host = np if checks.is_concrete(epsilons) else jnp
    # In short floats a radius would be rounded, perhaps up.
    epsilons = host.asarray(epsilons, jnp.promote_types(x.dtype, jnp.float32))
    if epsilons.ndim != 1 or not epsilons.size:
        raise ValueError(
            f"robust_accuracy: need a list of epsilons, got an array of shape {epsilons.shape}."
        )
    method = default_method(attack) if method is None else method
    checks.known("robust_accuracy", "method", method, METHODS)
    num_examples = x.shape[0]
    order = host.argsort(epsilons)
    key = parallel.place(random.as_typed(key), mesh)
    logits_fn = parallel.place(classifier.as_pytree(logits_fn), mesh)
    if method == "active":
        if not checks.is_concrete(x, y, epsilons, *jax.tree.leaves(logits_fn)):
            raise ValueError('robust_accuracy: method="active" works on the host, not under jit.')
        result = _survival_of_active(
            key, attack, logits_fn, x, y, epsilons[order], batch_size, mesh
        )
    else:
        index = np.arange(num_examples, dtype=np.int32)
        batches = _in_batches((x, y, index), num_examples, batch_size, mesh)
        result = _survival(
            key, attack, logits_fn, batches, parallel.place(epsilons[order], mesh),
            method=method, num_examples=num_examples, mesh=mesh,
        )  # fmt: skip
    return parallel.gather(result, mesh)[host.argsort(order)]


def robust_accuracy(
    key: Key,
    attack: Attack,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilons: ArrayLike,
    *,
    method: str | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Robust accuracy at every epsilon: the whole curve in one compiled program.

    The curve is the monotone one: an image found at epsilon lies in every larger ball, so it
    counts as broken there too, whether or not the attack finds it again.

    Methods, and what each assumes:

    - "map" attacks every image at every epsilon, one epsilon after the other. It assumes nothing.
    - "vmap" does the same side by side: the same curve, more memory, faster on accelerators.
    - "active" walks up the epsilons and attacks only the images that are still withstood, in
      batches of a few fixed sizes. It assumes nothing either and gives the curve of "map", up to
      the rounding of other batch sizes (l1 PGD on the digits: one image of 359 at one of 16
      epsilons). It is a loop on the host: not under `jit`.
    - "bisect" searches for each image's smallest epsilon: `ceil(log2(K + 1))` attacks for K
      epsilons, in one program. It assumes that an attack that fails at epsilon also fails at
      every smaller one. That holds nearly always for PGD and the like, but not for one-step
      attacks, which overshoot; where it does not hold, the curve is too high at some smaller
      epsilon.

    Args:
      key: a key. Example i is attacked with `fold_in(key, i)` at every epsilon, whatever the
        method, the batches and the devices.
      attack: `attack(key, logits_fn, x, y, epsilon) -> x_adv`. Configure it with
        `functools.partial` and keep that one object: another partial is another program. An
        attack of your own gets one key a batch, or one an example if it promises to take them
        (`advjax.traits.declare`). For "bisect" it must accept one epsilon an image, f32[b]. Not a
        targeted one: `y` are the true labels, so its successes would count as robust.
      logits_fn: classifier, images to logits f32[b, k]; best what `advjax.bind` returns, since
        its weights are then arguments of the program.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      epsilons: radii, [K], in any order; 0 gives the clean accuracy.
      method: one of the above; `default_method` chooses if None.
      batch_size: images at a time, which bounds memory; all by default.
      mesh: devices to split each batch over (`advjax.parallel.make_mesh`).

    Returns:
      f32[K], between 0 and 1.

    Static: attack, method, batch_size, mesh.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon,
        an unknown method, a targeted attack, a minimum-norm attack (see `minimal_curve`).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from advjax import attacks
      >>> x, y = jnp.array([0.45, 0.8]).reshape(2, 1, 1, 1), jnp.array([0, 1])
      >>> logits_fn = lambda x: (x[:, 0, 0] - 0.5) * jnp.array([-1.0, 1.0])
      >>> robust_accuracy(jax.random.key(0), attacks.fgsm, logits_fn, x, y, [0.0, 0.1, 0.4])
      Array([1. , 0.5, 0. ], dtype=float32)
    """
    return _share(
        survival(
            key, attack, logits_fn, x, y, epsilons,
            method=method, batch_size=batch_size, mesh=mesh,
        )
    )  # fmt: skip


def worst_case(
    key: Key,
    attacks: Sequence[Attack],
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    method: str | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Share of images that withstand every one of the attacks.

    Args:
      key: a key; every attack gets it, so that one attack alone gives its `robust_accuracy`.
      attacks: attacks of one and the same ball, at least one.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      epsilon: radius, or radii [K].
      method: see `robust_accuracy`.
      batch_size: images at a time; all by default.
      mesh: devices to split each batch over.

    Returns:
      f32[], or f32[K] for K radii.

    Static: attacks, method, batch_size, mesh.

    Raises:
      ValueError: no attack, or what `robust_accuracy` raises.
    """
    if not attacks:
        raise ValueError("worst_case: need at least one attack, got none.")
    for attack in attacks:
        checks.fixed_budget("worst_case", attack)
    _check_data("worst_case", logits_fn, x, y, batch_size)
    epsilons = jnp.atleast_1d(jnp.asarray(epsilon, jnp.promote_types(x.dtype, jnp.float32)))
    withstood = [
        survival(
            key, attack, logits_fn, x, y, epsilons,
            method=method, batch_size=batch_size, mesh=mesh,
        )
        for attack in attacks
    ]  # fmt: skip
    share = _share(jnp.all(jnp.stack(withstood), axis=0))
    return share[0] if jnp.ndim(epsilon) == 0 else share


def minimal_curve(
    result: MinNorm, epsilons: ArrayLike, *, is_correct: Array | None = None
) -> Array:
    """The robustness curve of a minimum-norm attack, read off its distances.

    Args:
      result: distances and success, [n]; an image that the classifier gets wrong by itself has
        distance 0, unless the attack asks for confidence.
      epsilons: radii, [K].
      is_correct: which clean images the classifier answers correctly, bool[n]. The others count as
        broken at every radius. Needed where an attack may not find such an image at distance 0:
        with a confidence above 0, which asks for more than a wrong answer, and where logits are
        not finite.

    Returns:
      f32[K]: share of images with no adversarial image within each radius.

    Raises:
      ValueError: a negative or NaN epsilon.
    """
    checks.non_negative("minimal_curve", "epsilons", epsilons)
    epsilons = jnp.atleast_1d(jnp.asarray(epsilons))
    broken = result.success & (result.distance <= epsilons[:, None])
    if is_correct is not None:
        broken = broken | ~jnp.asarray(is_correct)
    return 1 - _share(broken)


# -------------------------------------------------------------------------- the physical world


def destruction_rate(
    clean_correct: Array, adversarial_correct: Array, transformed_correct: Array
) -> Array:
    """Share of adversarial images that a transformation makes harmless.

    `d = sum_k C(x_k) (1 - C(x_adv_k)) C(T(x_adv_k)) / sum_k C(x_k) (1 - C(x_adv_k))`, where C says
    whether the classifier answers the label: of the images that it gets right clean and wrong
    attacked, the share that it gets right again after the transformation T of the attacked image.
    As published, it does not ask what T does to the clean image.

    Args:
      clean_correct: whether the answer to each clean image is right, bool[n].
      adversarial_correct: the same for its adversarial image, bool[n].
      transformed_correct: the same for the transformed adversarial image, bool[n], or
        bool[..., n] for several transformations.

    Returns:
      f32[], or f32[...]; NaN where no image is adversarial. Logits that are not finite answer no
      label (`metrics.is_correct`), so they do not destroy.

    Raises:
      ValueError: arrays that are not bool, or of other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> clean, adversarial = jnp.array([1, 1, 1, 0], bool), jnp.array([0, 0, 1, 0], bool)
      >>> float(destruction_rate(clean, adversarial, jnp.array([1, 0, 1, 1], bool)))
      0.5

    Source: A. Kurakin, I. Goodfellow, S. Bengio, "Adversarial Examples in the Physical World",
    ICLR 2017 workshop, equation 1.
    """
    given = (clean_correct, adversarial_correct, transformed_correct)
    shapes = [jnp.shape(array) for array in given]
    kinds = [str(jnp.result_type(array)) for array in given]
    if set(kinds) != {"bool"}:
        raise ValueError(f"destruction_rate: need arrays of bool, got {', '.join(kinds)}.")
    if len(shapes[0]) != 1 or shapes[1] != shapes[0] or shapes[2][-1:] != shapes[0]:
        raise ValueError(
            "destruction_rate: need one entry an image, [n], [n] and [..., n], got shapes "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}."
        )
    is_adversarial = jnp.logical_and(clean_correct, jnp.logical_not(adversarial_correct))
    destroyed = jnp.sum(is_adversarial & transformed_correct, axis=-1, dtype=jnp.int32)
    return destroyed / jnp.sum(is_adversarial, dtype=jnp.int32)
