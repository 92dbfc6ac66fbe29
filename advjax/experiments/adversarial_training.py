"""Adversarial training: networks trained with several losses, and what attacks do to each.

A cell is (defence, attack) and gives one row, an error. Attacks whose name ends in `_black_box`
make their images on a surrogate that no defence has seen. Keys are derived from names, so order and
interruption never change a number; the trained networks stay under checkpoints/.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from advjax import attacks, defenses, evaluation, models, training
from advjax.core import checks, losses, metrics, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, LogitsFn, TrainingLoss
from advjax.experiments import grids, networks
from advjax.experiments.defence_networks import (
    BATCH,
    Trainer,
    TrainingConfig,
    attacked,
    trainer,
)
from advjax.experiments.runs import Run

KEY_COLUMNS = ("defence", "attack")
# What the lecture calls them, where it does.
DEFENCES = {
    "none": "A",
    "fgsm": "A_adv",
    "ensemble": "A_adv-ens",
    "pgd": "A_pgd",
    "least_likely": "A_ll",
    "trades": "A_trades",
    "entropy": "A_entropy",
    "entropy_least_likely": "A_entropy-ll",
}
ATTACKS = {
    "clean": "Clean",
    "fgsm": "FGSM",
    "rand_fgsm": "RAND+FGSM",
    "pgd": "PGD",
    "fgsm_black_box": "FGSM_B",
    "bim_black_box": "I-FGSM_B",
    "rand_fgsm_black_box": "RAND+FGSM_B",
    "cw_black_box": "CW_B",
    "auto_attack": "AutoAttack",
}


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """A study of adversarial training.

    Attributes:
      defences: names from `DEFENCES`.
      attacks: names from `ATTACKS`.
      epsilon: radius in linf, of the attacks in training and in the test.
      alpha: share of the clean loss in "fgsm" and "ensemble".
      pgd_alpha: the same in "pgd"; 0 is Madry et al. A share lets a short training leave chance.
      pgd_warmup: share of the training of "pgd" in which its radius grows from 0.
      train_num_steps: steps of the attack in "pgd" and "trades".
      train_step_size: their length.
      trades_beta: weight of the divergence in "trades".
      entropy_weight: of the entropy in "entropy" and "entropy_least_likely"; a positive one asks
        for sure answers.
      sources: names for `models.make`, the static networks of "ensemble".
      surrogate: name for `models.make`, the network that black-box attacks are made on.
      num_steps: steps of the attacks pgd, bim and cw in the test.
      num_auto_examples: test images for AutoAttack, at most.
      num_auto_steps: its steps of APGD and FAB.
      num_queries: its queries of Square.
    """

    defences: tuple[str, ...] = ("none", "fgsm", "ensemble")
    attacks: tuple[str, ...] = tuple(ATTACKS)
    epsilon: float = 0.3
    alpha: float = 0.5
    pgd_alpha: float = 0.0
    pgd_warmup: float = 0.0
    train_num_steps: int = 10
    train_step_size: float = 0.075
    trades_beta: float = 1.0
    entropy_weight: float = 1.0
    sources: tuple[str, ...] = ("cnn", "mlp")
    surrogate: str = "cnn"
    num_steps: int = 40
    num_auto_examples: int = 128
    num_auto_steps: int = 100
    num_queries: int = 5000

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        study = "adversarial_training"
        self.check_training(study)
        for kind, names, known in (
            ("defence", self.defences, DEFENCES),
            ("attack", self.attacks, ATTACKS),
        ):
            if not names:
                raise ValueError(f"{study}: need at least one {kind}, got none.")
            for name in names:
                checks.known(study, kind, name, known)
        for name in (*self.sources, self.surrogate):
            checks.known(study, "model", name, models.NAMES)
        if "ensemble" in self.defences and not self.sources:
            raise ValueError(f"{study}: the defence ensemble needs at least one source, got none.")
        for name in ("alpha", "pgd_alpha", "pgd_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{study}: need 0 <= {name} <= 1, got {name}={getattr(self, name)}."
                )
        for name in ("epsilon", "train_step_size", "trades_beta"):
            checks.non_negative(study, name, getattr(self, name))
        if not math.isfinite(self.entropy_weight):  # of either sign
            raise ValueError(
                f"{study}: need a finite entropy_weight, got entropy_weight={self.entropy_weight}."
            )
        for name, least in (
            ("train_num_steps", 1), ("num_steps", 1), ("num_auto_examples", 1),
            ("num_auto_steps", 1), ("num_queries", 2),
        ):  # fmt: skip
            checks.at_least(study, name, getattr(self, name), least)


def smaller(config: Config) -> Config:
    """The same on the digits with small networks, in seconds."""
    return dataclasses.replace(
        config, dataset="digits", model="mlp", sources=("mlp",), surrogate="mlp", epsilon=0.1,
        # What AutoAttack costs here is compiling its four parts.
        attacks=tuple(name for name in config.attacks if name != "auto_attack") or config.attacks,
        train_num_steps=2, train_step_size=0.06, num_steps=3, num_examples=200,
        num_auto_examples=8, num_auto_steps=3, num_queries=20, num_train=0, num_epochs=8,
        batch_size=64, learning_rate=3e-3,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      grid: errors in percent, defences x attacks.
    """

    run: Run
    grid: grids.Grid


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Runs what is missing of a study and writes its table and figure.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one, a network whose logits are not
        finite.
    """
    opened = networks.open_study(
        config, workdir, study="adversarial_training", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run = opened.run
    train = trainer(config, run, data_dir)
    surrogate = functools.partial(train, config.surrogate, "surrogate", training.cross_entropy)
    examiner = _Examiner(config, opened.x, opened.y, surrogate)
    for defence in config.defences:
        missing = [name for name in config.attacks if not run.is_done([(defence, name)])]
        if not missing:
            continue
        logits_fn = train(config.model, defence, training_loss(config, defence, train))
        networks.clean_accuracy(opened.study, defence, logits_fn, opened.x, opened.y)
        for name in missing:
            with run.timed(f"attack {name}"):
                row = examiner.row(name, logits_fn)
            run.append(
                [{"dataset": config.dataset, "model": config.model, "seed": config.seed,
                  "defence": defence, **row}]
            )  # fmt: skip
    study = Study(run, table(config, run.rows))
    grids.write(run, "table", study.grid)
    run.finish(config.seed)
    _draw(study)
    return study


def training_loss(config: Config, defence: str, train: Trainer) -> TrainingLoss:
    """The loss of a defence; for "ensemble" its static networks are trained first.

    Args:
      config: the study.
      defence: a name from `DEFENCES`.
      train: gives networks.
    """
    part, epsilon = functools.partial, config.epsilon
    steps: dict[str, Any] = {
        "num_steps": config.train_num_steps, "step_size": config.train_step_size
    }  # fmt: skip
    least_likely = part(defenses.least_likely, epsilon=epsilon)
    entropy = part(defenses.entropy_regularised, weight=config.entropy_weight)
    if defence == "ensemble":
        sources = tuple(
            train(model, f"source_{number}_{model}", training.cross_entropy)
            for number, model in enumerate(config.sources)
        )
        return part(
            defenses.ensemble_adversarial, epsilon=epsilon, alpha=config.alpha, sources=sources
        )
    return {
        "none": training.cross_entropy,
        "fgsm": part(defenses.adversarial, epsilon=epsilon, alpha=config.alpha),
        "pgd": part(
            defenses.adversarial,
            epsilon=epsilon,
            alpha=config.pgd_alpha,
            warmup=config.pgd_warmup,
            attack=part(attacks.pgd, **steps),
        ),
        "least_likely": least_likely,
        "trades": part(defenses.trades, epsilon=epsilon, beta=config.trades_beta, **steps),
        "entropy": entropy,
        "entropy_least_likely": part(entropy, base_loss=least_likely),
    }[defence]


def catalogue(config: Config) -> dict[str, Attack]:
    """The attacks by gradient of the study, by name; those of black boxes without their suffix."""
    steps = {"num_steps": config.num_steps}
    return {
        "fgsm": attacks.fgsm,
        "rand_fgsm": attacks.rand_fgsm,
        "pgd": functools.partial(attacks.pgd, **steps),
        "bim": functools.partial(attacks.bim, **steps),
        # Carlini and Wagner's loss, the margin, ascended in the ball: with a budget in place of the
        # smallest distance, as the lecture's table has it.
        "cw": functools.partial(attacks.pgd, loss_fn=losses.margin, random_start=False, **steps),
    }


class _Examiner:
    """Attacks networks; what is made on the surrogate is made once for all of them."""

    def __init__(self, config: Config, x: Array, y: Array, surrogate: Callable[[], LogitsFn]):
        self._config, self._x, self._y, self._surrogate = config, x, y, surrogate
        self._catalogue = catalogue(config)
        self._black_box: dict[str, Array] = {}

    def row(self, name: str, logits_fn: LogitsFn) -> dict[str, Any]:
        """The error of a network under an attack, and on how many images."""
        num_auto = self._config.num_auto_examples
        y = self._y[:num_auto] if name == "auto_attack" else self._y
        logits = evaluation.predict(logits_fn, self._images(name, logits_fn), batch_size=BATCH)
        return {
            "attack": name,
            "epsilon": 0.0 if name == "clean" else self._config.epsilon,
            "num_examples": len(y),
            "error": float(np.mean(~np.asarray(metrics.is_correct(logits, y)))),
        }

    def _images(self, name: str, logits_fn: LogitsFn) -> Array:
        if name == "clean":
            return self._x
        if name == "auto_attack":
            return attacks.auto_attack(
                self._key(name), logits_fn, self._x[: self._config.num_auto_examples],
                self._y[: self._config.num_auto_examples], self._config.epsilon,
                num_steps=self._config.num_auto_steps, num_queries=self._config.num_queries,
            )  # fmt: skip
        crafted = functools.partial(
            attacked, self._catalogue[name.removesuffix("_black_box")], self._key(name),
            x=self._x, y=self._y, epsilon=self._config.epsilon,
        )  # fmt: skip
        if not name.endswith("_black_box"):
            return crafted(logits_fn)
        if name not in self._black_box:
            self._black_box[name] = crafted(self._surrogate())
        return self._black_box[name]

    def _key(self, name: str):
        return random.named(jax.random.key(self._config.seed), name)


def table(config: Config, rows: Sequence[Mapping[str, Any]]) -> grids.Grid:
    """Errors in percent, defences x attacks.

    Args:
      config: the study.
      rows: its rows.
    """
    most = max(row["num_examples"] for row in rows)
    columns = {name: ATTACKS[name] for name in config.attacks}
    for row in rows:
        if row["num_examples"] < most:
            columns[row["attack"]] = f"{ATTACKS[row['attack']]} ({row['num_examples']} images)"
    values = {(label(row["defence"]), columns[row["attack"]]): [100 * row["error"]] for row in rows}
    return grids.Grid(
        f"Errors in %, epsilon {config.epsilon:g}: {config.dataset}, {config.model}, "
        f"{most} images",
        "defence",
        [label(name) for name in config.defences],
        list(columns.values()),
        values,
    )  # fmt: skip


def label(defence: str) -> str:
    """A defence as the lecture calls it, and its name."""
    return f"{DEFENCES[defence]} ({defence})"


def _draw(study: Study) -> None:
    from advjax.experiments import defence_figures  # matplotlib is slow to import

    study.run.figure(
        "errors.png",
        lambda path: defence_figures.grouped_bars(study.grid, ylabel="error in %", path=path),
    )


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints the table, what FGSM training did to FGSM's error, and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    console.print(grids.to_rich(study.grid, console.width))
    console.print("_B: made on a surrogate of its own training, which no defence has seen.")
    error = {row["defence"]: row["error"] for row in study.run.rows if row["attack"] == "fgsm"}
    if {"none", "fgsm"} <= set(error):
        fold = error["none"] / error["fgsm"] if error["fgsm"] else float("inf")
        console.print(
            f"FGSM training: error under FGSM {error['none']:.1%} -> {error['fgsm']:.1%}, "
            f"{fold:.1f} times less  [dim](published, other networks, epsilon 0.25: 89.4% -> "
            "17.9%)[/dim]"
        )
    console.print(f"Files: {study.run.workdir}/ (results.csv, table.md, figures/, checkpoints/)")
