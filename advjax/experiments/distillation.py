"""Defensive distillation: what attacks do to a distilled network, and where its gradient went.

A cell is (network, attack) and gives one row. The networks are "standard", trained as usual, and
"distilled": a teacher trained at temperature T, a student trained at T on the teacher's answers,
used at T = 1. Keys are derived from names, so order and interruption never change a number.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from rich.console import Console
from rich.table import Table

from advjax import attacks, defenses, evaluation, training
from advjax.core import balls, checks, classifier, io, losses, metrics, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, AttackLoss, Key, LogitsFn
from advjax.experiments import grids, networks
from advjax.experiments.defence_networks import (
    BATCH,
    Trainer,
    TrainingConfig,
    attacked,
    trainer,
)
from advjax.experiments.runs import Run

KEY_COLUMNS = ("network", "attack")
NETWORKS = ("standard", "distilled")
ATTACKS = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "fgsm_scaled": "FGSM, logits / T",
    "pgd_scaled": "PGD, logits / T",
    "pgd_margin": "PGD, margin",
    "carlini_wagner_l2": "CW-L2",
}
GRADIENTS = {"cross_entropy": losses.cross_entropy, "margin": losses.margin}


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """A study of defensive distillation.

    Attributes:
      temperature: T, of the teacher's and of the student's training.
      attacks: names from `ATTACKS`.
      epsilon: radius of the fixed-budget attacks, in linf.
      num_steps: steps of PGD.
      num_cw_examples: test images for Carlini and Wagner's attack, at most.
      cw_num_steps: its steps.
      cw_num_search_steps: its search steps for the constant.
      cw_learning_rate: its step of Adam.
    """

    temperature: float = 100.0
    attacks: tuple[str, ...] = tuple(ATTACKS)
    epsilon: float = 0.3
    num_steps: int = 40
    num_cw_examples: int = 128
    cw_num_steps: int = 200
    cw_num_search_steps: int = 6
    cw_learning_rate: float = 0.1

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_training("distillation")
        if not self.attacks:
            raise ValueError("distillation: need at least one attack, got none.")
        for name in self.attacks:
            checks.known("distillation", "attack", name, ATTACKS)
        if not 0 < self.temperature < np.inf:
            raise ValueError(
                f"distillation: need a finite temperature > 0, got temperature={self.temperature}."
            )
        for name in ("epsilon", "cw_learning_rate"):
            checks.non_negative("distillation", name, getattr(self, name))
        for name in ("num_steps", "num_cw_examples", "cw_num_steps", "cw_num_search_steps"):
            checks.at_least("distillation", name, getattr(self, name), 1)


def smaller(config: Config) -> Config:
    """The same on the digits, in seconds."""
    return dataclasses.replace(
        config, dataset="digits", model="mlp", num_train=0, num_examples=200, num_epochs=10,
        batch_size=32, learning_rate=3e-3, num_steps=5, num_cw_examples=16, cw_num_steps=30,
        cw_num_search_steps=3,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      gradients: norms of the gradients at the clean images by loss and network, f32[n] each.
    """

    run: Run
    gradients: Mapping[str, Mapping[str, Array]]


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Runs what is missing of a study and writes its table and figures.

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
        config, workdir, study="distillation", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, entries = opened.run, catalogue(config)
    train = trainer(config, run, data_dir)
    path = run.workdir / "gradients.npz"
    for network in NETWORKS:
        missing = [name for name in config.attacks if not run.is_done([(network, name)])]
        if not missing:
            continue
        logits_fn = trained(config, network, train)
        clean = networks.clean_accuracy(opened.study, network, logits_fn, opened.x, opened.y)
        for name in missing:
            key = random.named(jax.random.key(config.seed), name)
            with run.timed(f"attack {name}"):
                row = _measure(config, key, name, entries[name], logits_fn, opened.x, opened.y)
            run.append(
                [{"dataset": config.dataset, "model": config.model, "seed": config.seed,
                  "temperature": config.temperature, "network": network,
                  "clean_accuracy": clean, **row}]
            )  # fmt: skip
    if not path.exists():
        norms = [
            [gradient_norms(loss_fn, trained(config, network, train), opened.x, opened.y)
             for network in NETWORKS]
            for loss_fn in GRADIENTS.values()
        ]  # fmt: skip
        if parallel.is_main_process():
            with io.atomic_write(path) as temporary, temporary.open("wb") as file:
                np.savez(file, norms=np.array(norms))
    with np.load(path) as file:
        gradients = {
            loss: dict(zip(NETWORKS, norms, strict=True))
            for loss, norms in zip(GRADIENTS, file["norms"], strict=True)
        }
    run.finish(config.seed)
    study = Study(run, gradients)
    _draw(study, config)
    return study


def trained(config: Config, network: str, train: Trainer) -> LogitsFn:
    """A network of the study; for "distilled" its teacher first.

    Args:
      config: the study.
      network: a name from `NETWORKS`.
      train: gives networks.
    """
    if network == "standard":
        return train(config.model, "standard", training.cross_entropy)
    part, temperature = functools.partial, config.temperature
    teacher = train(config.model, "teacher", part(defenses.at_temperature, temperature=temperature))
    loss_fn = part(defenses.distilled, teacher=teacher, temperature=temperature)
    return train(config.model, "distilled", loss_fn)


def catalogue(config: Config) -> dict[str, Attack]:
    """The attacks of the study by name."""

    def scaled(logits: Array, labels: Array) -> Array:
        return losses.cross_entropy(logits / config.temperature, labels)

    def carlini_wagner(key: Key, logits_fn: LogitsFn, x: Array, y: Array, _: ArrayLike) -> Array:
        return attacks.carlini_wagner_l2(
            key, logits_fn, x, y, num_steps=config.cw_num_steps, initial_constant=0.01,
            num_search_steps=config.cw_num_search_steps, learning_rate=config.cw_learning_rate,
        ).x_adv  # fmt: skip

    pgd = functools.partial(attacks.pgd, num_steps=config.num_steps)
    return {
        "fgsm": attacks.fgsm,
        "pgd": pgd,
        "fgsm_scaled": functools.partial(attacks.fgsm, loss_fn=scaled),
        "pgd_scaled": functools.partial(pgd, loss_fn=scaled),
        "pgd_margin": functools.partial(pgd, loss_fn=losses.margin),
        "carlini_wagner_l2": carlini_wagner,
    }


def _measure(
    config: Config, key: Key, name: str, attack: Attack, logits_fn: LogitsFn, x: Array, y: Array
) -> dict[str, Any]:
    """How often an attack succeeds, and how far it goes."""
    is_budgeted = name != "carlini_wagner_l2"
    if not is_budgeted:
        x, y = x[: config.num_cw_examples], y[: config.num_cw_examples]
    x_adv = attacked(attack, key, logits_fn, x, y, config.epsilon)
    is_correct, is_fooled = (
        np.asarray(judge(evaluation.predict(logits_fn, images, batch_size=BATCH), y))
        for judge, images in ((metrics.is_correct, x), (metrics.is_fooled, x_adv))
    )
    won = is_correct & is_fooled
    distance = np.asarray(balls.l2.distance(x_adv, x))
    return {
        "attack": name,
        "epsilon": config.epsilon if is_budgeted else None,
        "num_examples": len(y),
        "num_correct": int(np.sum(is_correct)),
        "success_rate": float(np.sum(won) / np.sum(is_correct)) if is_correct.any() else None,
        "median_distance_l2": float(np.median(distance[won])) if won.any() else None,
    }


@functools.partial(jax.jit, static_argnames="loss_fn")
def _norms(loss_fn, logits_fn: LogitsFn, x, y) -> Array:
    gradient = jax.grad(lambda images: jnp.sum(loss_fn(logits_fn(images), y)))(x)
    # Over its largest entry: squares of small numbers would vanish before the numbers do.
    largest = balls.linf.norm(gradient)
    scaled = gradient / balls.per_example(jnp.where(largest > 0, largest, 1), gradient)
    return largest * balls.l2.norm(scaled)


def gradient_norms(loss_fn: AttackLoss, logits_fn: LogitsFn, x: Array, y: Array) -> np.ndarray:
    """L2 norm of the gradient of each image's loss in its pixels, f32[n]."""
    logits_fn = classifier.as_pytree(logits_fn)
    return np.concatenate(
        [np.asarray(_norms(loss_fn, logits_fn, x[i : i + BATCH], y[i : i + BATCH]))
         for i in range(0, len(x), BATCH)]
    )  # fmt: skip


def _draw(study: Study, config: Config) -> None:
    from advjax.experiments import defence_figures  # matplotlib is slow to import

    run = study.run
    run.figure(
        "success.png",
        lambda path: defence_figures.grouped_bars(
            success_grid(study, config), ylabel="success in %", path=path
        ),
    )
    titles = {"cross_entropy": "gradient of the cross-entropy", "margin": "gradient of the margin"}
    run.figure(
        "gradients.png",
        lambda path: defence_figures.gradient_norms(
            {titles[loss]: by_network for loss, by_network in study.gradients.items()},
            title=f"{config.dataset}, {config.model}: distillation at T = {config.temperature:g}, "
            "used at T = 1",
            path=path,
        ),
    )


def success_grid(study: Study, config: Config) -> grids.Grid:
    """Success in percent, networks x attacks."""
    values = {
        (row["network"], ATTACKS[row["attack"]]): [100 * row["success_rate"]]
        for row in study.run.rows
        if row["success_rate"] is not None
    }
    title = (
        f"Success in % of the images answered correctly, epsilon {config.epsilon:g}: "
        f"{config.dataset}, {config.model}, T = {config.temperature:g}"
    )
    return grids.Grid(title, "network", NETWORKS, [ATTACKS[a] for a in config.attacks], values)


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints success rates, distances, what became of the gradients, and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    clean = {row["network"]: row["clean_accuracy"] for row in rows}
    accuracies = ", ".join(f"{name} {clean[name]:.1%}" for name in NETWORKS)
    table = Table(
        title=f"Distillation at T = {config.temperature:g}, used at 1: {config.dataset}, "
        f"{config.model}, epsilon {config.epsilon:g} (clean: {accuracies})",
        caption="Success on images answered correctly; in brackets the median L2 distance.",
    )
    table.add_column("attack")
    for name in NETWORKS:
        table.add_column(name, justify="right")
    by_cell = {(row["network"], row["attack"]): row for row in rows}
    for attack in config.attacks:
        table.add_row(ATTACKS[attack], *(_cell(by_cell[name, attack]) for name in NETWORKS))
    console.print(table)
    for loss, by_network in study.gradients.items():
        texts = (
            f"{name} {np.median(norms):.2g}, zero at {np.mean(norms == 0):.1%}"
            for name, norms in by_network.items()
        )
        console.print(f"Gradient of the {loss.replace('_', '-')}, median norm: {'; '.join(texts)}")
    console.print(f"Files: {study.run.workdir}/ (results.csv, gradients.npz, figures/)")


def _cell(row: Mapping[str, Any]) -> str:
    if row["success_rate"] is None:
        return "none correct"
    distance = row["median_distance_l2"]
    return f"{row['success_rate']:.1%}" + ("" if distance is None else f" ({distance:.2f})")
