"""The rules against what ByzFL 0.0.11 got on the same updates."""

import functools

import jax
import numpy as np
import pytest

from advjax import aggregation

N, F = 50, 10
CASES = {
    "mean": aggregation.mean,
    "median": aggregation.median,
    "trimmed_mean": functools.partial(aggregation.trimmed_mean, num_byzantine=F),
    "krum_neighbors_n_minus_f_minus_1": functools.partial(
        aggregation.krum, num_byzantine=F, neighbors=N - F - 1
    ),
    "multi_krum_neighbors_n_minus_f_minus_1": functools.partial(
        aggregation.multi_krum, num_byzantine=F, neighbors=N - F - 1
    ),
    "norm_bounding_M2": functools.partial(aggregation.norm_bounding, radius=2.0),
    "meamed": functools.partial(aggregation.meamed, num_byzantine=F),
    "nearest_neighbour_mixing": functools.partial(
        aggregation.nearest_neighbour_mixing, num_byzantine=F
    ),
    "monna_reference_client_0": functools.partial(aggregation.monna, num_byzantine=F),
    "mda": lambda updates: aggregation.mda(updates[:11], num_byzantine=2),
}


@pytest.fixture(scope="module")
def arrays(reference_dir):
    with np.load(reference_dir / "aggregators.npz") as file:
        assert file["num_byzantine"] == F
        assert file["updates"].shape == (N, 1000)
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_reference(arrays, name):
    # All entries are of order 1, so the bound is absolute.
    actual = jax.jit(CASES[name])(arrays["updates"])
    np.testing.assert_allclose(actual, arrays[name], rtol=0, atol=1e-5)


def test_krum_is_a_row_bit_for_bit(arrays):
    krum = jax.jit(CASES["krum_neighbors_n_minus_f_minus_1"])
    chosen = np.asarray(krum(arrays["updates"])).tobytes()
    assert chosen in {row.tobytes() for row in arrays["updates"]}
    assert chosen == arrays["krum_neighbors_n_minus_f_minus_1"].tobytes()
