"""AutoAttack: a cascade of attacks, each of which only sees what the ones before left correct."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from advjax.attacks import masking
from advjax.attacks.adaptive_boundary import fab
from advjax.attacks.ascent import per_example_mask
from advjax.attacks.auto_pgd import apgd, apgd_targeted
from advjax.attacks.squares import square
from advjax.core import (
    balls,
    checks,
    classifier,
    compaction,
    losses,
    metrics,
    parallel,
    random,
    traits,
)
from advjax.core.balls import Ball
from advjax.core.typing import Array, Attack, Key, LogitsFn

VERSIONS = ("standard", "plus", "rand")


class Cascade(NamedTuple):
    """What a cascade of attacks did.

    Attributes:
      x_adv: images, like `x`; the clean one where every attack failed.
      is_robust: which images the classifier still answers correctly, bool[b].
      broken_by: which attack broke each image, int32[b]: -1 for an image that was wrong by itself,
        the number of attacks where none did.
    """

    x_adv: Array
    is_robust: Array
    broken_by: Array


class _Towards(NamedTuple):
    """An attack in parts: the same program for one target after the other."""

    attack: Any
    num_targets: int


@traits.declare(example_keys=True)
def fab_within(
    key: Key, logits_fn: LogitsFn, x: Array, y: Array, epsilon: ArrayLike, **options: Any
) -> Array:
    """FAB as an attack of a fixed budget: its images where they lie within epsilon, else `x`.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius; scalar or [b]. Random starts are within it.
      **options: of `fab`.
    """
    x, y = checks.attack_inputs("fab_within", logits_fn, x, y, epsilon)
    ball = options.get("ball", balls.linf)
    radius = jnp.broadcast_to(jnp.asarray(epsilon, jnp.float32), x.shape[:1])
    found = fab(key, logits_fn, x, y, restart_radius=radius, **options)
    # Exactly inside, as `project` measures; what that moves is judged again by the cascade.
    inside = ball.project(found.x_adv, x, epsilon)
    is_near = found.success & (found.distance <= radius * (1 + 1e-6))
    return jnp.where(per_example_mask(is_near, x), inside, x)


@functools.cache
def auto_attack_parts(
    version: str, ball: Ball, num_steps: int, num_queries: int, num_classes: int
) -> Mapping[str, Any]:
    """The attacks of a version by name, in order.

    As published, "standard" starts APGD five times for l1 and takes five targets, where it takes
    one start and nine targets for the other norms.

    Args:
      version: "standard", "plus" or "rand".
      ball: the norm; l1 has no Square attack.
      num_steps: steps of APGD and FAB.
      num_queries: queries of Square.
      num_classes: k; the targeted DLR loss needs four, DLR three.
    """
    steps: dict[str, Any] = {"num_steps": num_steps, "ball": ball}
    targets = min(9, num_classes - 1)
    is_l1_standard = version == "standard" and ball is balls.l1
    repeats = 5 if version == "plus" or is_l1_standard else 1
    part = functools.partial
    found: dict[str, Any] = {"apgd_ce": part(apgd, num_restarts=repeats, **steps)}
    with_dlr = part(apgd, num_restarts=repeats, loss_fn=losses.dlr, **steps)
    if version == "rand":
        return {**found, "apgd_dlr": with_dlr} if num_classes >= 3 else found
    if version == "plus":
        if num_classes >= 3:
            found["apgd_dlr"] = with_dlr
        found["fab"] = part(fab_within, num_restarts=5, **steps)
    elif num_classes == 3:
        found["apgd_dlr"] = with_dlr  # in place of the targeted form
    square_attack = {"square": part(square, num_queries=num_queries, ball=ball)}
    square_attack = {} if ball is balls.l1 else square_attack
    targeted: dict[str, Any] = {}
    if num_classes >= 4:
        attack = part(apgd_targeted, num_targets=1, **steps)
        targeted["apgd_t"] = _Towards(attack, min(5, targets) if is_l1_standard else targets)
    targeted["fab_t"] = _Towards(part(fab_within, num_targets=1, **steps), targets)
    if version == "plus":
        return {**found, **square_attack, **targeted}
    return {**found, **targeted, **square_attack}


def _part(attack: Any, number: ArrayLike) -> Attack:
    """The attack towards the target of that rank; or the attack itself."""
    if isinstance(attack, _Towards):
        return functools.partial(attack.attack, first_target=number)
    return attack


def _num_parts(attack: Any) -> int:
    return attack.num_targets if isinstance(attack, _Towards) else 1


def _unmasked(logits_fn: LogitsFn, is_probability: ArrayLike) -> LogitsFn:
    """The logarithms of a classifier's outputs if they are probabilities, else the outputs."""

    def logits(x: Array) -> Array:
        outputs = logits_fn(x)
        tiny = jnp.finfo(outputs.dtype).tiny
        return jnp.where(is_probability, jnp.log(jnp.maximum(outputs, tiny)), outputs)

    return logits


def _attempt(attack, number, keys, logits_fn, target_fn, x, y, epsilon) -> tuple[Array, Array]:
    """Adversarial images, and which of them the classifier itself gets wrong."""
    if not traits.of(attack.attack if isinstance(attack, _Towards) else attack).example_keys:
        keys = keys[0]
    x_adv = _part(attack, number)(keys, logits_fn, x, y, epsilon)
    return x_adv, metrics.is_fooled(target_fn(x_adv), y)


@functools.partial(jax.jit, static_argnames=("attack", "mesh"))
def _compiled_attempt(attack, number, keys, logits_fn, is_probability, x, y, epsilon, *, mesh):
    unmasked = _unmasked(logits_fn, is_probability)
    result = _attempt(attack, number, keys, unmasked, logits_fn, x, y, epsilon)
    return parallel.place(result, mesh)  # whole on every device, so that every process can read it


@functools.partial(jax.jit, static_argnames="mesh")
def _compiled_logits(logits_fn, x, *, mesh):
    return parallel.place(logits_fn(x), mesh)


def cascade(
    key: Key,
    attacks: Mapping[str, Any],
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Any = None,
) -> Cascade:
    """Attacks one after the other; each only gets the images that are still answered correctly.

    Called with concrete arrays it works on the host: survivors go to compiled programs in batches
    of a few fixed sizes. Under `jit` and `vmap` every attack gets every image, which costs more and
    gives the same images; but for an attack without one key an example, see
    `evaluation.robust_accuracy`: it gets that of the first image of each batch of survivors.

    Args:
      key: a key, or one key an example [b].
      attacks: attacks of a fixed budget, by name, in order; none of them targeted, since `y` are
        the true labels.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius; scalar or [b].
      batch_size: images at a time; all by default. On the host only.
      mesh: devices to split each batch over. On the host only.
      progress: called with the name of each attack and the number of survivors; on the host only.

    Returns:
      A `Cascade`.

    Static: attacks, batch_size, mesh.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon,
        no attack, a targeted one, one without epsilon.
    """
    x, y = checks.attack_inputs("cascade", logits_fn, x, y, epsilon)
    if not attacks:
        raise ValueError("cascade: need at least one attack, got none.")
    for attack in attacks.values():
        checks.fixed_budget("cascade", attack.attack if isinstance(attack, _Towards) else attack)
    if batch_size is not None:
        checks.at_least("cascade", "batch_size", batch_size, 1)
    checks.four_axes("cascade", x)
    if x.shape[0] == 0:
        return Cascade(x, y == y, y.astype(jnp.int32))
    keys = random.example_keys(key, x.shape[0])
    logits_fn = classifier.as_pytree(logits_fn)
    leaves = jax.tree.leaves(logits_fn)
    if checks.is_concrete(keys, x, y, epsilon, *leaves):
        return _on_host(keys, attacks, logits_fn, x, y, epsilon, batch_size, mesh, progress)
    clean = logits_fn(x)
    unmasked = _unmasked(logits_fn, masking.looks_like_probabilities(clean))
    is_robust = metrics.is_correct(clean, y)
    state = Cascade(x, is_robust, jnp.where(is_robust, len(attacks), -1).astype(jnp.int32))
    for position, attack in enumerate(attacks.values()):
        attack_keys = jax.vmap(lambda k, p=position: jax.random.fold_in(k, p))(keys)

        def attempt(number, state, attack=attack, attack_keys=attack_keys, position=position):
            x_adv, is_fooled = _attempt(
                attack, number, attack_keys, unmasked, logits_fn, x, y, epsilon
            )
            wins = state.is_robust & is_fooled
            return Cascade(
                jnp.where(per_example_mask(wins, x), x_adv, state.x_adv),
                state.is_robust & ~wins,
                jnp.where(wins, position, state.broken_by),
            )

        state = jax.lax.fori_loop(0, _num_parts(attack), attempt, state)
    return state


def _on_host(keys, attacks, logits_fn, x, y, epsilon, batch_size, mesh, progress) -> Cascade:
    num_images = x.shape[0]
    sizes = compaction.sizes(num_images, batch_size, mesh)
    radius = np.broadcast_to(np.asarray(epsilon, np.float32), (num_images,))
    x_adv = np.array(x)
    arrays = x_adv.copy(), np.asarray(y), radius
    everything = np.arange(num_images)
    logits_fn = parallel.place(logits_fn, mesh)
    clean = compaction.over(
        lambda x, *_: _compiled_logits(logits_fn, x, mesh=mesh), arrays, everything, sizes, mesh
    )
    is_probability = bool(masking.looks_like_probabilities(clean))
    is_robust = np.array(metrics.is_correct(clean, y))
    broken_by = np.where(is_robust, len(attacks), -1).astype(np.int32)
    for position, (name, attack) in enumerate(attacks.items()):
        attack_keys = jax.vmap(lambda k, p=position: jax.random.fold_in(k, p))(keys)
        for number in range(_num_parts(attack)):
            rows = np.flatnonzero(is_robust)
            if progress is not None:
                progress(name, rows.size)
            found = compaction.over(
                lambda keys, x, y, radius, attack=attack, number=number: _compiled_attempt(
                    attack, number, keys, logits_fn, is_probability, x, y, radius, mesh=mesh
                ),
                (attack_keys, *arrays), rows, sizes, mesh,
            )  # fmt: skip
            if found is None:
                continue
            images, is_fooled = found
            x_adv[rows[is_fooled]] = images[is_fooled]
            is_robust[rows[is_fooled]] = False
            broken_by[rows[is_fooled]] = position
    return Cascade(jnp.asarray(x_adv), jnp.asarray(is_robust), jnp.asarray(broken_by))


def square_sentences(names: Sequence[str], num_broken: int, num_images: int) -> tuple[str, ...]:
    """A sentence if Square, as the last attack, broke more than one image of a hundred.

    Args:
      names: of the attacks, in order.
      num_broken: images that the last attack broke.
      num_images: all images.
    """
    if names[-1] != "square" or num_broken <= num_images // 100:
        return ()
    return (
        f"Square, which uses no gradient, broke {num_broken} of {num_images} images that all "
        "attacks by gradient left correct: the gradient is masked.",
    )


@traits.declare(example_keys=True, monotone=True)
def auto_attack(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    version: str = "standard",
    ball: Ball = balls.linf,
    num_steps: int = 100,
    num_queries: int = 5000,
    num_samples: int = 20,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """AutoAttack: APGD-CE, targeted APGD-DLR, targeted FAB and Square on what is still correct.

    Called with concrete arrays it compiles its attacks itself and gives them only the survivors
    (`cascade`), and it warns of masked gradients (`GradientMaskingWarning`): random classifiers,
    probabilities in place of logits, gradients that are zero, and images that only Square broke.
    Under `jit` it does neither.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k]; for "rand" an `advjax.Randomised`.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      version: "standard", for l1 with five restarts of APGD-CE and five targets of APGD, as
        published; "plus", with five restarts, untargeted DLR and FAB before the others;
        or "rand", APGD-CE and APGD-DLR on the mean over `num_samples` draws of the classifier.
      ball: `balls.linf`, `balls.l2` or `balls.l1` (which has no Square here; the published
        standard has).
      num_steps: steps of APGD and FAB, at least one.
      num_queries: queries of Square, at least two.
      num_samples: draws for "rand". They stay the same in all steps.
      batch_size: images at a time; all by default.
      mesh: devices to split each batch over.

    Returns:
      Adversarial images, like `x`; the clean one where every attack failed.

    Static: version, ball, num_steps, num_queries, num_samples, batch_size, mesh.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon,
        an unknown version, "rand" without an `advjax.Randomised`.

    Source: F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks", ICML 2020.
    """
    balls.check("auto_attack", ball)
    x, y = checks.attack_inputs("auto_attack", logits_fn, x, y, epsilon)
    checks.four_axes("auto_attack", x)
    checks.known("auto_attack", "version", version, VERSIONS)
    checks.at_least("auto_attack", "num_steps", num_steps, 1)
    if version != "rand" and ball is not balls.l1:  # those have Square
        checks.at_least("auto_attack", "num_queries", num_queries, 2)
    checks.at_least("auto_attack", "num_samples", num_samples, 1)
    if batch_size is not None:
        checks.at_least("auto_attack", "batch_size", batch_size, 1)
    if x.shape[0] == 0:
        return x
    num_classes = classifier.num_classes(logits_fn, x)
    attacks = auto_attack_parts(version, ball, num_steps, num_queries, num_classes)
    target_fn = logits_fn
    if version == "rand":
        if not isinstance(logits_fn, classifier.Randomised):
            raise ValueError(
                'auto_attack: version="rand" needs an advjax.Randomised classifier, got '
                f"{type(logits_fn).__name__}."
            )
        target_fn = logits_fn.mean_of(num_samples)
    is_concrete = checks.is_concrete(x, y, epsilon, key, *jax.tree.leaves(logits_fn))
    if is_concrete:
        try:
            signs = masking.masking_signs(target_fn, x, y)
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                "auto_attack: the classifier closes over traced values; bind them with "
                "jax.tree_util.Partial, or call auto_attack under jit."
            ) from error
        for sentence in signs.sentences():
            warnings.warn(sentence, masking.GradientMaskingWarning, stacklevel=2)
    result = cascade(key, attacks, target_fn, x, y, epsilon, batch_size=batch_size, mesh=mesh)
    if is_concrete:
        by_last = int(jnp.sum(result.broken_by == len(attacks) - 1))
        for sentence in square_sentences(tuple(attacks), by_last, len(x)):
            warnings.warn(sentence, masking.GradientMaskingWarning, stacklevel=2)
    return result.x_adv
