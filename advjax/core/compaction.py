"""Work for the images that still need it, in batches of a few fixed sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from advjax.core import parallel

# Batches shrink to a half, a quarter ... but not below this: every size is a program to compile.
_SMALLEST = 32


def sizes(num_examples: int, batch_size: int | None = None, mesh: Mesh | None = None) -> list[int]:
    """The sizes of batches: the largest, its half, its quarter and so on.

    Args:
      num_examples: how many images there are at most.
      batch_size: the largest size; all images by default.
      mesh: devices over which a batch has to divide.
    """
    result = [num_examples if batch_size is None else min(batch_size, num_examples)]
    while result[-1] >= 2 * _SMALLEST:
        result.append(-(-result[-1] // 2))
    return result if mesh is None else [parallel.padded(size, mesh.size) for size in result]


def over(
    function: Callable[..., Any],
    arrays: Any,
    rows: np.ndarray,
    sizes: Sequence[int],
    mesh: Mesh | None = None,
) -> Any:
    """Applies a function to some rows of arrays, batch by batch.

    Args:
      function: takes a tree of arrays [size, ...] as its arguments and returns one of the same
        kind.
      arrays: a tuple of trees of arrays [n, ...].
      rows: which of the n, int[m].
      sizes: what `sizes` returned.
      mesh: devices to split each batch over.

    Returns:
      A tree of NumPy arrays [m, ...]; None for no rows.
    """
    results = []
    while rows.size:
        # One full batch, or the smallest that takes all that is left.
        size = min([s for s in sizes if s >= rows.size], default=max(sizes))
        chunk, rows = rows[:size], rows[size:]
        padded = np.resize(chunk, size)  # by repetition
        batch = jax.tree.map(lambda leaf, padded=padded: leaf[padded], arrays)
        result = function(*parallel.place(batch, mesh, axis=0))
        results.append(
            jax.tree.map(lambda leaf, count=chunk.size: np.asarray(leaf)[:count], result)
        )
    if not results:
        return None
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)
