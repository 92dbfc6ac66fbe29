"""Search for cells that withstand FGSM, and what goes with being robust.

A cell of the study is a child network: an experiment (what the children are trained on), a
controller and a number. A round of children is written at once; a search that is interrupted goes
on with the next round and proposes what it would have proposed.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from advjax import data, universality
from advjax.core import checks, parallel, random
from advjax.core.io import PathLike
from advjax.experiments.entropy import BASES, base_loss
from advjax.experiments.runs import Run
from advjax.universality import cells, searches

KEY_COLUMNS = ("experiment", "controller", "child")


@dataclasses.dataclass(frozen=True)
class Config:
    """A study of architecture search.

    Attributes:
      dataset: name for `data.load`.
      experiments: what the children are trained on, of `entropy.BASES`: step l.l. is the paper's
        Experiment 1, PGD its Experiment 2.
      controllers: of `universality.architecture_search`, a search each.
      num_rounds: of each search.
      num_children: a round.
      epsilon: of the training and of the reward.
      num_train: training images of a child; 0 for all but the validation images.
      num_validation: images for the reward, the last of the training split.
      num_epochs: training epochs of a child.
      batch_size: training images a step.
      learning_rate: of Adam.
      method: "map" or "vmap", see `universality.architecture_search`.
      seed: of everything.
    """

    dataset: str = "digits"
    experiments: tuple[str, ...] = ("step_ll", "pgd")
    controllers: tuple[str, ...] = ("evolution", "reinforce", "random")
    num_rounds: int = 10
    num_children: int = 16
    epsilon: float = 0.1
    num_train: int = 0
    num_validation: int = 400
    num_epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 3e-3
    method: str = "map"
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        for kind, names, known in (
            ("data set", (self.dataset,), data.NAMES),
            ("experiment", self.experiments, BASES),
            ("controller", self.controllers, searches.CONTROLLERS),
            ("method", (self.method,), ("map", "vmap")),
        ):
            if not names:
                raise ValueError(f"architecture_search: need at least one {kind}, got none.")
            for name in names:
                checks.known("architecture_search", kind, name, known)
        for name in ("num_rounds", "num_children", "num_validation", "num_epochs", "batch_size"):
            checks.at_least("architecture_search", name, getattr(self, name), 1)
        checks.at_least("architecture_search", "num_train", self.num_train, 0)
        for name in ("epsilon", "learning_rate"):
            checks.non_negative("architecture_search", name, getattr(self, name))


def smaller(config: Config) -> Config:
    """The same on the digits, in seconds."""
    return dataclasses.replace(
        config, dataset="digits", experiments=("clean",),
        controllers=config.controllers[:1], num_rounds=2, num_children=4, num_train=300,
        num_validation=100, num_epochs=2,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
    """

    run: Run


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Runs what is missing of a study and writes its table and figures.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one, fewer images than are asked for.
    """
    config.check()
    everything = data.load(config.dataset, "train", data_dir=data_dir)
    num_left = len(everything) - config.num_validation
    if not max(config.num_train, 1) <= num_left:
        raise ValueError(
            f"architecture_search: need num_train + num_validation <= {len(everything)}, got "
            f"num_train={config.num_train} and num_validation={config.num_validation}."
        )
    validation = dataclasses.replace(
        everything, images=everything.images[num_left:], labels=everything.labels[num_left:]
    )
    train = everything.take(config.num_train or num_left)
    run = Run(workdir, config, study="architecture_search", key_columns=KEY_COLUMNS)
    optimizer = optax.adam(config.learning_rate)
    searched = [(e, c) for e in config.experiments for c in config.controllers]
    with tqdm(
        total=len(searched) * config.num_rounds * config.num_children, initial=len(run.rows),
        unit="child", disable=not parallel.is_main_process(),
    ) as bar:  # fmt: skip
        for experiment, controller in searched:
            history = search_of(run.rows, experiment, controller)
            first = len(history.choices) // config.num_children
            for number in range(first, config.num_rounds):
                with run.timed(f"{experiment}, {controller}"):
                    history = universality.architecture_search(
                        random.named(jax.random.key(config.seed), f"{experiment}, {controller}"),
                        train, validation,
                        epsilon=config.epsilon, loss_fn=base_loss(experiment, config.epsilon),
                        controller=controller, num_rounds=number + 1,
                        num_children=config.num_children, optimizer=optimizer,
                        num_epochs=config.num_epochs, batch_size=config.batch_size,
                        method=config.method, history=history,
                    )  # fmt: skip
                _append(config, run, experiment, controller, history)
                bar.update(config.num_children)
    run.finish(config.seed)
    run.table("correlations.csv", correlation_rows(run.rows))
    run.figure("children.png", functools.partial(draw_children, run.rows))
    run.figure("rounds.png", functools.partial(draw_rounds, run.rows, config.num_children))
    return Study(run)


def _append(config: Config, run: Run, experiment: str, controller: str, history) -> None:
    names = [*cells.CHOICES]
    run.append(
        {
            "dataset": config.dataset,
            "experiment": experiment,
            "controller": controller,
            "child": child,
            "choices": choices.tolist(),
            **{n: cells.CHOICES[n][i] for n, i in zip(names, choices.tolist(), strict=True)},
            "adversarial_accuracy": float(history.adversarial_accuracy[child]),
            "clean_accuracy": float(history.clean_accuracy[child]),
            "num_parameters": int(history.num_parameters[child]),
        }
        for child, choices in enumerate(history.choices)
    )


def search_of(
    rows: Sequence[Mapping[str, Any]], experiment: str, controller: str | None
) -> universality.Search:
    """The children of one search, or with controller None of all searches of an experiment.

    Args:
      rows: of the study.
      experiment: which.
      controller: which.
    """
    mine = [
        row
        for row in rows
        if row["experiment"] == experiment and controller in (None, row["controller"])
    ]
    choices = np.array([row["choices"] for row in mine], np.int32)
    return universality.Search(
        choices.reshape(len(mine), len(cells.SIZES)),
        np.array([row["adversarial_accuracy"] for row in mine], np.float32),
        np.array([row["clean_accuracy"] for row in mine], np.float32),
        np.array([row["num_parameters"] for row in mine], np.int64),
    )


def correlation_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Correlations of each experiment: over all its children, and controller by controller.

    Args:
      rows: of the study.
    """
    result = []
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        controllers = dict.fromkeys(
            row["controller"] for row in rows if row["experiment"] == experiment
        )
        for controller in (None, *controllers):
            search = search_of(rows, experiment, controller)
            result.append(
                {
                    "experiment": experiment,
                    "controller": controller or "all",
                    "children": len(search.choices),
                    **universality.correlations(search)._asdict(),
                    "best_adversarial_accuracy": float(search.adversarial_accuracy.max()),
                    "median_adversarial_accuracy": float(np.median(search.adversarial_accuracy)),
                    "best_choices": search.choices[search.best].tolist(),
                }
            )
    return result


def draw_children(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Adversarial accuracy against clean accuracy and against parameters, each child a point.

    Args:
      rows: of the study.
      path: where to.
    """
    from advjax.experiments import figures  # matplotlib is slow to import

    panels: dict[str, dict[str, Any]] = {}
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        for column in ("clean_accuracy", "num_parameters"):
            panel = panels.setdefault(f"{experiment}: against {column}", {})
            for controller in dict.fromkeys(row["controller"] for row in rows):
                search = search_of(rows, experiment, controller)
                panel[controller] = (getattr(search, column), search.adversarial_accuracy)
    figures.curve_panels(
        panels, xlabel="", ylabel="adversarial accuracy", points=searches.CONTROLLERS, path=path
    )


def draw_rounds(rows: Sequence[Mapping[str, Any]], num_children: int, path: pathlib.Path) -> None:
    """Mean reward of each round, a curve a controller.

    Args:
      rows: of the study.
      num_children: a round.
      path: where to.
    """
    from advjax.experiments import figures

    panels: dict[str, dict[str, Any]] = {}
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        for controller in dict.fromkeys(row["controller"] for row in rows):
            rewards = search_of(rows, experiment, controller).adversarial_accuracy
            means = rewards.reshape(-1, num_children).mean(1)
            panels.setdefault(experiment, {})[controller] = (np.arange(len(means)) + 1, means)
    figures.curve_panels(panels, xlabel="round", ylabel="mean adversarial accuracy", path=path)


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints one line a search and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    table = Table(
        title=f"Architecture search: {config.dataset}, FGSM at {config.epsilon:g}",
        caption="Correlation of the adversarial accuracy, Pearson's and by rank.",
    )
    for name in ("experiment", "controller", "children", "median", "best", "clean", "parameters"):
        table.add_column(name, justify="left" if name in ("experiment", "controller") else "right")
    for row in correlation_rows(study.run.rows):
        table.add_row(
            row["experiment"], row["controller"], str(row["children"]),
            f"{row['median_adversarial_accuracy']:.1%}", f"{row['best_adversarial_accuracy']:.1%}",
            f"{row['with_clean']:.2f}, {row['with_clean_by_rank']:.2f}",
            f"{row['with_parameters']:.2f}, {row['with_parameters_by_rank']:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"Files: {study.run.workdir}/ (results.csv, correlations.csv, figures/)")
