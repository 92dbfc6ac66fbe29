"""Every stateless rule against NumPy, written from its formula, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import aggregation
from advjax.aggregation import filters
from tests.aggregation import rules

N, D, F = 13, 23, 2
# Means of some ten float32 numbers of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def distances(updates):
    return np.sum((updates[:, None] - updates[None]) ** 2, axis=2)


def krum_scores(updates, neighbors):
    return np.sort(distances(updates), axis=1)[:, 1 : neighbors + 1].sum(axis=1)


def one_by_one(updates, num_selected, neighbors):
    left, selected = list(range(len(updates))), []
    while len(selected) < num_selected:
        scores = krum_scores(updates[left], max(neighbors - len(selected), 1))
        selected.append(left.pop(int(np.argmin(scores))))
    return selected


def near_median(column, count, even):
    ordered = np.sort(column)
    middle = np.median(column) if even == "midpoint" else ordered[(len(ordered) - 1) // 2]
    order = np.argsort(np.abs(ordered - middle), kind="stable")
    return ordered[order[:count]].mean()


def mean(updates, weights=None):
    return np.average(updates, axis=0, weights=weights)


def krum(updates, num_byzantine, neighbors=None):
    neighbors = len(updates) - num_byzantine - 2 if neighbors is None else neighbors
    return updates[np.argmin(krum_scores(updates, neighbors))]


def multi_krum(updates, num_byzantine, neighbors=None, num_selected=None, iterative=False):
    n = len(updates)
    neighbors = n - num_byzantine - 2 if neighbors is None else neighbors
    if iterative:
        most = n - 2 * num_byzantine - 2 if num_selected is None else num_selected
        return updates[one_by_one(updates, most, neighbors)].mean(axis=0)
    num_selected = n - num_byzantine if num_selected is None else num_selected
    return updates[np.argsort(krum_scores(updates, neighbors))[:num_selected]].mean(axis=0)


def median(updates, even="midpoint"):
    if even == "midpoint":
        return np.median(updates, axis=0)
    return np.sort(updates, axis=0)[(len(updates) - 1) // 2]


def trimmed_mean(updates, num_byzantine):
    kept = slice(num_byzantine, len(updates) - num_byzantine)
    return np.sort(updates, axis=0)[kept].mean(axis=0)


def meamed(updates, num_byzantine, even="midpoint"):
    count = len(updates) - num_byzantine
    return np.array([near_median(column, count, even) for column in updates.T])


def clipping(updates, radius):
    lengths = np.linalg.norm(updates, axis=1)
    if isinstance(radius, str):
        radius = {"mean": np.mean, "median": np.median}[radius](lengths)
    return updates * np.minimum(1, radius / lengths)[:, None]


def norm_bounding(updates, radius):
    return clipping(updates, radius).mean(axis=0)


def bulyan(updates, num_byzantine, neighbors=None, even="midpoint"):
    n = len(updates)
    neighbors = n - num_byzantine - 2 if neighbors is None else neighbors
    selected = updates[one_by_one(updates, n - 2 * num_byzantine, neighbors)]
    return np.array([near_median(column, n - 4 * num_byzantine, even) for column in selected.T])


def faba(updates, num_byzantine):
    for _ in range(num_byzantine):
        lengths = np.linalg.norm(updates - updates.mean(axis=0), axis=1)
        updates = np.delete(updates, np.argmax(lengths), axis=0)
    return updates.mean(axis=0)


def dnc(key, updates, num_byzantine, filter_fraction=1.0):
    """All coordinates, one iteration."""
    centred = updates - updates.mean(axis=0)
    scores = (centred @ np.linalg.svd(centred)[2][0]) ** 2
    num_kept = len(updates) - int(filter_fraction * num_byzantine)
    return updates[np.argsort(scores)[:num_kept]].mean(axis=0)


def mda(updates, num_byzantine):
    subsets = itertools.combinations(range(len(updates)), len(updates) - num_byzantine)
    pairs = distances(updates)
    best = min(subsets, key=lambda subset: pairs[np.ix_(subset, subset)].max())
    return updates[list(best)].mean(axis=0)


def monna(updates, num_byzantine, reference=0):
    order = np.argsort(distances(updates)[reference])
    return updates[order[: len(updates) - num_byzantine]].mean(axis=0)


def nearest_neighbour_mixing(updates, num_byzantine):
    return np.stack([monna(updates, num_byzantine, i) for i in range(len(updates))])


WEIGHTS = np.arange(N, dtype=np.float32)
CASES = [
    ("mean", {}),
    ("mean", {"weights": WEIGHTS}),
    ("krum", {"num_byzantine": F}),
    ("krum", {"num_byzantine": F, "neighbors": N - F - 2}),
    ("krum", {"num_byzantine": F, "neighbors": 1}),
    ("multi_krum", {"num_byzantine": F}),
    ("multi_krum", {"num_byzantine": F, "neighbors": N - F - 3, "num_selected": 4}),
    ("multi_krum", {"num_byzantine": F, "iterative": True}),
    ("multi_krum", {"num_byzantine": F, "neighbors": N - F - 3, "iterative": True}),
    ("median", {}),
    ("median", {"even": "lower"}),
    ("trimmed_mean", {"num_byzantine": F}),
    ("trimmed_mean", {"num_byzantine": 0}),
    ("trimmed_mean", {"num_byzantine": (N - 1) // 2}),
    ("meamed", {"num_byzantine": F}),
    ("meamed", {"num_byzantine": 5, "even": "lower"}),
    ("clipping", {"radius": 4.5}),
    ("norm_bounding", {"radius": 4.5}),
    ("norm_bounding", {"radius": "mean"}),
    ("norm_bounding", {"radius": "median"}),
    ("bulyan", {"num_byzantine": F}),
    ("bulyan", {"num_byzantine": F, "neighbors": N - F - 3, "even": "lower"}),
    ("faba", {"num_byzantine": F}),
    ("faba", {"num_byzantine": 5}),
    ("dnc", {"num_byzantine": F}),
    ("dnc", {"num_byzantine": F, "filter_fraction": 1.5}),
    ("mda", {"num_byzantine": F}),
    ("monna", {"num_byzantine": F}),
    ("monna", {"num_byzantine": F, "reference": 3}),
    ("nearest_neighbour_mixing", {"num_byzantine": F}),
]


@pytest.mark.parametrize("name, options", CASES, ids=lambda value: str(value))
def test_rule(name, options):
    first = (jax.random.key(0),) if name == "dnc" else ()
    rule = jax.jit(lambda updates: getattr(aggregation, name)(*first, updates, **options))
    even = name in ("median", "meamed", "bulyan") or not options
    for n in (N, N - 1) if even else (N,):
        for seed in range(3):
            updates = rules.benign_updates(seed, n, D)
            updates[:F] += 0.5  # not all alike
            expected = globals()[name](*first, np.asarray(updates, np.float64), **options)
            np.testing.assert_allclose(rule(updates), expected, **TOLERANCE)


def test_ties_go_to_the_lowest_index():
    # Integers, so that all distances are exact. The rows 1, 2 and 4 score 1 each.
    updates = np.array([[5], [0], [1], [-5], [2], [9]], np.float32)
    one = {"num_byzantine": 1, "neighbors": 1}

    def of(rule, updates, **options):
        return np.asarray(jax.jit(functools.partial(rule, **options))(updates))

    assert of(aggregation.krum, updates, **one) == 0
    weights = of(aggregation.multi_krum_weights, updates, **one, num_selected=2)
    assert np.flatnonzero(weights).tolist() == [1, 2]
    three = np.array([[0], [1], [2]], np.float32)
    # 0 and 2 are equally far from the reference, the median and the mean; {0, 1} and {1, 2} are
    # equally wide.
    assert of(aggregation.monna, three, num_byzantine=1, reference=1) == 0.5
    assert of(aggregation.meamed, three, num_byzantine=1) == 0.5
    assert of(aggregation.mda, three, num_byzantine=1) == 0.5
    assert of(aggregation.faba, three, num_byzantine=1) == 1.5


def test_bulyan_of_no_byzantine_client_is_the_mean():
    # All clients are chosen, and of each coordinate all values are kept.
    rule = jax.jit(functools.partial(aggregation.bulyan, num_byzantine=0))
    np.testing.assert_allclose(rule(np.float32([[5], [1], [2], [3], [100]])), [22.2], rtol=1e-6)
    updates = rules.benign_updates(0, N, D)
    np.testing.assert_allclose(rule(updates), np.mean(updates, axis=0), **TOLERANCE)
    weights = aggregation.bulyan_weights(updates, num_byzantine=0)
    np.testing.assert_allclose(weights, np.full(N, 1 / N), rtol=1e-6)


def test_the_iterative_form_ends_as_the_paper_does():
    weights = jax.jit(functools.partial(aggregation.multi_krum_weights, iterative=True))
    updates = rules.benign_updates(0, 50, 5)
    for f in (0, 3, 10, 23):
        assert np.count_nonzero(weights(updates, num_byzantine=f)) == 50 - 2 * f - 2


def test_dnc_looks_at_some_coordinates_again_and_again():
    updates = rules.benign_updates(0, 20, 400)
    noise = rules.benign_updates(1, 20, 400)
    updates[:4] += 5
    count = {}
    for num_iters in (1, 4):
        weights_of = jax.jit(
            functools.partial(
                aggregation.dnc_weights,
                num_byzantine=4, num_coordinates=10, num_iters=num_iters,
            )
        )  # fmt: skip
        weights = weights_of(jax.random.key(0), updates)
        assert np.all(weights[:4] == 0)
        np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
        count[num_iters] = np.count_nonzero(weights_of(jax.random.key(0), noise))
    # On noise the intersection of several iterations is smaller than one of them.
    assert count[1] == 16 > count[4]


@pytest.mark.parametrize("d, count", [(10, 3), (7, 7), (1000, 999), (2**31 - 1, 5)])
def test_dnc_draws_different_coordinates(d, count):
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = np.asarray(jax.vmap(lambda key: filters._spread_coordinates(key, d, count))(keys))
    assert drawn.min() >= 0
    assert drawn.max() < d
    assert np.all(np.diff(drawn, axis=1) > 0)
    if d == 10:
        assert set(drawn.ravel().tolist()) == set(range(d))


def subsets(n, sizes):
    return [m for size in set(sizes) for m in itertools.combinations(range(n), size)]


def test_bucketing():
    updates = rules.benign_updates(0, 7, 5)
    updates[:, 0] = 10.0 ** np.arange(7)  # the digits of a bucket's sum name its members
    for size, sizes in [(1, [1] * 7), (2, [1, 2, 2, 2]), (3, [2, 2, 3]), (7, [7])]:
        buckets = np.asarray(
            aggregation.bucketing(jax.random.key(size), updates, bucket_size=size), np.float64
        )
        assert buckets.shape == (len(sizes), 5)
        found = []
        for bucket in buckets:
            fits = [
                members
                for members in subsets(7, sizes)
                if np.allclose(updates[list(members)].mean(axis=0), bucket, rtol=1e-5)
            ]
            assert len(fits) == 1
            found.append(fits[0])
        assert sorted(map(len, found)) == sizes
        assert sorted(itertools.chain(*found)) == list(range(7))


def test_bulyan_weights_report_the_share_of_kept_values():
    updates = rules.benign_updates(0, N, D).astype(np.float64)
    selected = one_by_one(updates, N - 2 * F, N - F - 2)
    shares = np.zeros(N)
    for column in updates.T:
        middle = np.median(column[selected])
        order = np.argsort(np.abs(column[selected] - middle))
        shares[np.array(selected)[order[: N - 4 * F]]] += 1 / (N - 4 * F) / D
    weights_of = jax.jit(functools.partial(aggregation.bulyan_weights, num_byzantine=F))
    np.testing.assert_allclose(weights_of(updates.astype(np.float32)), shares, atol=1e-6)
    # Equal clients, of whom the last 2 F are not selected, share.
    expected = np.where(np.arange(N) < N - 2 * F, 1 / (N - 2 * F), 0)
    np.testing.assert_allclose(weights_of(jnp.ones((N, D))), expected, atol=1e-6)
