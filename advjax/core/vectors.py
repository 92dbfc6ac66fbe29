"""Client updates as rows of a matrix: distances, sorting, weighted sums, and trees as vectors.

Rows that are not finite are legal attacks: they are infinitely far from every other row, and a row
of weight 0 does not count whatever it holds. Everything is computed in float32 or wider.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core.typing import Array

# On CPU a block of this many columns of some fifty rows stays in the cache.
_GRAM_COLUMNS = 1024
_SORT_COLUMNS = 256
# Few enough for several blocks, see `over_sorted`; many enough for XLA to use several threads.
_NETWORK_COLUMNS = 1 << 15
# A network unrolled over more rows takes XLA minutes to compile: 49 s for 100 rows.
_LARGEST_NETWORK = 64
# A squared distance is off by some 1e-7 of the largest one.
_LARGEST_RATIO = 1e4


def _wide(array: Array) -> jax.Array:
    return jnp.asarray(array, jnp.promote_types(array.dtype, jnp.float32))


def ravel(tree: Any) -> tuple[jax.Array, Callable[[Array], Any]]:
    """A tree of arrays as one vector f32[d], and the function back."""
    vector, unravel = jax.flatten_util.ravel_pytree(tree)
    return vector, lambda vector: unravel(jnp.asarray(vector))


def finite_rows(updates: Array) -> jax.Array:
    """Which rows are finite throughout, bool[n]."""
    # 0 * inf and 0 * NaN are NaN; on CPU this sum is several times faster than jnp.all.
    return jnp.sum(_wide(updates) * 0, axis=1) == 0


def squared_norms(updates: Array) -> jax.Array:
    """Squared Euclidean length of each row, f32[n]; infinite where the row is not finite or so
    large that float32 cannot hold the square.
    """
    squares = jnp.sum(jnp.square(_wide(updates)), axis=1)
    return jnp.where(jnp.isnan(squares), jnp.inf, squares)


def combine(weights: Array, updates: Array) -> jax.Array:
    """The weighted sum of the rows, [d] in their dtype; rows of weight 0 may hold anything.

    Args:
      weights: f32[n].
      updates: f32[n, d].
    """
    rows = _wide(updates)
    weights = jnp.asarray(weights, rows.dtype)
    total = functools.partial(jnp.matmul, precision="highest")
    combined = total(weights, rows)

    def without_uncounted():
        return total(weights, jnp.where((weights != 0)[:, None], rows, 0))

    # The mask costs a copy of the rows, so it is put on only where a row of weight 0 got through.
    is_clean = jnp.all(jnp.isfinite(combined))
    return jax.lax.cond(is_clean, lambda: combined, without_uncounted).astype(updates.dtype)


def squared_distances(updates: Array) -> jax.Array:
    """Squared Euclidean distances between rows, f32[n, n]; rows that are not finite, or so large
    that float32 cannot hold the square, are at infinity.

    They come from the Gram matrix of the differences to one row, since that of the rows themselves
    cancels where they share a large common part. The row is that of median length, which is no
    farther than an honest one; where it still lies far from most others, the one with the smallest
    median distance takes its place.

    Args:
      updates: f32[n, d].
    """
    rows = _wide(updates)
    n = len(rows)

    def around(reference):
        gram = jax.lax.platform_dependent(rows, rows[reference], cpu=_blocked_gram, default=_gram)
        squares = jnp.diagonal(gram)
        distances = jnp.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)
        distances = jnp.where(jnp.isnan(distances), jnp.inf, distances)
        return jnp.where(jnp.eye(n, dtype=bool), 0, distances)

    squares = squared_norms(rows)
    middle = (jnp.sum(jnp.isfinite(squares)) - 1) // 2
    distances = around(jnp.argsort(squares)[middle])
    medians = jnp.sort(distances, axis=1)[:, n // 2]
    medoid = jnp.argmin(medians)
    largest = jnp.max(jnp.where(jnp.isfinite(distances), distances, 0))
    is_lost = largest > _LARGEST_RATIO * medians[medoid]
    return jax.lax.cond(is_lost, lambda: around(medoid), lambda: distances)


def _gram(rows: jax.Array, origin: jax.Array) -> jax.Array:
    differences = rows - origin
    return jnp.matmul(differences, differences.T, precision="highest")


def _blocked_gram(rows: jax.Array, origin: jax.Array) -> jax.Array:
    n, d = rows.shape
    size = min(d, _GRAM_COLUMNS)

    whole = d // size * size

    def add(index, total):
        block = jax.lax.dynamic_slice_in_dim(rows, index * size, size, axis=1)
        return total + _gram(block, jax.lax.dynamic_slice_in_dim(origin, index * size, size))

    total = jax.lax.fori_loop(0, d // size, add, jnp.zeros((n, n), rows.dtype))
    return total + _gram(rows[:, whole:], origin[whole:])


def nearest_sums(distances: Array, num_neighbors: ArrayLike) -> jax.Array:
    """For each row the sum of the distances to its nearest others, f32[n].

    Args:
      distances: f32[n, n], zero on the diagonal.
      num_neighbors: how many others; may be traced.
    """
    n = distances.shape[0]
    others = jnp.sort(jnp.where(jnp.eye(n, dtype=bool), jnp.inf, distances), axis=1)
    return jnp.sum(jnp.where(jnp.arange(n) < num_neighbors, others, 0), axis=1)


def _without_nan(rows: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(rows), jnp.inf, rows)


def _sort_plain(rows: jax.Array) -> jax.Array:
    return jnp.sort(_without_nan(rows), axis=0)


@functools.cache
def _stages(n: int) -> list[list[tuple[int, int]]]:
    """Batcher's odd-even merge sort of n rows: comparators (low, high), disjoint in a stage."""
    stages = []
    for sorted_size in (2**power for power in range((n - 1).bit_length())):
        for gap in (sorted_size >> shift for shift in range(sorted_size.bit_length())):
            stages.append(
                [
                    (low, low + gap)
                    for start in range(gap % sorted_size, n - gap, 2 * gap)
                    for low in range(start, min(start + gap, n - gap))
                    if low // (2 * sorted_size) == (low + gap) // (2 * sorted_size)
                ]
            )
    return stages


def _sort_unrolled(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """All comparators in one expression, which XLA makes one loop without intermediate rows."""
    ordered = [_without_nan(row) for row in rows]
    for low, high in (pair for stage in _stages(len(ordered)) for pair in stage):
        first, second = ordered[low], ordered[high]
        # Half the price of jnp.minimum and jnp.maximum, which look for NaN.
        in_order = first < second
        ordered[low] = jnp.where(in_order, first, second)
        ordered[high] = jnp.where(in_order, second, first)
    return ordered


def _sort_staged(block: jax.Array) -> jax.Array:
    """One stage after the other, each row against its partner: compiles fast for any n."""
    n = len(block)
    stages = _stages(n)
    partners = np.tile(np.arange(n), (len(stages), 1))
    for stage, pairs in enumerate(stages):
        for low, high in pairs:
            partners[stage, [low, high]] = high, low
    is_low = np.arange(n) <= partners

    def exchange(block, stage):
        partners, is_low = stage
        others = block[partners]
        lows, highs = jnp.minimum(block, others), jnp.maximum(block, others)
        return jnp.where(is_low[:, None], lows, highs), None

    return jax.lax.scan(exchange, _without_nan(block), (partners, is_low))[0]


def _in_blocks(
    function: Callable[[jax.Array, ArrayLike, int], jax.Array], size: int, rows: jax.Array
) -> jax.Array:
    """`function(rows, start, size)`, f32[..., size], of one block of columns after the other."""
    d = rows.shape[1]
    size = min(d, size)

    def place(index, result):
        start = jnp.minimum(index * size, d - size)
        block = function(rows, start, size)
        return jax.lax.dynamic_update_slice_in_dim(result, block, start, axis=-1)

    shape = jax.eval_shape(lambda rows: function(rows, 0, size), rows).shape
    empty = jnp.zeros((*shape[:-1], d), rows.dtype)
    return jax.lax.fori_loop(0, -(-d // size), place, empty)


def _sort_block_staged(rows: jax.Array, start: ArrayLike, size: int) -> jax.Array:
    return _sort_staged(jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1))


def _sort_block_unrolled(rows: jax.Array, start: ArrayLike, size: int) -> list[jax.Array]:
    # Row by row: a block of all rows would be copied.
    block = [jax.lax.dynamic_slice(rows, (row, start), (1, size))[0] for row in range(len(rows))]
    return _sort_unrolled(block)


def over_sorted(function: Callable[[list[jax.Array]], jax.Array], updates: Array) -> jax.Array:
    """`function(rows)` of the rows after every coordinate is sorted; NaN counts as infinity.

    What the function does not read of the rows is not sorted to its end.

    Args:
      function: n rows f32[c], the lowest values first, to f32[c], each coordinate by itself.
      updates: f32[n, d].

    Returns:
      [d] in the dtype of the updates.
    """
    # In blocks, the network too: by itself it would be fused into whatever reads the result, and
    # the differences of all rows to a median would sort anew for each of them.
    if len(updates) > _LARGEST_NETWORK:
        sort_block, size = _sort_block_staged, _SORT_COLUMNS
    else:
        sort_block, size = _sort_block_unrolled, _NETWORK_COLUMNS

    def of_block(rows, start, size):
        return function(list(sort_block(rows, start, size)))

    # jnp.sort along few rows is a hundred times slower than the network on CPU, and fine elsewhere.
    # The platform is that of the arrays, which need not be the process's default.
    result = jax.lax.platform_dependent(
        _wide(updates),
        cpu=functools.partial(_in_blocks, of_block, size),
        default=lambda rows: function(list(_sort_plain(rows))),
    )
    return result.astype(updates.dtype)


def sort_rows(updates: Array) -> jax.Array:
    """Every coordinate sorted over the rows, f32[n, d]; NaN counts as infinity.

    Args:
      updates: f32[n, d].
    """
    # Not unrolled: as many outputs as rows take XLA half a minute.
    in_blocks = functools.partial(_in_blocks, _sort_block_staged, _SORT_COLUMNS)
    rows = jax.lax.platform_dependent(_wide(updates), cpu=in_blocks, default=_sort_plain)
    return rows.astype(updates.dtype)
