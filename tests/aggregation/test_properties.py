"""What holds for any updates: order, origin, and attackers far away."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.aggregation import rules

N, D, F = rules.NUM_CLIENTS, rules.NUM_PARAMETERS, rules.NUM_BYZANTINE
FAR = ("far", "apart", "infinite", "not a number", "mixed")
EXAMPLES = hypothesis.settings(max_examples=40)

# Not: monna, whose reference is a row; and rules that meet equals, of which they take the first:
# mda, with several subsets of one diameter; bulyan, whose last choices count one neighbour, so that
# two rows nearest to each other score the same.
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
