"""FMPA, the flexible model poisoning attack: denial of service (I-FMPA) and control (F-FMPA).

Both look for a model near the one that the server would have without the attack, and then for the
updates that lead the server there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from advjax.core import checks, metrics
from advjax.core.typing import Array, Key
from advjax.poisoning import knowledge, prediction
from advjax.poisoning.attackers import Context, Poisoning

REFERENCES = ("predictive", "alternative", "historical")
BOOSTS = ("known", "searched", "corrected")
_BISECTIONS = 8


class Search(NamedTuple):
    """How the malicious clients look for a worse model on their own data.

    The paper leaves all of this open; docs/fmpa.md has the sweep behind the defaults. Plain
    gradient descent with a small rate matters: it moves little for the harm that it does, so the
    found model lies inside the certified ball, where Krum and Bulyan take it.

    Attributes:
      weight: lambda, of the distance to the reference model in the loss.
      optimizer: descends the loss.
      num_steps: at most so many steps.
      batch_size: images a step, drawn from the malicious clients' training part.
      check_every: steps between looks at the accuracy on their validation part.
      num_validation: images that such a look takes.
      validation_share: part of each client's data that is kept for it.
    """

    weight: ArrayLike = 0.0
    optimizer: optax.GradientTransformation = optax.sgd(0.1)
    num_steps: int = 40
    batch_size: int = 64
    check_every: int = 4
    num_validation: int = 200
    validation_share: float = 0.2


class Memory(NamedTuple):
    """What the attackers remember.

    Attributes:
      key: draws their validation images, the same in every round.
      history: the global models that they saw.
      boost: what the search of F-FMPA's rho has multiplied it by, f32[].
    """

    key: Key
    history: prediction.Smoothed
    boost: Array


def hinge(logits: Array, labels: Array) -> jax.Array:
    """`max(0, P_y - max_{j != y} P_j)` with the softmax probabilities P, f32[b]; 0 once fooled.

    Args:
      logits: f32[b, k].
      labels: int32[b].
    """
    probabilities = jax.nn.softmax(logits)
    own = jnp.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]
    is_own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.maximum(own - jnp.max(jnp.where(is_own, 0, probabilities), axis=-1), 0)


def _check(
    caller: str, reference: str, alpha: ArrayLike, warmup: int, search: Search, observe: str
) -> None:
    checks.known(caller, "reference model", reference, REFERENCES)
    checks.known(caller, "observation", observe, ("all", "sampled"))
    _check_share(caller, "alpha", alpha)
    _check_share(caller, "validation_share", search.validation_share)
    checks.non_negative(caller, "weight", search.weight)
    checks.at_least(caller, "warmup", warmup, 1)
    for name in ("num_steps", "batch_size", "check_every", "num_validation"):
        checks.at_least(caller, name, getattr(search, name), 1)


def _check_share(caller: str, name: str, value: ArrayLike) -> None:
    # In float32, as it is used: what rounds to 1 there is 1.
    if checks.is_concrete(value) and not 0 < np.asarray(value, np.float32) < 1:
        raise ValueError(f"{caller}: need 0 < {name} < 1, got {name}={value}.")


def _check_clients(caller: str, is_byzantine: np.ndarray, counts: np.ndarray) -> None:
    """Refuses a simulation in which nobody attacks, or there is nothing to set aside."""
    if not np.any(is_byzantine):
        raise ValueError(
            f"{caller}: need at least one malicious client, got none of {len(is_byzantine)}."
        )
    most = np.max(counts[is_byzantine])
    if most < 2:
        raise ValueError(
            f"{caller}: need a malicious client with at least 2 images, one to train on and one to "
            f"validate on, got at most {most}."
        )


def num_training(counts: Array, share: ArrayLike) -> Array:
    """How many of its images each client trains on, int32[n]; the others are set aside.

    Args:
      counts: how many it has, int32[n].
      share: of them that are set aside, in (0, 1).
    """
    kept = jnp.ceil(counts * (1 - share)).astype(jnp.int32)
    # However small the share, one of two images is set aside, but not the only one.
    return jnp.clip(kept, jnp.minimum(counts, 1), jnp.maximum(counts - 1, 1))


def _training_images(
    key: Key, context: Context, is_byzantine: Array, search: Search
) -> tuple[Array, Array]:
    """A batch of the malicious clients' training part."""
    counts = jnp.where(is_byzantine, context.counts, 0)
    size = num_training(counts, search.validation_share)
    key_client, key_position = jax.random.split(key)
    logits, shape = jnp.log(size.astype(jnp.float32)), (search.batch_size,)
    client = jax.random.categorical(key_client, logits, shape=shape)
    draws = jax.random.uniform(key_position, shape)
    position = jnp.floor(draws * size[client]).astype(jnp.int32)
    return context.examples(client, position)


def _validation_images(
    key: Key, context: Context, is_byzantine: Array, search: Search
) -> tuple[Array, Array]:
    """Images of their validation part: none of them twice before each is there once.

    Where all of the clients have one image, these serve for both.
    """
    counts = jnp.where(is_byzantine, context.counts, 0)
    kept = num_training(counts, search.validation_share)
    first = jnp.where(jnp.any(counts > kept), kept, 0)
    end = jnp.cumsum(counts - first)
    # An even comb over all of them; float32 may round its last tooth up, beyond the last image.
    number = search.num_validation
    share = (jnp.arange(number) + jax.random.uniform(key)) / number
    place = jnp.minimum(jnp.floor(share * end[-1]).astype(jnp.int32), end[-1] - 1)
    client = jnp.searchsorted(end, place, side="right")
    return context.examples(client, counts[client] - (end[client] - place))


def _descend(
    key: Key,
    key_validation: Key,
    context: Context,
    is_byzantine: Array,
    reference: Array,
    target_accuracy: ArrayLike | None,
    search: Search,
) -> tuple[Array, Array, Callable[[Array], Array], Array]:
    """From the reference model down to the wanted accuracy (algorithm 1, lines 11 to 19).

    Returns:
      The model before the last look and the one at it, f32[d] each, which are equal where the
      reference model is bad enough already; the accuracy of a model on the validation part; and
      the wanted accuracy.
    """
    x, y = _validation_images(key_validation, context, is_byzantine, search)

    def accuracy(params):
        return jnp.mean(metrics.is_correct(context.logits_fn(params, x), y))

    if target_accuracy is None:
        target_accuracy = 1 / jax.eval_shape(context.logits_fn, reference, x).shape[-1]

    is_held = not (checks.is_concrete(search.weight) and np.asarray(search.weight) == 0)

    def loss(params, x, y):
        harm = jnp.mean(hinge(context.logits_fn(params, x), y))
        if not is_held:
            return harm
        # safe_norm: the gradient of the norm at 0 is NaN, and the search starts there.
        return harm + search.weight * optax.safe_norm(params - reference, 1e-12)

    def step(number, carry):
        params, opt_state = carry
        batch = _training_images(jax.random.fold_in(key, number), context, is_byzantine, search)
        changes, opt_state = search.optimizer.update(
            jax.grad(loss)(params, *batch), opt_state, params
        )
        return optax.apply_updates(params, changes), opt_state

    is_attacked = jnp.any(is_byzantine)  # without malicious clients there are no data either

    def is_open(carry):
        return is_attacked & (carry[0] < search.num_steps) & (carry[4] > target_accuracy)

    def go_on(carry):
        number, _, params, opt_state, _ = carry
        stop = jnp.minimum(number + search.check_every, search.num_steps)
        new, opt_state = jax.lax.fori_loop(number, stop, step, (params, opt_state))
        return stop, params, new, opt_state, accuracy(new)

    start = jnp.zeros((), jnp.int32), reference, reference, search.optimizer.init(reference)
    _, before, after, _, _ = jax.lax.while_loop(is_open, go_on, (*start, accuracy(reference)))
    return before, after, accuracy, jnp.asarray(target_accuracy)


def _see(
    memory: Memory, context: Context, is_byzantine: Array, alpha: ArrayLike, warmup: int,
    observe: str,
) -> Memory:  # fmt: skip
    """The memory with the model that the server sent, if the attackers got it."""
    seen = prediction.see(memory.history, context.params, alpha=alpha, warmup=warmup)
    got_it = jnp.any(is_byzantine) | (observe == "all")
    history = jax.tree.map(lambda new, old: jnp.where(got_it, new, old), seen, memory.history)
    return memory._replace(history=history)


def _reference_model(
    reference: str, memory: Memory, context: Context, own: Array, alpha: ArrayLike
) -> Array:
    """The model that the search starts from and is held near."""
    if reference == "predictive":
        return prediction.predict(memory.history, alpha=alpha)
    if reference == "alternative":
        return context.params + context.server_rate * own
    return context.params


def certified_projection(crafted: Array, centre: Array, updates: Array, counts: Array) -> jax.Array:
    """The crafted update on the ball round the centre that holds the honest updates, f32[d].

    `R = max_i ||x_i - centre||`, and the point moves to `centre + min(1, R / r) (x - centre)`.

    Args:
      crafted: f32[d].
      centre: f32[d].
      updates: honest updates, f32[n, d].
      counts: which of them count, bool[n].
    """
    squares = jnp.sum((updates - centre) ** 2, axis=1)
    radius = jnp.sqrt(jnp.max(jnp.where(counts, squares, 0)))
    change = crafted - centre
    length = jnp.linalg.norm(change)
    scale = jnp.where(length > radius, radius / jnp.where(length > 0, length, 1), 1)
    return jnp.asarray(centre + scale * change)


def i_fmpa(
    *,
    reference: str = "predictive",
    alpha: ArrayLike = 0.5,
    warmup: int = 1,
    observe: str = "all",
    search: Search = Search(),  # noqa: B008 it is immutable
) -> Poisoning:
    """I-FMPA: makes the global model useless with updates that look like honest ones.

    Each round the attackers predict the next global model from those that they saw, descend from
    there the loss `lambda ||delta|| + mean hinge` on their own data until the accuracy on a part of
    it is 1 / L, and send the update that leads to that model, projected on the ball round the
    predicted update that holds their own honest ones.

    Knowledge: the global models and the malicious clients' own data and updates; no honest client's
    update. This is what the paper assumes.

    Where the paper is open: on receiving g the smoothing is brought up to date and then predicts;
    the accuracy is looked at before the first step and then every few; the predicted update is
    `(predicted model - g) / server_rate`.

    Each malicious client sets `validation_share` of its images aside for that look, at least one
    image of two. In a round whose malicious clients have one image each, these serve for both. In a
    round without malicious clients nothing happens but that the global model is seen, if it is.

    Args:
      reference: "predictive" as above, "alternative", the mean of the attackers' own models, or
        "historical", the present global model.
      alpha: of the smoothing, in (0, 1).
      warmup: see `prediction.see`.
      observe: under sampling of clients, whether the attackers get "all" global models or, with
        "sampled", only those of rounds in which one of them is drawn.
      search: how a worse model is looked for.

    Returns:
      A `Poisoning` with state `Memory`.

    Static: reference, warmup, observe, and all of search but weight.

    Raises:
      ValueError: an alpha or validation share outside (0, 1), unknown words, counts below 1; in
        `check`, which `federated.simulate` calls, no malicious client, or none with two images; in
        `craft`, updates that are not floats [n, d], a mask that is not bool[n], or, where they can
        be looked at, malicious clients of which none has two images.

    Source: H. Zhang, Z. Yao, L. Y. Zhang, S. Hu, C. Chen, A. Liew, Z. Li, "Denial-of-Service or
    Fine-Grained Control: Towards Flexible Model Poisoning Attacks on Federated Learning", IJCAI
    2023, algorithm 1.
    """
    _check("i_fmpa", reference, alpha, warmup, search, observe)

    def craft(key, updates, is_byzantine, context, memory):
        view = _look("i_fmpa", updates, is_byzantine, context)
        memory = _see(memory, context, is_byzantine, alpha, warmup, observe)
        own = knowledge.mean(view.rows, view.is_known)
        start = _reference_model(reference, memory, context, own, alpha)
        _, found, _, _ = _descend(key, memory.key, context, is_byzantine, start, None, search)
        centre = (start - context.params) / context.server_rate
        crafted = (found - context.params) / context.server_rate
        crafted = certified_projection(crafted, centre, view.rows, view.is_known)
        return knowledge.replace(view, crafted), memory

    return Poisoning(_remember, craft, functools.partial(_check_clients, "i_fmpa"))


def _look(caller: str, updates: Array, is_byzantine: Array, context: Context) -> knowledge.View:
    view = knowledge.look(caller, updates, is_byzantine, None)
    if checks.is_concrete(is_byzantine, context.counts):
        mask = np.asarray(is_byzantine)
        if np.any(mask):
            _check_clients(caller, mask, np.asarray(context.counts))
    return view


def _remember(key: Key, params: Array) -> Memory:
    return Memory(key, prediction.start(params), jnp.ones((), jnp.float32))


def control_update(own: Array, target: Array, predicted: Array, boost: ArrayLike) -> jax.Array:
    """The update that moves the mean of all by what is wanted, `own + rho (target - predicted)`.

    With `rho = n / (server_rate m)` for m of n clients, and the mean as rule, the server lands on
    the target if the prediction is right. The sign is that of updates `w_i - g`; the paper's
    equation 8 has the other, which leads to the mirror image of the target.

    Args:
      own: the mean of the attackers' honest updates, f32[d].
      target: the model that they want, f32[d].
      predicted: the model that there would be without them, f32[d].
      boost: rho.

    Source: Zhang et al., IJCAI 2023, equation 8.
    """
    return jnp.asarray(own + boost * (target - predicted))


def f_fmpa(
    *,
    target_accuracy: ArrayLike | Callable[[Array], ArrayLike],
    boost: str = "known",
    boost_step: float = 0.1,
    reference: str = "predictive",
    alpha: ArrayLike = 0.5,
    warmup: int = 1,
    observe: str = "all",
    search: Search = Search(check_every=1),  # noqa: B008 it is immutable
) -> Poisoning:
    """F-FMPA: brings the accuracy of the global model down to a wanted one, and no further.

    As `i_fmpa`, but the descent ends at the wanted accuracy (the last stretch by bisection, so that
    it is met as nearly as the validation part can tell), and the update is `control_update`, which
    is not projected. Where the predicted model is no better than wanted, the attackers send the
    mean of their honest updates.

    The prediction follows the path that the attack itself bends, so that with `reference=
    "predictive"`, the paper's, the honest clients undo in each round what it does not see. With
    "alternative" the attackers' own honest updates tell that, and the level is held; docs/fmpa.md
    has the numbers.

    Knowledge: the global models, the malicious clients' own data and updates, and with
    `boost="known"` the numbers of clients and of malicious ones in the round and the server's rate.

    Args:
      target_accuracy: in (0, 1), or a function of the round to it.
      boost: rho: "known" `n / (server_rate m)`; "searched": from 1 it grows by `boost_step` a round
        while the global model is better than wanted and shrinks while it is not; "corrected": the
        same, from the known one.
      boost_step: a share, in [0, 1).
      reference: as in `i_fmpa`.
      alpha: as in `i_fmpa`.
      warmup: as in `i_fmpa`.
      observe: as in `i_fmpa`.
      search: as in `i_fmpa`.

    Returns:
      A `Poisoning` with state `Memory`.

    Static: boost, reference, warmup, observe, and all of search but weight.

    Raises:
      ValueError: an alpha, validation share or target accuracy outside (0, 1), a boost_step outside
        [0, 1), unknown words, counts below 1; in `check` and `craft` as for `i_fmpa`.

    Source: Zhang et al., IJCAI 2023, algorithm 1 without lines 7 to 10 and 21, and equation 8.
    """
    _check("f_fmpa", reference, alpha, warmup, search, observe)
    checks.known("f_fmpa", "boost", boost, BOOSTS)
    checks.non_negative("f_fmpa", "boost_step", boost_step)
    if checks.is_concrete(boost_step) and not np.asarray(boost_step, np.float32) < 1:
        raise ValueError(f"f_fmpa: need 0 <= boost_step < 1, got boost_step={boost_step}.")
    if not callable(target_accuracy):
        _check_share("f_fmpa", "target_accuracy", target_accuracy)

    def craft(key, updates, is_byzantine, context, memory):
        view = _look("f_fmpa", updates, is_byzantine, context)
        memory = _see(memory, context, is_byzantine, alpha, warmup, observe)
        own = knowledge.mean(view.rows, view.is_known)
        predicted = _reference_model(reference, memory, context, own, alpha)
        wanted = target_accuracy(context.round) if callable(target_accuracy) else target_accuracy
        good, bad, accuracy, wanted = _descend(
            key, memory.key, context, is_byzantine, predicted, wanted, search
        )
        target = _between(good, bad, accuracy, wanted)
        known = len(updates) / (context.server_rate * jnp.maximum(jnp.sum(is_byzantine), 1))
        factor = known if boost == "known" else memory.boost
        if boost == "corrected":
            factor = known * factor
        if boost != "known":
            # Below the wanted accuracy by itself, as early in training, the model tells nothing.
            is_telling = jnp.any(is_byzantine) & (accuracy(predicted) > wanted)
            growth = jnp.where(accuracy(context.params) > wanted, 1 + boost_step, 1 - boost_step)
            growth = jnp.where(is_telling, growth, 1)
            factor, memory = factor * growth, memory._replace(boost=memory.boost * growth)
        crafted = control_update(own, target, predicted, factor)
        return knowledge.replace(view, crafted), memory

    return Poisoning(_remember, craft, functools.partial(_check_clients, "f_fmpa"))


def _between(good: Array, bad: Array, accuracy: Callable[[Array], Array], wanted: Array) -> Array:
    """The model on the way from a good to a bad one where the accuracy falls to the wanted one."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        is_bad = accuracy(good + middle * (bad - good)) <= wanted
        return jnp.where(is_bad, low, middle), jnp.where(is_bad, middle, high)

    bounds = (jnp.zeros(()), jnp.ones(()))
    _, share = jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)
    return jnp.asarray(good + share * (bad - good))


__all__ = [
    "BOOSTS", "REFERENCES", "Memory", "Search", "certified_projection", "control_update", "f_fmpa",
    "hinge", "i_fmpa", "num_training",
]  # fmt: skip
