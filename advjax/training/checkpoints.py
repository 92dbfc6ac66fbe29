"""Checkpoints of a training run: orbax folders `step_N`, and what the run was in `run.json`."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core import io


class Checkpoints:
    """The checkpoints of one run; only the latest is kept.

    A folder of orbax is moved to its name when it is complete, so a killed run leaves the one
    before.
    """

    def __init__(self, directory: io.PathLike, description: dict[str, Any], *, caller: str):
        """Opens the folder.

        Args:
          directory: where the checkpoints are; made if missing.
          description: what the run is, JSON values.
          caller: the function that the messages name.

        Raises:
          ValueError: the folder holds the checkpoints of another run.
        """
        import orbax.checkpoint as ocp  # slow to import, and only needed here

        self._caller = caller
        self._directory = pathlib.Path(directory).absolute()
        self._checkpointer = ocp.StandardCheckpointer()
        record = self._directory / "run.json"
        if record.exists():
            self._check_same(io.read_json(record), description)
        elif self._steps():
            raise ValueError(
                f"{self._caller}: {self._directory} holds checkpoints without their run.json; "
                "use another checkpoint_dir."
            )
        elif jax.process_index() == 0:
            io.write_json(record, description)

    def _check_same(self, theirs: Any, ours: dict[str, Any]) -> None:
        theirs = theirs if isinstance(theirs, dict) else {}
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{self._caller}: the checkpoints in {self._directory} belong to another run: "
                    f"{name} was {_shorten(theirs.get(name))} and is now {_shorten(value)}; "
                    "use another checkpoint_dir."
                )

    def _steps(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted(int(n[5:]) for n in names if n.startswith("step_") and n[5:].isdecimal())

    def restore(self, like: Any) -> Any | None:
        """The latest state, or None if there is none.

        Args:
          like: a state of the same structure and shapes.

        Raises:
          ValueError: the checkpoint cannot be read.
        """
        steps = self._steps()
        if not steps:
            return None
        path = self._directory / f"step_{steps[-1]}"
        try:
            restored = self._checkpointer.restore(path, jax.tree.map(_on_host, like))
        except Exception as error:  # orbax raises many kinds; all mean that it cannot be used
            raise ValueError(
                f"{self._caller}: the checkpoint {path} cannot be read ({type(error).__name__}); "
                "delete it to start anew."
            ) from error
        return jax.tree.map(_like, restored, like)

    def save(self, step: int, state: Any) -> None:
        """Saves the state, waits until it is on disk, and deletes older ones."""
        older = self._steps()
        if step in older:
            return
        # Host arrays: where several processes train the same network, orbax writes the first's.
        state = jax.tree.map(_on_host, state)
        self._checkpointer.save(self._directory / f"step_{step}", state)
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            for old in older:
                shutil.rmtree(self._directory / f"step_{old}", ignore_errors=True)


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _on_host(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _like(value: np.ndarray, leaf: jax.Array) -> jax.Array:
    restored = jax.random.wrap_key_data(jnp.asarray(value)) if _is_key(leaf) else value
    return jax.device_put(restored, leaf.sharding)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
