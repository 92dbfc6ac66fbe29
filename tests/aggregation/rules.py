"""What the tests of the aggregation rules share: updates, and the table of the rules."""

import functools

import chex
import jax
import numpy as np

from advjax import aggregation

KEY = jax.random.key(0)


def benign_updates(seed, n, d):
    """Honest updates: a common part and a noise of order 1."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + rng.normal(size=d)).astype(np.float32)


# Every rule and pre-aggregator as a function of the updates alone, for n >= 11 and two Byzantine
# clients.
NUM_BYZANTINE = 2
_f = {"num_byzantine": NUM_BYZANTINE}
RULES = {
    "mean": aggregation.mean,
    "krum": functools.partial(aggregation.krum, **_f),
    "multi_krum": functools.partial(aggregation.multi_krum, **_f),
    "multi_krum-iterative": functools.partial(aggregation.multi_krum, **_f, iterative=True),
    "median": aggregation.median,
    "median-lower": functools.partial(aggregation.median, even="lower"),
    "trimmed_mean": functools.partial(aggregation.trimmed_mean, **_f),
    "norm_bounding": functools.partial(aggregation.norm_bounding, radius=2.0),
    "norm_bounding-median": functools.partial(aggregation.norm_bounding, radius="median"),
    "bulyan": functools.partial(aggregation.bulyan, **_f),
    "faba": functools.partial(aggregation.faba, **_f),
    "dnc": functools.partial(aggregation.dnc, KEY, **_f, num_coordinates=8, num_iters=2),
    "meamed": functools.partial(aggregation.meamed, **_f),
    "mda": functools.partial(aggregation.mda, **_f),
    "monna": functools.partial(aggregation.monna, **_f, reference=4),
}
MIXERS = {
    "bucketing": functools.partial(aggregation.bucketing, KEY, bucket_size=2),
    "nearest_neighbour_mixing": functools.partial(aggregation.nearest_neighbour_mixing, **_f),
    "clipping": functools.partial(aggregation.clipping, radius=2.0),
}
NUM_CLIENTS, NUM_PARAMETERS = 11, 6
NUM_STACKED = 8


@functools.cache
def compiled(name):
    """A rule on a stack f32[8, 11, 6], which fails if it is traced twice; every test of the rule
    shares the program. chex counts by the function's name.
    """

    def rule(stack):
        return jax.vmap((RULES | MIXERS)[name])(stack)

    rule.__name__ = name
    return jax.jit(chex.assert_max_traces(rule, n=1))


def on_stack(name, updates):
    """The rule on updates f32[s, 11, 6], s <= 8."""
    padding = np.zeros((NUM_STACKED - len(updates), NUM_CLIENTS, NUM_PARAMETERS), np.float32)
    return np.asarray(compiled(name)(np.concatenate([updates, padding])))[: len(updates)]
