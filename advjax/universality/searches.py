"""Architecture search for robust networks: a controller proposes children, FGSM judges them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from advjax import attacks, evaluation, training
from advjax.core import checks, classifier, random
from advjax.core.typing import Array, Attack, Key, TrainingLoss
from advjax.data import Dataset
from advjax.universality import cells, populations

CONTROLLERS = ("evolution", "reinforce", "random")
_MEMORY, _TOURNAMENT = 64, 8  # of the evolution
_CONTROLLER_RATE, _BASELINE_DECAY = 4.0, 0.7  # of REINFORCE


class Search(NamedTuple):
    """The children in the order in which they were tried.

    Attributes:
      choices: int32[n, 9], see `cells.CHOICES`.
      adversarial_accuracy: the reward, f32[n].
      clean_accuracy: on the same validation images, f32[n].
      num_parameters: int64[n].
    """

    choices: np.ndarray
    adversarial_accuracy: np.ndarray
    clean_accuracy: np.ndarray
    num_parameters: np.ndarray

    @property
    def best(self) -> int:
        """The child of the largest reward."""
        return int(np.argmax(self.adversarial_accuracy))


_ADAM = optax.adam(3e-3)


def architecture_search(
    key: Key,
    dataset: Dataset,
    validation: Dataset,
    *,
    epsilon: ArrayLike,
    loss_fn: TrainingLoss = training.cross_entropy,
    attack: Attack = attacks.fgsm,
    controller: str = "evolution",
    num_rounds: int = 10,
    num_children: int = 32,
    optimizer: optax.GradientTransformation = _ADAM,
    num_epochs: int = 5,
    batch_size: int = 64,
    method: str = "map",
    history: Search | None = None,
) -> Search:
    """Searches cells whose networks withstand an attack on validation images.

    The children of a round train in one program. "evolution": of the last 64 children eight are
    drawn, and the best of them is changed in one choice. "reinforce": every choice has a softmax of
    its own, moved by the score function times the reward above its moving average. "random" draws
    all alike. What is proposed depends on the key, the round and what was found before.

    Args:
      key: a key.
      dataset: training images and labels.
      validation: images and labels for the reward.
      epsilon: of the attack that gives the reward.
      loss_fn: `(key, logits_fn, x, y) -> f32[b]`; step l.l. training is the paper's Experiment 1,
        PGD training its Experiment 2.
      attack: that gives the reward, FGSM.
      controller: "evolution", "reinforce" or "random".
      num_rounds: in all, those of the history included.
      num_children: a round.
      optimizer: an optax optimiser; Adam at 3e-3 by default.
      num_epochs: passes over the data.
      batch_size: images a step.
      method: "map" trains the children of a round one after the other, "vmap" side by side.
      history: what earlier rounds found; the search goes on from there.

    Returns:
      A `Search` of num_rounds * num_children children.

    Static: loss_fn, attack, optimizer, num_epochs, batch_size, method.

    Raises:
      ValueError: a count below 1, an unknown controller or method, data sets that do not fit each
        other, a history of another number of children.

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017. Theirs is a recurrent controller and a larger space of cells; the evolution is
    E. Real, A. Aggarwal, Y. Huang, Q. Le, "Regularized Evolution for Image Classifier Architecture
    Search", AAAI 2019.
    """
    for name, value in (
        ("num_rounds", num_rounds), ("num_children", num_children), ("num_epochs", num_epochs),
        ("batch_size", batch_size),
    ):  # fmt: skip
        checks.at_least("architecture_search", name, value, 1)
    checks.known("architecture_search", "controller", controller, CONTROLLERS)
    checks.known("architecture_search", "method", method, ("vmap", "map"))
    checks.non_negative("architecture_search", "epsilon", epsilon)
    if dataset.image_shape != validation.image_shape or not len(dataset) or not len(validation):
        raise ValueError(
            "architecture_search: need training and validation images of one shape, at least one "
            f"of each, got {dataset} and {validation}."
        )
    if history is None:
        empty = np.zeros(0, np.float32)
        history = Search(np.zeros((0, len(cells.SIZES)), np.int32), empty, empty, empty.astype(int))
    if len(history.choices) % num_children:
        raise ValueError(
            f"architecture_search: need a history of whole rounds of {num_children} children, got "
            f"{len(history.choices)} children."
        )
    key = random.as_typed(key)
    module = cells.ChildNetwork(dataset.num_classes)
    for number in range(len(history.choices) // num_children, num_rounds):
        key_propose, key_train, key_attack = jax.random.split(jax.random.fold_in(key, number), 3)
        choices = _propose(key_propose, controller, history, num_children)
        variables = populations.train_group(
            jax.random.split(key_train, num_children), {"choices": choices},
            jnp.asarray(dataset.images), jnp.asarray(dataset.labels), module=module,
            loss_fn=loss_fn, optimizer=optimizer, num_epochs=num_epochs,
            batch_size=min(batch_size, len(dataset)), method=method,
        )  # fmt: skip
        clean, withstood = _accuracies(
            key_attack, attack, classifier.bind(module, variables), validation.float_images(),
            validation.labels, epsilon, method=method,
        )  # fmt: skip
        number_of = cells.num_parameters(choices, dataset.image_shape, dataset.num_classes)
        found = Search(choices, np.asarray(withstood), np.asarray(clean), number_of)
        history = Search(*map(np.concatenate, zip(history, found, strict=True)))
    return history


@functools.partial(jax.jit, static_argnames=("attack", "method"))
def _accuracies(key, attack, logits_fns, x, y, epsilon, *, method):
    def of_one(logits_fn):
        clean = evaluation.accuracy(logits_fn, x, y)
        epsilons = jnp.asarray(epsilon, x.dtype)[None]
        return clean, evaluation.robust_accuracy(key, attack, logits_fn, x, y, epsilons)[0]

    return jax.vmap(of_one)(logits_fns) if method == "vmap" else jax.lax.map(of_one, logits_fns)


def _propose(key: Key, controller: str, history: Search, num_children: int) -> np.ndarray:
    """The choices of the next round, int32[num_children, 9]."""
    keys = jax.random.split(key, num_children)
    if controller == "evolution" and len(history.choices):
        choices = jnp.asarray(history.choices[-_MEMORY:])
        rewards = jnp.asarray(history.adversarial_accuracy[-_MEMORY:])
        return np.asarray(jax.vmap(lambda k: _mutated(k, choices, rewards))(keys))
    policy = np.zeros((len(cells.SIZES), max(cells.SIZES)))
    if controller == "reinforce":
        policy = _policy(history, num_children)
    policy = jnp.where(_IS_CHOICE, policy, -jnp.inf)
    return np.asarray(jax.vmap(lambda k: jax.random.categorical(k, policy))(keys), np.int32)


_IS_CHOICE = np.arange(max(cells.SIZES)) < np.array(cells.SIZES)[:, None]


def _mutated(key: Key, choices: Array, rewards: Array) -> Array:
    """The best of a few, with one choice changed to another of its values."""
    key_tournament, key_place, key_value = jax.random.split(key, 3)
    rows = jax.random.randint(key_tournament, (_TOURNAMENT,), 0, len(choices))
    parent = choices[rows[jnp.argmax(rewards[rows])]]
    place = jax.random.randint(key_place, (), 0, parent.size)
    size = jnp.array(cells.SIZES)[place]
    shift = jax.random.randint(key_value, (), 1, size)
    return parent.at[place].set((parent[place] + shift) % size)


def _policy(history: Search, num_children: int) -> np.ndarray:
    """Logits of the choices after all rounds of the history, f64[9, most values]."""
    policy = np.zeros(_IS_CHOICE.shape)
    baseline = None
    for first in range(0, len(history.choices), num_children):
        rows = slice(first, first + num_children)
        rewards = history.adversarial_accuracy[rows]
        baseline = np.mean(rewards) if baseline is None else baseline
        probabilities = np.where(_IS_CHOICE, np.exp(policy), 0)
        probabilities /= probabilities.sum(1, keepdims=True)
        is_chosen = history.choices[rows][..., None] == np.arange(_IS_CHOICE.shape[1])
        score = is_chosen - probabilities  # the gradient of the log-probability
        policy = policy + _CONTROLLER_RATE * np.mean(
            (rewards - baseline)[:, None, None] * score, axis=0
        )
        baseline = _BASELINE_DECAY * baseline + (1 - _BASELINE_DECAY) * np.mean(rewards)
    return policy


class Correlations(NamedTuple):
    """How the adversarial accuracy of children goes with other things, Pearson and by rank.

    Attributes:
      with_clean: with the clean accuracy, Pearson's r.
      with_clean_by_rank: Spearman's.
      with_parameters: with the number of parameters, Pearson's r.
      with_parameters_by_rank: Spearman's.
    """

    with_clean: float
    with_clean_by_rank: float
    with_parameters: float
    with_parameters_by_rank: float


def correlations(search: Search) -> Correlations:
    """Correlations over the children of a search.

    Args:
      search: what `architecture_search` returned; its distribution is that of the controller, so
        only "random" gives those of the space.

    Returns:
      `Correlations`, NaN of a single child.
    """
    from scipy import stats  # slow to import

    if len(search.adversarial_accuracy) < 2:
        return Correlations(*[float("nan")] * len(Correlations._fields))
    values = []
    for other in (search.clean_accuracy, search.num_parameters):
        for correlation in (stats.pearsonr, stats.spearmanr):
            values.append(float(correlation(search.adversarial_accuracy, other).statistic))
    return Correlations(*values)
