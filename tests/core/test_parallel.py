"""Meshes, and arrays placed on them: eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from advjax import parallel

NUM_DEVICES = 8


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < NUM_DEVICES:
        pytest.skip(f"needs {NUM_DEVICES} devices, has {jax.device_count()}")
    return parallel.make_mesh(devices=jax.devices()[:NUM_DEVICES])


@pytest.mark.parametrize(
    "size, multiple, least", [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 1, 5)]
)
def test_padded(size, multiple, least):
    assert parallel.padded(size, multiple) == least


def test_make_mesh(mesh):
    assert mesh.axis_names == ("data",)
    assert mesh.size == NUM_DEVICES
    assert mesh.axis_types == (AxisType.Auto,)
    assert parallel.make_mesh().size == jax.device_count()
    small = parallel.make_mesh("models", jax.devices()[:2])
    assert small.axis_names == ("models",)
    assert small.devices.tolist() == jax.devices()[:2]


def test_place_without_a_mesh_changes_nothing():
    tree = {"a": np.arange(3)}
    assert parallel.place(tree, None, axis=0) is tree


def test_place(mesh):
    x = np.arange(32.0, dtype=np.float32).reshape(16, 2)
    whole = parallel.place(x, mesh)
    assert whole.sharding.is_fully_replicated
    rows = parallel.place(x, mesh, axis=0)
    assert rows.sharding.spec == PartitionSpec("data")
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2)}
    columns = parallel.place(x.T, mesh, axis=1)
    assert {shard.data.shape for shard in columns.addressable_shards} == {(2, 2)}
    for placed, expected in ((whole, x), (rows, x), (columns, x.T)):
        np.testing.assert_array_equal(placed, expected)


def test_place_trees_and_keys(mesh):
    tree = {"keys": jax.random.split(jax.random.key(0), 8), "y": np.arange(8), "none": None}
    placed = parallel.place(tree, mesh, axis=0)
    assert placed["none"] is None
    assert len(placed["keys"].sharding.device_set) == NUM_DEVICES
    np.testing.assert_array_equal(
        jax.random.key_data(placed["keys"]), jax.random.key_data(tree["keys"])
    )


def test_place_needs_a_multiple(mesh):
    with pytest.raises(ValueError, match=r"evenly divide|divisible"):
        parallel.place(np.zeros((9, 2)), mesh, axis=0)


def test_place_inside_jit(mesh):
    # Computed on eight devices, though it came from one.
    doubled = jax.jit(lambda x: parallel.place(2 * x, mesh, axis=0))(jnp.arange(8.0))
    assert len(doubled.sharding.device_set) == NUM_DEVICES
    assert not doubled.sharding.is_fully_replicated
    np.testing.assert_array_equal(doubled, 2 * np.arange(8))


def test_gather(mesh):
    total = jax.jit(jnp.sum)(parallel.place(np.arange(8.0), mesh, axis=0))
    value = parallel.gather(total, mesh)
    assert len(value.sharding.device_set) == 1
    assert value == 28
    assert isinstance(parallel.gather(np.ones(2), None), jax.Array)
    assert jax.jit(lambda x: parallel.gather(x, mesh))(1.0) == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((None, 2, 0), "several processes need a coordinator, got none"),
        ((None, None, 1), "several processes need a coordinator, got none"),
        (("localhost:1", None, None), "got process_id=None and num_processes=None"),
        (("localhost:1", 2, None), "got process_id=None and num_processes=2"),
        (("localhost:1", 2, 2), "got process_id=2 and num_processes=2"),
        (("localhost:1", 2, -1), "got process_id=-1 and num_processes=2"),
        (("localhost:1", 0, 0), "got process_id=0 and num_processes=0"),
    ],
)
def test_initialize_errors(arguments, sentence):
    with pytest.raises(ValueError, match=f"parallel.initialize: .*{sentence}"):
        parallel.initialize(*arguments)


def test_one_process_needs_nothing():
    parallel.initialize(None)
    parallel.initialize(None, 1, 0)
    assert parallel.is_main_process()
