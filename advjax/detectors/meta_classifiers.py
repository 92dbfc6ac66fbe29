"""MNTD: a classifier of classifiers, by what they answer to a few queries."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from advjax.core import checks, classifier, random
from advjax.core.typing import Array, Key, LogitsFn
from advjax.data import Dataset
from advjax.detectors import inputs, shadows
from advjax.detectors.detections import Detection
from advjax.detectors.shadows import Shadows


class MetaClassifier(NamedTuple):
    """Trained meta-classifiers, one a repeat; a pytree.

    Attributes:
      queries: images that a model is asked about, f32[r, q, h, w, c]; any real numbers.
      weights: of the two dense layers on top of the model's logits, with a leading axis [r].
      auroc: on the shadow models that were held out, f32[r].
      num_images: clean images that the shadow models were trained on, int32[].
    """

    queries: Array
    weights: Any
    auroc: Array
    num_images: Array


class _Head(nn.Module):
    """What reads the logits of all queries: one hidden layer, one number."""

    hidden: int

    @nn.compact
    def __call__(self, logits: Array) -> Array:
        x = nn.relu(nn.Dense(self.hidden, name="dense1")(logits.reshape(-1)))
        return nn.Dense(1, name="dense2")(x)[0]


class _Meta(NamedTuple):
    """What is trained: the queries and the head's weights."""

    queries: Array
    weights: Any


def _score(meta: _Meta, logits_fn: LogitsFn) -> Array:
    hidden = meta.weights["dense1"]["bias"].shape[-1]
    return jnp.asarray(
        _Head(hidden).apply({"params": meta.weights}, jnp.asarray(logits_fn(meta.queries)))
    )


def _pairwise_auroc(scores: Array, is_infected: Array) -> Array:
    """The AUROC under jit; a tie is a half."""
    wins = (scores[:, None] > scores) + 0.5 * (scores[:, None] == scores)
    is_pair = is_infected[:, None] & ~is_infected
    return jnp.sum(wins * is_pair) / jnp.sum(is_pair)


class _Options(NamedTuple):
    """What is static."""

    query_tuning: bool
    num_queries: int
    hidden: int
    num_epochs: int
    meta_batch: int


def _train_one(key: Key, known: Shadows, held_out: Shadows, learning_rate, options: _Options):
    """One repeat: the meta-classifier of the epoch that was best on the shadows held out."""
    key_queries, key_weights, key_order = jax.random.split(key, 3)
    shape = (options.num_queries, *known.mean.shape)
    queries = known.mean + known.deviation * jax.random.normal(key_queries, shape)
    first = jax.tree.map(lambda leaf: leaf[0], known.logits_fns)
    logits = jnp.zeros(jax.eval_shape(first, queries).shape)
    meta = _Meta(queries, _Head(options.hidden).init(key_weights, logits)["params"])
    optimizer = optax.adam(learning_rate)
    num_models = len(known.is_infected)
    steps = num_models // options.meta_batch

    def loss(meta, models, is_infected):
        scores = jax.vmap(_score, (None, 0))(meta, models)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(scores, is_infected.astype(jnp.float32)))

    def step(carry, rows):
        meta, opt_state = carry
        models = jax.tree.map(lambda leaf: leaf[rows], known.logits_fns)
        gradient = jax.grad(loss)(meta, models, known.is_infected[rows])
        if not options.query_tuning:
            gradient = gradient._replace(queries=jnp.zeros_like(meta.queries))
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(meta, updates), opt_state), None

    def epoch(carry, number):
        meta, opt_state, best, best_auroc = carry
        order = jax.random.permutation(jax.random.fold_in(key_order, number), num_models)
        rows = order[: steps * options.meta_batch].reshape(steps, options.meta_batch)
        (meta, opt_state), _ = jax.lax.scan(step, (meta, opt_state), rows)
        scores = jax.lax.map(functools.partial(_score, meta), held_out.logits_fns)
        auroc = _pairwise_auroc(scores, held_out.is_infected)
        best = jax.tree.map(lambda new, old: jnp.where(auroc > best_auroc, new, old), meta, best)
        return (meta, opt_state, best, jnp.maximum(auroc, best_auroc)), None

    start = (meta, optimizer.init(meta), meta, jnp.asarray(-1.0))
    (_, _, best, auroc), _ = jax.lax.scan(epoch, start, jnp.arange(options.num_epochs))
    return best, auroc


@functools.partial(jax.jit, static_argnames="options")
def _train_all(keys, known, held_out, learning_rate, *, options):
    return jax.lax.map(lambda key: _train_one(key, known, held_out, learning_rate, options), keys)


def _check_meta(
    num_shadows: int,
    *,
    num_validation: int | None = None,
    meta_batch: int = 1,
    learning_rate: ArrayLike = 1e-3,
    **counts: int,
) -> int:
    """Refuses options of `train_meta`; returns how many shadow models it would train on."""
    if num_validation is None:
        num_validation = max(1, num_shadows // 9)
    counts |= {"num_validation": num_validation, "meta_batch": meta_batch}
    for name, count in counts.items():
        checks.at_least("train_meta", name, count, 1)
    num_known = 2 * (num_shadows - num_validation)
    if num_known < 1:
        raise ValueError(
            f"train_meta: need num_validation < num_shadows, got {num_validation} and "
            f"{num_shadows}."
        )
    if meta_batch > num_known:
        raise ValueError(
            f"train_meta: need meta_batch <= {num_known} shadow models, got {meta_batch}."
        )
    checks.non_negative("train_meta", "learning_rate", learning_rate)
    return num_known


def train_meta(
    key: Key,
    trained: Shadows,
    *,
    num_validation: int | None = None,
    query_tuning: bool = True,
    num_queries: int = 10,
    hidden: int = 20,
    num_repeats: int = 5,
    num_epochs: int = 10,
    meta_batch: int = 1,
    learning_rate: ArrayLike = 1e-3,
) -> MetaClassifier:
    """Trains meta-classifiers on shadow models that are there already.

    The logits of all queries go through a dense layer with ReLU to one number; Adam minimises the
    binary cross-entropy, and the epoch with the best AUROC on the shadow models held out is kept.
    With query tuning the queries are trained too, through the shadow models.

    The authors' shadow models have dropout on while they are queried; here they are in inference
    mode, as the judged models are.

    Args:
      key: a key.
      trained: shadow models.
      num_validation: models of each kind that are held out; a ninth of them if None, as published.
      query_tuning: whether the queries are trained.
      num_queries: images that a model is asked about; they start as normal noise with the mean and
        the deviation of the data.
      hidden: width of the dense layer.
      num_repeats: meta-classifiers, whose scores are averaged. The authors report the mean AUROC of
        five, each of which is one detector.
      num_epochs: passes over the shadow models.
      meta_batch: models a step; 1 as published, more is faster and another path of the optimiser.
      learning_rate: of Adam.

    Returns:
      A `MetaClassifier` for `mntd`.

    Static: everything but key, trained and learning_rate.

    Raises:
      ValueError: a count below 1, more models held out than there are.

    Source: X. Xu et al., "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.
    """
    num_known = _check_meta(
        len(trained.is_infected) // 2, num_validation=num_validation, num_queries=num_queries,
        hidden=hidden, num_repeats=num_repeats, num_epochs=num_epochs, meta_batch=meta_batch,
        learning_rate=learning_rate,
    )  # fmt: skip
    options = _Options(query_tuning, num_queries, hidden, num_epochs, meta_batch)
    known, held_out = (
        trained._replace(
            logits_fns=jax.tree.map(lambda leaf, rows=rows: leaf[rows], trained.logits_fns),
            is_infected=trained.is_infected[rows],
        )
        for rows in (slice(num_known), slice(num_known, None))
    )
    keys = random.example_keys(key, num_repeats)
    meta, auroc = _train_all(keys, known, held_out, learning_rate, options=options)
    return MetaClassifier(meta.queries, meta.weights, auroc, trained.num_images)


def train_mntd(
    key: Key,
    module: nn.Module,
    dataset: Dataset,
    *,
    num_shadows: int,
    shadow_options: Mapping[str, Any] | None = None,
    **meta_options: Any,
) -> MetaClassifier:
    """Trains shadow models, and meta-classifiers on them: `train_shadows`, then `train_meta`.

    Args:
      key: a key.
      module: the architecture of the models that shall be judged.
      dataset: the defender's clean images; the authors give it 2 % of the training set.
      num_shadows: models of each kind, clean and with a backdoor of the jumbo distribution.
      shadow_options: further options of `train_shadows`.
      **meta_options: options of `train_meta`.

    Returns:
      A `MetaClassifier` for `mntd`.

    Static: everything but key.

    Raises:
      ValueError: what `train_shadows` and `train_meta` raise.

    Source: X. Xu et al., "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.
    """
    # Before the hours that shadow models take.
    checks.at_least("train_mntd", "num_shadows", num_shadows, 2)  # one of each kind is held out
    for name in meta_options:
        options = [*inspect.signature(train_meta).parameters][2:]
        checks.known("train_mntd", "option of train_meta", name, options)
    _check_meta(
        num_shadows,
        **{name: value for name, value in meta_options.items() if name != "query_tuning"},
    )
    key = random.as_typed(key)
    trained = shadows.train_shadows(
        random.named(key, "shadows"), module, dataset, num_shadows=num_shadows,
        **(shadow_options or {}),
    )  # fmt: skip
    return train_meta(random.named(key, "meta"), trained, **meta_options)


@jax.jit
def _scores(meta: MetaClassifier, logits_fn: LogitsFn) -> Array:
    return jax.vmap(_score, (0, None))(_Meta(meta.queries, meta.weights), logits_fn)


def mntd(
    key: Key,
    logits_fn: LogitsFn,
    x: Array | None = None,
    y: Array | None = None,
    *,
    num_classes: int,
    meta: MetaClassifier,
) -> Detection:
    """MNTD: a meta-classifier tells by a model's logits for a few queries whether it is backdoored.

    It is trained on shadow models of the same architecture, clean ones and ones with random
    backdoors, see `train_mntd`. It names no target.

    Args:
      key: not used.
      logits_fn: classifier, images to logits f32[b, k].
      x: not used; the clean images are those that the shadow models were trained on.
      y: not used.
      num_classes: k.
      meta: what `train_mntd` returned.

    Returns:
      A `Detection`: the score is the mean over the repeats of the log-odds that the model is
      backdoored, the target -1. Details: `scores` f32[r], `num_images`.

    Static: num_classes.

    Raises:
      ValueError: another number of classes than the classifier has, or than the shadow models had.

    Source: X. Xu et al., "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.
    """
    del key, x, y
    _, num_queries, *image_shape = meta.queries.shape
    inputs.classes("mntd", logits_fn, image_shape, num_classes, least=1)
    num_known = meta.weights["dense1"]["kernel"].shape[1] // num_queries
    if num_known != num_classes:
        raise ValueError(
            f"mntd: need as many classes as the shadow models had, {num_known}, got "
            f"num_classes={num_classes}."
        )
    scores = _scores(meta, classifier.as_pytree(logits_fn))
    return Detection(
        jnp.mean(scores),
        jnp.asarray(-1, jnp.int32),
        {"scores": scores, "num_images": meta.num_images},
    )
