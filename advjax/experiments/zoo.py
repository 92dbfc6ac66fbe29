"""Zoos in folders: every model saved as soon as it is trained, a manifest, and a reader.

`backdoor.train_zoo` trains and touches no file; its store is the `Folder` here. A folder holds
config.json, results.jsonl and results.csv (one row a model), manifest.json, models/NAME/ (orbax)
and, while a group is being trained, checkpoints/.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from advjax import backdoor, data
from advjax.core import io, parallel
from advjax.core.io import PathLike
from advjax.experiments.runs import Run
from advjax.training.checkpoints import Checkpoints

STUDY = "backdoor_zoo"
KEY_COLUMNS = ("name",)


class Folder:
    """A `backdoor.Store` in a run folder.

    A row of results.jsonl is written after its model is on disk, so a row means a complete model.
    """

    def __init__(self, run: Run, module: nn.Module, image_shape: tuple[int, int, int]):
        """Finds out which models are there.

        Args:
          run: the run folder.
          module: the architecture of all models.
          image_shape: of the images that it was made for.
        """
        self._run = run
        shapes = jax.eval_shape(
            module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), "f4")
        )
        self._like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dict(shapes))
        self.members = {row["name"]: _member(row) for row in run.rows}

    def _checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self._run.workdir / "models" / name, {"model": name}, caller="zoo")

    def save(self, member: backdoor.Member, variables: Mapping[str, Any]) -> None:
        """Writes the weights, then the row."""
        # What a killed run left without its row may be of other weights, by a rounding.
        if parallel.is_main_process():
            shutil.rmtree(self._run.workdir / "models" / member.name, ignore_errors=True)
        parallel.wait_for_all(f"{member.name} may be written")
        self._checkpoints(member.name).save(0, dict(variables))
        self._run.append([member._asdict()])
        self.members[member.name] = member

    def read(self, name: str) -> Mapping[str, Any]:
        """The variables of a model.

        Raises:
          ValueError: its files are missing or damaged.
        """
        variables = None
        if (self._run.workdir / "models" / name).is_dir():
            variables = self._checkpoints(name).restore(self._like)
        if variables is None:
            raise ValueError(f"zoo: the weights of {name} are missing in {self._run.workdir}.")
        return variables

    def checkpoint_dir(self, group: backdoor.Group) -> pathlib.Path:
        """Where the group keeps its checkpoints while it is trained."""
        return self._run.workdir / "checkpoints" / group.names[0]

    def finished(self, group: backdoor.Group) -> None:
        """Deletes the group's checkpoints."""
        if parallel.is_main_process():
            shutil.rmtree(self.checkpoint_dir(group), ignore_errors=True)


def _member(row: Mapping[str, Any]) -> backdoor.Member:
    values: dict[str, Any] = {**row, "label_map": tuple(row["label_map"])}
    return backdoor.Member(**values)


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      zoo: all models, those that failed too.
      table: one row a model: what is known of it, whether it counts, and why not.
      summary: one row an attack, and one for the clean models.
    """

    run: Run
    zoo: backdoor.Zoo
    table: list[dict[str, Any]]
    summary: list[dict[str, Any]]


def options_on_digits(config: Any, attacks: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The options of some attacks in a smoke run: those of other images may not suit the digits."""
    kept = attacks if config.dataset == "digits" else ()
    return {attack: config.options[attack] for attack in kept if attack in config.options}


def smaller(config: backdoor.ZooConfig) -> backdoor.ZooConfig:
    """A tiny zoo on the digits, in seconds."""
    attacks = config.attacks[:2]
    options = options_on_digits(config, attacks)
    return dataclasses.replace(
        config, dataset="digits", model="mlp", model_options={}, mean=(0.0,), std=(1.0,),
        num_clean=2, num_infected=2, attacks=attacks, options=options, num_train=0,
        num_examples=0, num_epochs=8, batch_size=32, optimizer="adam", learning_rate=3e-3,
        augment="none", method="map", group_size=2, num_sources=min(config.num_sources, 3),
        min_accuracy=0.8,
    )  # fmt: skip


def run_study(
    config: backdoor.ZooConfig,
    workdir: PathLike,
    *,
    data_dir: PathLike | None = None,
    mesh: Mesh | None = None,
) -> Study:
    """Trains what is missing of a zoo and writes its tables and its manifest.

    Args:
      config: the zoo.
      workdir: the folder.
      data_dir: prepared tfds data.
      mesh: devices, see `backdoor.train_zoo`.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one.
    """
    config.check()
    for split in ("train", "test"):  # without data there is nothing to do and no folder to write
        data.load(config.dataset, split, data_dir=data_dir)
    run = Run(workdir, config, study=STUDY, key_columns=KEY_COLUMNS)
    store = Folder(run, backdoor.make_network(config), data.info(config.dataset).image_shape)
    with run.timed("zoo"):
        zoo = backdoor.train_zoo(config, store=store, data_dir=data_dir, mesh=mesh)
    table, summary = judged(config, zoo)
    run.table("models.csv", table)
    run.table("summary.csv", summary)
    run.finish(
        config.seed,
        models=len(table),
        failed=sum(not row["counts"] for row in table),
        kinds=summary,
        failures={row["name"]: row["why"] for row in table if row["why"]},
    )
    return Study(run, zoo, table, summary)


def judged(
    config: backdoor.ZooConfig, zoo: backdoor.Zoo
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row a model, with its verdict, and one row a kind.

    Args:
      config: the bounds, see `backdoor.verdicts`.
      zoo: models.
    """
    failures = backdoor.verdicts(config, zoo.members)
    table: list[dict[str, Any]] = [
        {**m._asdict(), "counts": not failures[m.name], "why": failures[m.name]}
        for m in zoo.members
    ]

    def mean(rows, name):
        values = [row[name] for row in rows if row[name] is not None]
        return float(np.mean(values)) if values else None

    summary = []
    for kind in dict.fromkeys(zoo.attacks):
        mine = [row for row in table if row["attack"] == kind]
        successes = [row["success"] for row in mine if row["success"] is not None]
        summary.append(
            {
                "attack": kind,
                "models": len(mine),
                "failed": sum(not row["counts"] for row in mine),
                "accuracy": mean(mine, "accuracy"),
                "least_accuracy": min(row["accuracy"] for row in mine),
                "success": mean(mine, "success"),
                "least_success": min(successes, default=None),
                "robust_accuracy": mean(mine, "robust_accuracy"),
                "seconds_a_model": round(float(np.mean([row["seconds"] for row in mine])), 2),
            }
        )
    return table, summary


def read_config(folder: PathLike) -> backdoor.ZooConfig:
    """The configuration of a zoo in a folder.

    Args:
      folder: the --workdir of launch/backdoor_zoo.py.

    Raises:
      ValueError: no zoo there.
    """
    folder = pathlib.Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"load_zoo: {folder} holds no zoo; launch/backdoor_zoo.py makes one.")
    record = io.read_json(folder / "config.json")
    if not isinstance(record, dict) or record.pop("study", None) != STUDY:
        raise ValueError(f"load_zoo: {folder} is the folder of another study.")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    fields = dataclasses.fields(backdoor.ZooConfig)
    values = {f.name: f.metadata["before"] for f in fields if "before" in f.metadata} | values
    known = {field.name for field in fields}
    for name in values:
        if name not in known:
            raise ValueError(
                f"load_zoo: {folder} is the zoo of another version of advjax: this one has no "
                f"setting {name!r}."
            )
    return backdoor.ZooConfig(**values)


def load_zoo(folder: PathLike, *, with_failed: bool = False) -> backdoor.Zoo:
    """Opens a zoo for a detection study.

    Args:
      folder: the --workdir of launch/backdoor_zoo.py.
      with_failed: also the models that do not count.

    Returns:
      A `backdoor.Zoo`: `zoo.labels` (1 infected, 0 clean), `zoo.targets`, `zoo.attacks`,
      `zoo.classifiers()`, `zoo.stack()`; weights are read when they are asked for.

    Raises:
      ValueError: no zoo there, or one that is not complete.
    """
    folder = pathlib.Path(folder).expanduser()
    config = read_config(folder)
    run = Run(folder, config, study=STUDY, key_columns=KEY_COLUMNS)
    module = backdoor.make_network(config)
    store = Folder(run, module, data.info(config.dataset).image_shape)
    names = [name for group in config.groups for name in group.names]
    num_missing = sum(name not in store.members for name in names)
    if num_missing:
        raise ValueError(
            f"load_zoo: {num_missing} of {len(names)} models are missing in {folder}; run its "
            "launcher again, it goes on."
        )
    zoo = backdoor.Zoo(module, tuple(store.members[name] for name in names), store)
    return zoo if with_failed else zoo.counted(config)


def print_study(study: Study, config: backdoor.ZooConfig, console: Console | None = None) -> None:
    """Prints one line an attack, how many models failed, and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    table = Table(title=f"Zoo of {config.model} on {config.dataset}")
    table.add_column("models", no_wrap=True)
    for name in ("failed", "accuracy", "lowest", "success", "lowest", "robust", "seconds"):
        table.add_column(name, justify="right", overflow="fold")

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    for row in study.summary:
        table.add_row(
            f"{row['models']} {row['attack']}", str(row["failed"]), percent(row["accuracy"]),
            percent(row["least_accuracy"]), percent(row["success"]), percent(row["least_success"]),
            percent(row["robust_accuracy"]), f"{row['seconds_a_model']:.1f}",
        )  # fmt: skip
    console.print(table)
    failed = [row for row in study.table if row["why"]]
    console.print(
        f"{len(failed)} of {len(study.table)} models do not count."
        + (f" The first: {failed[0]['name']}, {failed[0]['why']}." if failed else "")
    )
    console.print(f"Files: {study.run.workdir}/ (models.csv, summary.csv, manifest.json, models/)")
