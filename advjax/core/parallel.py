"""Many devices and many processes: one helper makes the mesh, one places arrays on it."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advjax.core.typing import Array


def use_cores(num_devices: int | None = None) -> None:
    """Makes every core of the processor a device of its own; call it before anything uses jax.

    XLA runs parts of a program on one core, the convolutions above all. A batch that is split over
    one device a core (`make_mesh`) keeps all of them busy. Accelerators do not notice.

    Args:
      num_devices: how many; by default the cores that this process may use.

    Raises:
      RuntimeError: jax has been used already.
    """
    if num_devices is None:
        can_ask = hasattr(os, "sched_getaffinity")
        num_devices = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", num_devices)


def make_mesh(axis_name: str = "data", devices: list[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over the devices of all processes.

    Args:
      axis_name: name of the axis.
      devices: the devices; all of them by default.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))


def place(tree: Any, mesh: Mesh | None, *, axis: int | None = None) -> Any:
    """Puts arrays on the mesh: split along `axis`, or whole on every device.

    Every process passes the same values; each keeps its own part.

    Args:
      tree: arrays. Along `axis` their size is a multiple of the number of devices (`padded`).
      mesh: where to; None leaves the arrays where they are.
      axis: the axis to split, or None to replicate.
    """
    if mesh is None:
        return tree
    names = () if axis is None else (None,) * axis + (mesh.axis_names[0],)
    sharding = NamedSharding(mesh, PartitionSpec(*names))

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.core.Tracer):
            return jax.lax.with_sharding_constraint(leaf, sharding)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def gather(value: Any, mesh: Mesh | None) -> Array:
    """A replicated array as an ordinary one on this process's default device."""
    if mesh is None or isinstance(value, jax.core.Tracer):
        return jnp.asarray(value)
    return jnp.asarray(np.asarray(value))


def is_global(mesh: Mesh | None) -> bool:
    """Whether devices of other processes belong to the mesh."""
    if mesh is None:
        return False
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def agree(*numbers: int) -> tuple[int, ...]:
    """Process 0's numbers, in every process; what a process read off its own clock may differ.

    Args:
      *numbers: whole numbers; every process calls this at the same place.
    """
    if jax.process_count() == 1:
        return numbers
    return tuple(multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.int32)).tolist())


def wait_for_all(name: str) -> None:
    """Returns when every process has come here.

    Args:
      name: of the place.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def padded(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def initialize(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a run; call it before anything else touches jax.

    Args:
      coordinator: "host:port" of process 0, or None for a run of one process.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: a coordinator without the numbers, or numbers that do not fit.
    """
    if coordinator is None:
        if num_processes not in (None, 1) or process_id not in (None, 0):
            raise ValueError("parallel.initialize: several processes need a coordinator, got none.")
        return
    if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise ValueError(
            "parallel.initialize: need 0 <= process_id < num_processes, got "
            f"process_id={process_id} and num_processes={num_processes}."
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)


def is_main_process() -> bool:
    """Whether this process writes the files and prints."""
    return jax.process_index() == 0
