"""The fast forms against the plain ones, which stand here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax.core import vectors

NUM_ROWS = [1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 33, 50, 64, 65, 70, 100]


def random_rows(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def plain_sort(updates):
    return np.sort(np.where(np.isnan(updates), np.inf, updates), axis=0)


def plain_distances(updates):
    """By differences, in float64; what is not finite is infinitely far."""
    rows = np.asarray(updates, np.float64)
    with np.errstate(invalid="ignore"):
        squares = np.sum((rows[:, None] - rows[None]) ** 2, axis=2)
    squares = np.where(np.isnan(squares), np.inf, squares)
    np.fill_diagonal(squares, 0)
    return squares


def with_attacks(updates):
    """Some entries that are not finite, some ties, both zeros."""
    updates = updates.copy()
    updates[0, :3] = np.nan, np.inf, -np.inf
    updates[-1, 1:4] = -np.inf, np.nan, np.inf
    updates[len(updates) // 2, 3:] = 0.0
    updates[-1, 4:] = -0.0
    return updates


def ends_and_middle(rows):
    n = len(rows)
    return rows[0] + 2 * rows[n // 2] + 4 * rows[-1]


@pytest.mark.parametrize("n", NUM_ROWS)
def test_the_network_sorts(n):
    """The zero-one principle: what sorts every sequence of zeros and ones sorts everything."""
    comparators = [pair for stage in vectors._stages(n) for pair in stage]
    if n <= 16:
        columns = (np.arange(2**n) >> np.arange(n)[:, None]) & 1
    else:  # random ones of every share
        rng = np.random.default_rng(0)
        columns = rng.random((n, 20000)) < rng.random(20000)
    columns = columns.astype(np.int8)
    for low, high in comparators:
        first, second = columns[low].copy(), columns[high].copy()
        columns[low], columns[high] = np.minimum(first, second), np.maximum(first, second)
    assert np.all(np.diff(columns, axis=0) >= 0)
    for stage in vectors._stages(n):  # side by side: no row twice in a stage
        rows = np.ravel(stage)
        assert len(set(rows.tolist())) == len(rows)


@pytest.mark.parametrize("n", [1, 2, 5, 16, 65, 100])
def test_sort_rows(n):
    # More than one block of columns, the last one overlapping its neighbour.
    updates = with_attacks(random_rows(n, vectors._SORT_COLUMNS + 17))
    np.testing.assert_array_equal(jax.jit(vectors.sort_rows)(updates), plain_sort(updates))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 33, 64, 65, 100])
def test_over_sorted(n, monkeypatch):
    monkeypatch.setattr(vectors, "_NETWORK_COLUMNS", 200)  # several blocks of a short vector
    updates = with_attacks(random_rows(n, 517))[:, 4:]  # finite: sums of infinities are NaN
    actual = jax.jit(functools.partial(vectors.over_sorted, ends_and_middle))(updates)
    np.testing.assert_array_equal(actual, ends_and_middle(plain_sort(updates)))


@pytest.mark.parametrize("n", [10, 70])
@pytest.mark.parametrize("rank", [0, 4, -1])
def test_over_sorted_where_rows_are_not_finite(n, rank):
    updates = with_attacks(random_rows(n, 9))
    actual = jax.jit(functools.partial(vectors.over_sorted, lambda rows: rows[rank]))(updates)
    np.testing.assert_array_equal(actual, plain_sort(updates)[rank])


def test_the_other_platforms_sort_too():
    updates = with_attacks(random_rows(10, 9))
    np.testing.assert_array_equal(vectors._sort_plain(updates), plain_sort(updates))
    lowered = jax.jit(vectors.sort_rows).trace(updates).lower(lowering_platforms=("cuda",))
    assert "sort" in lowered.as_text()
    assert "while" not in lowered.as_text()


def test_over_sorted_under_vmap():
    updates = np.stack([random_rows(6, 9, seed) for seed in range(3)])
    median = functools.partial(vectors.over_sorted, lambda rows: rows[2])
    np.testing.assert_array_equal(jax.vmap(median)(updates), np.sort(updates, axis=1)[:, 2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(dtype):
    updates = jnp.asarray(random_rows(5, 9), dtype)
    assert vectors.sort_rows(updates).dtype == dtype
    assert vectors.over_sorted(ends_and_middle, updates).dtype == dtype
    assert vectors.combine(jnp.ones(5) / 5, updates).dtype == dtype
    assert vectors.squared_distances(updates).dtype == jnp.float32
    assert vectors.squared_norms(updates).dtype == jnp.float32


def test_combine():
    updates = random_rows(7, 33)
    weights = np.linspace(0, 1, 7, dtype=np.float32)
    combine = jax.jit(vectors.combine)
    # Sums of 7 terms of order 1 in float32.
    np.testing.assert_allclose(combine(weights, updates), weights @ updates, atol=1e-6)
    expected = combine(weights, updates)
    for bad in (np.nan, np.inf, -np.inf):
        updates[0, ::2] = bad  # its weight is 0
        np.testing.assert_array_equal(combine(weights, updates), expected)
    updates[3, 1] = np.inf  # this one counts
    assert np.flatnonzero(~np.isfinite(combine(weights, updates))).tolist() == [1]
    many = jax.vmap(combine, in_axes=(0, None))(np.stack([weights, weights[::-1]]), updates)
    np.testing.assert_array_equal(many[0], combine(weights, updates))
    assert np.isneginf(many[1, 0])


def test_finite_rows_and_squared_norms():
    updates = random_rows(6, 5)
    updates[1, 2], updates[3, 0], updates[4, 4] = np.nan, -np.inf, 1e30
    np.testing.assert_array_equal(vectors.finite_rows(updates), [1, 0, 1, 0, 1, 1])
    squares = vectors.squared_norms(updates)
    assert np.isinf(squares).tolist() == [False, True, False, True, True, False]
    expected = np.sum(updates.astype(np.float64) ** 2, axis=1)
    # Sums of 5 squares in float32.
    np.testing.assert_allclose(squares[jnp.array([0, 2, 5])], expected[[0, 2, 5]], rtol=1e-6)


distances_of = jax.jit(vectors.squared_distances)


@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (3, 1), (7, 1025), (50, 3001), (70, 999)])
def test_squared_distances(n, d):
    updates = random_rows(n, d)
    # Gram matrices of rows of length sqrt(d), whose distances are of that order.
    np.testing.assert_allclose(distances_of(updates), plain_distances(updates), rtol=1e-5)


def test_squared_distances_of_rows_with_a_large_common_part():
    updates = random_rows(10, 3001) + 1000
    # What float32 keeps of the rows themselves is exact in float64, so nothing cancels but the
    # Gram matrix; of the rows as they are it would be off by more than the distances.
    np.testing.assert_allclose(distances_of(updates), plain_distances(updates), rtol=1e-5)
    gram = updates @ updates.T
    plain = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    off = ~np.eye(10, dtype=bool)
    assert np.max(np.abs(plain / np.maximum(plain_distances(updates), 1) - 1)[off]) > 1e-2


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4], [7, 8, 9]])
@pytest.mark.parametrize("attack", [1e6, -1e9, 1e30, np.nan, np.inf])
def test_squared_distances_of_honest_rows_under_attack(rows, attack):
    updates = random_rows(10, 1500)
    expected = plain_distances(updates)
    updates[rows] = attack
    honest = np.setdiff1d(np.arange(10), rows)
    distances = np.asarray(distances_of(updates))
    np.testing.assert_allclose(
        distances[np.ix_(honest, honest)], expected[np.ix_(honest, honest)], rtol=1e-5
    )
    others = distances[np.ix_(honest, rows)]
    assert np.all(others > 1e14 if np.isfinite(attack) else np.isinf(others))


def test_squared_distances_when_the_row_of_median_length_is_far():
    """Rows that sit around a point, and attackers as long but on the other side of 0."""
    updates = random_rows(9, 1500) + 1000
    expected = plain_distances(updates)
    updates[:4] *= -1
    distances = np.asarray(distances_of(updates))
    np.testing.assert_allclose(distances[4:, 4:], expected[4:, 4:], rtol=1e-5)


def test_nearest_sums():
    rng = np.random.default_rng(0)
    distances = rng.random((6, 6)).astype(np.float32)
    distances = distances + distances.T
    np.fill_diagonal(distances, 0)
    distances[2, 4] = distances[4, 2] = np.inf
    nearest_sums = jax.jit(vectors.nearest_sums)  # the number traced
    for count in range(5):
        expected = [np.sort(np.delete(row, i))[:count].sum() for i, row in enumerate(distances)]
        np.testing.assert_allclose(nearest_sums(distances, count), expected, rtol=1e-6)
    assert np.isinf(nearest_sums(distances, 5)).tolist() == [False, False, True, False, True, False]


def test_ravel():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.ones(2)]}
    vector, unravel = vectors.ravel(tree)
    assert vector.shape == (8,)
    jax.tree.map(np.testing.assert_array_equal, unravel(vector), tree)
