"""What holds for any updates: order, origin, and attackers far away."""

import functools
import itertools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from advjax import aggregation
from tests.aggregation import rules

N, D, F = rules.NUM_CLIENTS, rules.NUM_PARAMETERS, rules.NUM_BYZANTINE
FAR = ("far", "apart", "infinite", "not a number", "mixed")
EXAMPLES = hypothesis.settings(max_examples=40)

# In tests of their own: monna, whose reference is a row; and rules that meet equals, of which they
# take the first: mda, with several subsets of one diameter; bulyan, whose last choice counts one
# neighbour, so that two rows nearest to each other score the same.
SYMMETRIC = [
    "mean", "krum", "multi_krum", "multi_krum-iterative", "median", "median-lower", "trimmed_mean",
    "norm_bounding", "norm_bounding-median", "faba", "dnc", "meamed",
]  # fmt: skip
# Not: norm_bounding, which measures from 0.
TRANSLATED = [name for name in rules.RULES if not name.startswith("norm_bounding")]
ROBUST = [
    "krum", "multi_krum", "multi_krum-iterative", "median", "median-lower", "trimmed_mean",
    "bulyan", "faba", "dnc", "meamed", "mda",
]  # fmt: skip


@st.composite
def rounds(draw):
    """Updates, who is Byzantine, an order of the clients and a shift of all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    updates = rules.benign_updates(rng.integers(2**32), N, D)
    updates *= np.float32(10.0 ** draw(st.integers(-3, 3)))
    is_byzantine = rng.permutation(N) < draw(st.integers(1, F))
    return updates, is_byzantine, rng.permutation(N), rng.normal(size=D).astype(np.float32)


def attacks(updates, is_byzantine):
    """Rows in the place of those of the Byzantine clients, one set for each name in FAR."""
    sign = np.where(np.arange(N) % 2, -1, 1)[:, None]
    mixed = np.where(np.arange(N * D).reshape(N, D) % 2, 1e30, -np.inf)
    for rows in (1e6, sign * 1e6, sign * np.inf, np.nan, mixed):
        yield np.where(is_byzantine[:, None], rows, updates).astype(np.float32)


def is_in_hull(aggregate, benign):
    """In the smallest box around the benign rows, up to the rounding of a mean."""
    rounding = 1e-6 * np.abs(benign).max()
    lowest, highest = benign.min(axis=0) - rounding, benign.max(axis=0) + rounding
    return np.all((lowest <= aggregate) & (aggregate <= highest), axis=-1)


@pytest.mark.parametrize("name", SYMMETRIC)
@hypothesis.given(rounds())
@EXAMPLES
def test_the_order_of_clients_does_not_matter(name, drawn):
    updates, _, order, _ = drawn
    result, permuted = rules.on_stack(name, np.stack([updates, updates[order]]))
    # Sums in another order.
    np.testing.assert_allclose(permuted, result, rtol=0, atol=3e-6 * np.abs(updates).max())


@hypothesis.given(rounds())
@EXAMPLES
def test_the_order_of_the_others_does_not_matter_to_monna(drawn):
    updates, _, order, _ = drawn
    reference = rules.RULES["monna"].keywords["reference"]
    order = np.insert(order[order != reference], reference, reference)
    result, permuted = rules.on_stack("monna", np.stack([updates, updates[order]]))
    np.testing.assert_allclose(permuted, result, rtol=0, atol=3e-6 * np.abs(updates).max())


def has_one_tightest_subset(updates):
    """Whether one subset of n - f rows has the smallest diameter, by more than rounding."""
    rows = updates.astype(np.float64)
    distances = np.linalg.norm(rows[:, None] - rows, axis=-1)
    subsets = map(list, itertools.combinations(range(N), N - F))
    first, second, *_ = sorted(distances[np.ix_(subset, subset)].max() for subset in subsets)
    return second > first * (1 + 1e-5)


@hypothesis.given(rounds())
@EXAMPLES
def test_the_order_of_clients_does_not_matter_to_mda_where_one_subset_is_tightest(drawn):
    updates, _, order, _ = drawn
    hypothesis.assume(has_one_tightest_subset(updates))
    result, permuted = rules.on_stack("mda", np.stack([updates, updates[order]]))
    np.testing.assert_allclose(permuted, result, rtol=0, atol=3e-6 * np.abs(updates).max())


@pytest.fixture(scope="module")
def wider_bulyan():
    """Bulyan on a stack of updates, with so many neighbours that the last choice counts two."""
    rule = functools.partial(aggregation.bulyan, num_byzantine=F, neighbors=N - F - 1)
    return jax.jit(jax.vmap(rule))


@hypothesis.given(rounds())
@EXAMPLES
def test_the_order_of_clients_does_not_matter_to_bulyan_of_two_neighbours(wider_bulyan, drawn):
    updates, _, order, _ = drawn
    result, permuted = wider_bulyan(np.stack([updates, updates[order]]))
    np.testing.assert_allclose(permuted, result, rtol=0, atol=3e-6 * np.abs(updates).max())


@pytest.mark.parametrize("name", TRANSLATED)
@hypothesis.given(rounds())
@EXAMPLES
def test_the_origin_does_not_matter(name, drawn):
    updates, _, _, shift = drawn
    shift = shift * np.abs(updates).max()
    result, shifted = rules.on_stack(name, np.stack([updates, updates + shift]))
    # The rounding of updates and sums that are some times larger.
    np.testing.assert_allclose(shifted, result + shift, rtol=0, atol=1e-5 * np.abs(updates).max())


@pytest.mark.parametrize("name", ROBUST)
@hypothesis.given(rounds())
@EXAMPLES
def test_attackers_far_away_do_not_move_it_out_of_the_benign_hull(name, drawn):
    updates, is_byzantine, _, _ = drawn
    results = rules.on_stack(name, np.stack(list(attacks(updates, is_byzantine))))
    inside = is_in_hull(results, updates[~is_byzantine])
    assert np.all(inside), [kind for kind, good in zip(FAR, inside, strict=True) if not good]


@hypothesis.given(rounds())
@EXAMPLES
def test_attackers_far_away_move_the_mean(drawn):
    updates, is_byzantine, _, _ = drawn
    results = rules.on_stack("mean", np.stack(list(attacks(updates, is_byzantine))))
    # Two that are opposite may cancel; the others never do.
    inside = is_in_hull(results, updates[~is_byzantine])
    assert not np.any(np.delete(inside, FAR.index("apart")))
