"""What every stateless rule promises, run over one table of rules.

A rule is compiled once, for a stack of updates; what the table costs is compiling.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import aggregation
from advjax.aggregation import averages, coordinates, filters, mixing, selection, weighing
from advjax.core import vectors
from tests.aggregation import rules

N, D, F = rules.NUM_CLIENTS, rules.NUM_PARAMETERS, rules.NUM_BYZANTINE
UPDATES = rules.benign_updates(0, N, D)
EVERY = rules.RULES | rules.MIXERS
RANDOM = ("bucketing", "dnc")
WEIGHTED = [name for name in rules.RULES if weighing.weights_function_of(rules.RULES[name])]
MODULES = (averages, coordinates, filters, mixing, selection)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # means of some ten float32 numbers of order 1


def bare(rule):
    """The rule without its `num_byzantine` or `radius`, and the name of that option."""
    options = dict(rule.keywords)
    (option,) = {"num_byzantine", "radius"} & options.keys()
    del options[option]
    return option, functools.partial(rule.func, *rule.args, **options)


def test_the_table_is_complete():
    public = {
        name
        for name in aggregation.__all__
        if inspect.getmodule(getattr(aggregation, name)) in MODULES
        and not name.endswith("_weights")
    }
    assert public == {name.split("-")[0] for name in EVERY}


@pytest.mark.parametrize("name", EVERY)
def test_jit_equals_eager(name):
    stack = np.stack([rules.benign_updates(seed, N, D) for seed in range(3)])
    results = rules.on_stack(name, stack)
    eager = EVERY[name](UPDATES)
    assert eager.dtype == UPDATES.dtype
    assert eager.shape == (D,) if name in rules.RULES else eager.shape[1:] == (D,)
    np.testing.assert_allclose(results[0], eager, **TOLERANCE)
    # A second call with other values: the program fails if it is traced again.
    np.testing.assert_array_equal(rules.on_stack(name, stack[1:])[0], results[1])


TRACED = {
    name: [1, 4]
    for name in ("krum", "multi_krum", "multi_krum-iterative", "trimmed_mean", "faba", "dnc",
                 "monna", "nearest_neighbour_mixing")
} | {name: [0.5, 1e6] for name in ("norm_bounding", "clipping")}  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_vmap_over_the_traced_scalar_equals_a_loop(name):
    option, rule = bare(EVERY[name])
    values = np.array(TRACED[name])
    many = jax.jit(jax.vmap(lambda value: rule(UPDATES, **{option: value})))(values)
    for value, result in zip(TRACED[name], many, strict=True):
        static = jax.jit(functools.partial(rule, **{option: value}))(UPDATES)
        np.testing.assert_allclose(result, static, **TOLERANCE)


@pytest.mark.parametrize("name", EVERY)
def test_half_precision(name):
    """Computed in float32: the same as for the rounded updates in float32, rounded once."""
    updates = jnp.asarray(UPDATES, jnp.bfloat16)
    result = jax.jit(EVERY[name])(updates)
    assert result.dtype == jnp.bfloat16
    wide = rules.on_stack(name, np.asarray(updates, np.float32)[None])[0]
    # The last bit of bfloat16, where the two lie on different sides of the middle.
    np.testing.assert_allclose(np.asarray(result, np.float32), wide, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"mean", "bucketing"}))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_rows_that_are_not_finite(name, bad):
    """As many as are assumed Byzantine leave the result finite, whichever entries are bad."""
    whole, parts = UPDATES.copy(), UPDATES.copy()
    whole[[0, 7]] = bad
    parts[0, 1], parts[7, 3] = bad, -bad
    results = rules.on_stack(name, np.stack([whole, parts]))
    if name == "nearest_neighbour_mixing":  # the bad rows stay for the rule that follows
        results = np.delete(results, [0, 7], axis=1)
    assert np.all(np.isfinite(results))
    assert np.all(np.abs(results) < 10)


def test_the_mean_is_poisoned_where_it_is_not_finite():
    updates = UPDATES.copy()
    updates[3, 2] = np.inf
    assert np.flatnonzero(~np.isfinite(rules.on_stack("mean", updates[None])[0])).tolist() == [2]


@pytest.mark.parametrize("name", RANDOM)
def test_the_key_decides(name):
    rule = EVERY[name]
    updates = rules.benign_updates(0, N, 40)
    of_key = jax.jit(lambda key: rule.func(key, updates, **rule.keywords))
    first = of_key(jax.random.key(1))
    np.testing.assert_array_equal(of_key(jax.random.key(1)), first)
    others = [of_key(jax.random.key(seed)) for seed in range(2, 8)]
    assert any(not np.array_equal(first, other) for other in others)


def test_which_rules_have_weights():
    without = {"median", "median-lower", "trimmed_mean", "meamed"}
    assert set(WEIGHTED) == set(rules.RULES) - without


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights(name):
    """They are not negative, sum to 1, and give the result, also past bad rows."""
    updates = UPDATES.copy()
    if name not in ("mean",):
        updates[2] = np.nan
    weights_of = weighing.weights_function_of(rules.RULES[name])
    weights = np.asarray(jax.jit(weights_of)(updates))
    assert weights.shape == (N,)
    assert weights.dtype == np.float32
    assert weights.min() >= 0
    if not name.startswith("norm_bounding"):
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    if name != "mean":
        assert weights[2] == 0
    if weighing.is_weighted_sum(rules.RULES[name]):
        result = rules.on_stack(name, updates[None])[0]
        np.testing.assert_allclose(vectors.combine(weights, updates), result, **TOLERANCE)


def test_weights_functions_are_found_through_partials():
    assert weighing.weights_function_of(aggregation.krum) is aggregation.krum_weights
    assert weighing.weights_function_of(aggregation.median) is None
    assert not weighing.is_weighted_sum(functools.partial(aggregation.bulyan, num_byzantine=2))
    assert weighing.is_weighted_sum(functools.partial(aggregation.krum, num_byzantine=2))
    assert weighing.weights_function_of(functools.partial(aggregation.median, even="lower")) is None
    rule = functools.partial(functools.partial(aggregation.monna, num_byzantine=2), reference=1)
    weights_of = weighing.weights_function_of(rule)
    expected = aggregation.monna_weights(UPDATES, num_byzantine=2, reference=1)
    np.testing.assert_array_equal(weights_of(UPDATES), expected)


SHAPE = "need updates of shape [n, d], at least one client and one parameter, got shape "
MINORITY = "need 0 <= 2 * num_byzantine < n, got num_byzantine=6 and n=11."
MOST_KRUM = "need n > 2 * num_byzantine + 2, got num_byzantine=5 and n=11."
# What of the sentence comes after the name of the rule.
ERRORS = [
    ("krum", {"num_byzantine": 5}, MOST_KRUM),
    ("multi_krum", {"num_byzantine": 5}, MOST_KRUM),
    ("trimmed_mean", {"num_byzantine": 6}, MINORITY),
    ("bulyan", {"num_byzantine": 3},
     "need n >= 4 * num_byzantine + 3, got num_byzantine=3 and n=11."),
    ("faba", {"num_byzantine": 6}, MINORITY),
    ("meamed", {"num_byzantine": 6}, MINORITY),
    ("mda", {"num_byzantine": 6}, MINORITY),
    ("monna", {"num_byzantine": 6}, MINORITY),
    ("nearest_neighbour_mixing", {"num_byzantine": 6}, MINORITY),
    ("krum", {"num_byzantine": -1}, "need num_byzantine >= 0, got num_byzantine=-1."),
    ("krum", {"num_byzantine": 1.5}, "need an integer num_byzantine, got num_byzantine=1.5."),
    ("krum", {"num_byzantine": 2, "neighbors": 9},
     "need 1 <= neighbors < n - num_byzantine, got neighbors=9, num_byzantine=2 and n=11."),
    ("multi_krum", {"num_byzantine": 2, "num_selected": 10},
     "need 1 <= num_selected <= 9, got num_selected=10"),
    ("multi_krum", {"num_byzantine": 2, "num_selected": 6, "iterative": True},
     "need 1 <= num_selected <= 5, got num_selected=6"),
    ("median", {"even": "upper"}, "unknown even 'upper'; known: midpoint, lower."),
    ("bulyan", {"num_byzantine": 2, "even": "upper"}, "unknown even 'upper'"),
    ("meamed", {"num_byzantine": 2, "even": "upper"}, "unknown even 'upper'"),
    ("norm_bounding", {"radius": -1.0}, "need a finite radius >= 0, got radius=-1.0."),
    ("norm_bounding", {"radius": "largest"}, "unknown radius 'largest'; known: mean, median."),
    ("clipping", {"radius": -1.0}, "need a finite radius >= 0, got radius=-1.0."),
    ("mean", {"weights": np.ones(3)}, "need one weight a client (11), got weights of shape (3,)."),
    ("mean", {"weights": np.zeros(11)}, "need a positive weight, got weights that are all 0."),
    ("mean", {"weights": -np.ones(11)}, "need a finite weights >= 0"),
    ("monna", {"num_byzantine": 2, "reference": 11},
     "need 0 <= reference < n, got reference=11 and n=11."),
    ("bucketing", {"bucket_size": 0}, "need bucket_size >= 1, got bucket_size=0."),
    ("bucketing", {"bucket_size": 12}, "need bucket_size <= n, got bucket_size=12 and n=11."),
    ("dnc", {"num_byzantine": 6}, MINORITY),
    ("dnc", {"num_byzantine": 2, "num_iters": 0}, "need num_iters >= 1, got num_iters=0."),
    ("dnc", {"num_byzantine": 2, "num_coordinates": 0}, "need num_coordinates >= 1"),
    ("dnc", {"num_byzantine": 2, "filter_fraction": 6.0},
     "need filter_fraction * num_byzantine < n, "
     "got filter_fraction=6.0, num_byzantine=2 and n=11."),
]  # fmt: skip


def call(name, updates, **options):
    keys = (jax.random.key(0),) if name in RANDOM else ()
    return getattr(aggregation, name)(*keys, updates, **options)


@pytest.mark.parametrize("name, options, sentence", ERRORS)
def test_errors(name, options, sentence):
    with pytest.raises(ValueError) as error:
        call(name, UPDATES, **options)
    assert str(error.value).startswith(f"{name}: {sentence}")
    with pytest.raises(ValueError):  # under jit too, where the options are static
        jax.eval_shape(functools.partial(call, name, **options), UPDATES)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "updates, sentence",
    [
        (
            UPDATES[0],
            SHAPE + "(6,).",
        ),
        (
            UPDATES[None],
            SHAPE + "(1, 11, 6).",
        ),
        (UPDATES.tolist(), "need updates as an array, got list."),
        (UPDATES.astype(int), "need float updates, got dtype int"),
        (
            UPDATES[:0],
            SHAPE + "(0, 6).",
        ),
        (
            UPDATES[:, :0],
            SHAPE,
        ),
    ],
)
def test_bad_updates(name, updates, sentence):
    with pytest.raises(ValueError) as error:
        EVERY[name](updates)
    assert str(error.value).startswith(f"{name.split('-')[0]}: {sentence}")


@pytest.mark.parametrize("radius", ["mean", "median", 2.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_all_not_finite_count_as_zero(value, radius):
    updates = np.full((3, D), value, np.float32)
    np.testing.assert_array_equal(aggregation.clipping(updates, radius), np.zeros((3, D)))
    np.testing.assert_array_equal(aggregation.norm_bounding(updates, radius), np.zeros(D))


@pytest.mark.parametrize("name", ["bulyan", "meamed", "mda"])
def test_some_need_a_static_number(name):
    rule = getattr(aggregation, name)
    with pytest.raises(ValueError, match=f"{name}: need a static num_byzantine"):
        jax.eval_shape(lambda number: rule(UPDATES, num_byzantine=number), 1)


def test_mda_refuses_too_many_subsets():
    updates = rules.benign_updates(0, 50, 3)
    with pytest.raises(ValueError, match=r"mda: need at most 100000 subsets .* got 10272278170"):
        aggregation.mda(updates, num_byzantine=10)


def test_few_clients():
    for n in (1, 2):
        updates = UPDATES[:n]
        np.testing.assert_allclose(aggregation.median(updates), updates.mean(axis=0), **TOLERANCE)
        np.testing.assert_allclose(
            aggregation.trimmed_mean(updates, num_byzantine=0), updates.mean(axis=0), **TOLERANCE
        )
    np.testing.assert_array_equal(aggregation.mean(np.zeros((2, D), np.float32)), np.zeros(D))
    np.testing.assert_array_equal(
        aggregation.norm_bounding(np.zeros((2, D), np.float32), 0.0), np.zeros(D)
    )


def test_pre_aggregation_composes():
    mixed = aggregation.nearest_neighbour_mixing(UPDATES, num_byzantine=F)
    expected = np.median(np.asarray(mixed), axis=0)
    rule = jax.jit(
        lambda updates: aggregation.median(
            aggregation.nearest_neighbour_mixing(updates, num_byzantine=F)
        )
    )
    np.testing.assert_allclose(rule(UPDATES), expected, **TOLERANCE)


EVERY_RULE = rules.RULES | {
    "geometric_median": aggregation.geometric_median,
    "caf": functools.partial(aggregation.caf, num_byzantine=rules.NUM_BYZANTINE),
    "signguard": aggregation.signguard,
    "flame": aggregation.flame,
}


@pytest.mark.study
@pytest.mark.parametrize("name", EVERY_RULE)
def test_lifted_it_is_the_same_rule(name):
    """What the simulator calls, `report`, gives the aggregate of the rule itself."""
    rule = EVERY_RULE[name]
    lifted = aggregation.stateless(rule)
    aggregate, weights, _ = jax.jit(lifted.report)(UPDATES, lifted.init(UPDATES[0]))
    np.testing.assert_allclose(aggregate, jax.jit(rule)(UPDATES), **TOLERANCE)
    assert weights.shape == (N,)
    if weighing.is_weighted_sum(rule):
        np.testing.assert_allclose(vectors.combine(weights, UPDATES), aggregate, **TOLERANCE)
