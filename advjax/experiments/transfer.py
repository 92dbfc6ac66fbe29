"""Transfer: every network as a substitute for every other, and what confidence does for it.

Cells are (attack, confidence, source); each gives one row a target. Keys are derived from the
cell's name, so order and interruption never change a number.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from advjax import attacks, models
from advjax.core import balls, checks, classifier, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, Key, LogitsFn
from advjax.experiments import networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("attack", "confidence", "source", "target")
ATTACKS = ("fgsm", "bim", "rand_fgsm", "carlini_wagner_l2")
RELATIONS = ("white box", "same architecture", "other architecture")


@dataclasses.dataclass(frozen=True)
class Config(networks.NetworkConfig):
    """A study of transfer.

    Attributes:
      more_models: names for `models.make` beside `model`.
      seeds: one network a seed and architecture.
      attacks: names from `ATTACKS`.
      epsilon: radius of the fixed-budget attacks, in linf.
      num_steps: steps of bim.
      confidences: kappas of Carlini and Wagner's attack, in units of the logits.
      cw_num_steps: its steps.
      cw_num_search_steps: its search steps for the constant.
      cw_learning_rate: its step of Adam.
    """

    more_models: tuple[str, ...] = ("mlp",)
    seeds: tuple[int, ...] = (0, 1)
    attacks: tuple[str, ...] = ATTACKS
    epsilon: float = 0.1
    num_steps: int = 10
    confidences: tuple[float, ...] = (0.0, 5.0, 10.0, 20.0, 40.0)
    cw_num_steps: int = 200
    cw_num_search_steps: int = 6
    cw_learning_rate: float = 0.1

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        if self.weights:
            raise ValueError("transfer: need several networks, so weights of one are of no use.")
        self.check_network("transfer")
        for name in self.more_models:
            checks.known("transfer", "model", name, models.NAMES)
        if not self.attacks:
            raise ValueError("transfer: need at least one attack, got none.")
        for name in self.attacks:
            checks.known("transfer", "attack", name, ATTACKS)
        for name in ("epsilon", "confidences", "cw_learning_rate"):
            checks.non_negative("transfer", name, getattr(self, name))
        for name in ("num_steps", "cw_num_steps", "cw_num_search_steps"):
            checks.at_least("transfer", name, getattr(self, name), 1)
        if len(self.members) < 2:
            raise ValueError("transfer: need at least two networks: several seeds or more_models.")

    @property
    def members(self) -> dict[str, tuple[str, int]]:
        """Architecture and seed of every network, by its name."""
        architectures = dict.fromkeys((self.model, *self.more_models))
        return {f"{model} {seed}": (model, seed) for model in architectures for seed in self.seeds}

    @property
    def variants(self) -> list[tuple[str, float]]:
        """Attack and confidence of every picture; the confidence is 0 where there is none."""
        return [
            (name, confidence)
            for name in self.attacks
            for confidence in (self.confidences if name == "carlini_wagner_l2" else (0.0,))
        ]


def smaller(config: Config) -> Config:
    """The same study in seconds: every attack, few of everything else."""
    return dataclasses.replace(
        config, num_examples=min(config.num_examples, 16), num_epochs=min(config.num_epochs, 2),
        num_steps=min(config.num_steps, 3), confidences=config.confidences[:2],
        cw_num_steps=min(config.cw_num_steps, 20),
        cw_num_search_steps=min(config.cw_num_search_steps, 2),
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      clean_accuracy: of each network, by name.
      orderings: what the lecture says, each with our numbers.
    """

    run: Run
    clean_accuracy: dict[str, float]
    orderings: list[dict[str, Any]]


def catalogue(config: Config) -> dict[str, Attack]:
    """The attacks of the study by name."""

    def carlini_wagner(
        key: Key, logits_fn: LogitsFn, x: Array, y: Array, confidence: ArrayLike
    ) -> Array:
        # What is swept is its confidence; it has no epsilon. Six constants reach 1e4.
        return attacks.carlini_wagner_l2(
            key, logits_fn, x, y, confidence=confidence, num_steps=config.cw_num_steps,
            num_search_steps=config.cw_num_search_steps, learning_rate=config.cw_learning_rate,
            initial_constant=0.1,
        ).x_adv  # fmt: skip

    return {
        "fgsm": attacks.fgsm,
        "bim": functools.partial(attacks.bim, num_steps=config.num_steps),
        "rand_fgsm": attacks.rand_fgsm,
        "carlini_wagner_l2": carlini_wagner,
    }


class _Cell(NamedTuple):
    rates: Array
    distance: Array


@functools.partial(jax.jit, static_argnames="attack")
def _cell(key, attack, source, targets, x, y, strength) -> _Cell:
    x_adv = attack(key, source, x, y, strength)
    # An attack that has its images already.
    rates = attacks.transfer(key, lambda *_: x_adv, [source], targets, x, y, strength)[0]
    return _Cell(rates, balls.l2.distance(x_adv, x))


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Runs what is missing of a study and writes its tables and figures.

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
        config, workdir, study="transfer", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, test, x, y = opened[1:]
    classifiers, clean_accuracy = {}, {}
    for name, (model, seed) in config.members.items():
        with run.timed("training"):
            settings = dataclasses.replace(config, model=model)
            trained = networks.trainer(settings, test.num_classes, data_dir, run)(seed)
        classifiers[name] = classifier.as_pytree(trained)
        clean_accuracy[name] = networks.clean_accuracy("transfer", name, trained, x, y)
    entries = catalogue(config)
    cells = list(itertools.product(config.variants, config.members))
    with tqdm(cells, desc="attacks", disable=not parallel.is_main_process()) as bar:
        for (name, confidence), source in bar:
            bar.set_postfix(attack=name, confidence=confidence, source=source)
            if not run.is_done((name, confidence, source, target) for target in config.members):
                with run.timed(name):
                    key = random.named(jax.random.key(config.seeds[0]), f"{name} {source}")
                    strength = confidence if name == "carlini_wagner_l2" else config.epsilon
                    cell = _cell(
                        key, entries[name], classifiers[source], list(classifiers.values()), x, y,
                        strength,
                    )  # fmt: skip
                    run.append(_rows(config, name, confidence, source, cell, clean_accuracy))
    study = Study(run, clean_accuracy, orderings(config, run.rows))
    run.table("orderings.csv", study.orderings)
    run.finish(config.seeds[0])
    _draw(study, config)
    return study


def relation(config: Config, source: str, target: str) -> str:
    """What a source is to a target: one of `RELATIONS`."""
    if source == target:
        return RELATIONS[0]
    same = config.members[source][0] == config.members[target][0]
    return RELATIONS[1] if same else RELATIONS[2]


def _rows(
    config: Config, name: str, confidence: float, source: str, cell: _Cell, clean_accuracy
) -> list[dict[str, Any]]:
    distance = np.asarray(cell.distance)
    moved = distance[distance > 0]  # where a minimum-norm attack fails, it returns the image
    return [
        {
            "dataset": config.dataset,
            "attack": name,
            "confidence": confidence,
            "epsilon": None if name == "carlini_wagner_l2" else config.epsilon,
            "source": source,
            "target": target,
            "relation": relation(config, source, target),
            "num_examples": len(distance),
            "clean_accuracy": clean_accuracy[target],
            "transfer_rate": None if np.isnan(rate) else float(rate),
            "mean_distance_l2": float(moved.mean()) if len(moved) else None,
        }
        for target, rate in zip(config.members, cell.rates, strict=True)
    ]


def mean_rate(
    rows: Sequence[Mapping[str, Any]], name: str, confidence: float, relations: Sequence[str]
) -> float:
    """Mean transfer rate of an attack over the pairs of networks of some relations; NaN for none.

    Args:
      rows: rows of the study.
      name: the attack.
      confidence: its confidence, 0 where it has none.
      relations: some of `RELATIONS`.
    """
    rates = [
        row["transfer_rate"]
        for row in rows
        if (row["attack"], row["confidence"]) == (name, confidence)
        and row["relation"] in relations
        and row["transfer_rate"] is not None
    ]
    return float(np.mean(rates)) if rates else float("nan")


def orderings(config: Config, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The orderings of the lecture, each with the two numbers that it compares.

    Returns:
      Rows with `claim`, `stronger`, `weaker` (mean rates over pairs of networks) and `holds`:
      whether the first is larger; a tie does not hold. An image that the attack does not break on
      its source counts as not transferred, so a confidence out of reach lowers the rate.
    """

    def compare(claim: str, stronger: float, weaker: float) -> dict[str, Any]:
        verdict = "holds" if stronger > weaker else "does not hold"
        if np.isnan(stronger) or np.isnan(weaker):
            verdict = "no images"
        return {"claim": claim, "stronger": stronger, "weaker": weaker, "holds": verdict}

    def white(name: str, confidence: float = 0.0) -> float:
        return mean_rate(rows, name, confidence, RELATIONS[:1])

    def black(name: str, confidence: float = 0.0) -> float:
        return mean_rate(rows, name, confidence, RELATIONS[1:])

    found = [
        compare(f"white box stronger: {label(*variant)}", white(*variant),
                black(*variant))
        for variant in config.variants
    ]  # fmt: skip
    if {"bim", "fgsm"} <= set(config.attacks):
        found.append(
            compare("on its source iterative (bim) stronger than fast (fgsm)", white("bim"),
                    white("fgsm"))
        )  # fmt: skip
    if "carlini_wagner_l2" in config.attacks:
        for lower, higher in itertools.pairwise(sorted(config.confidences)):
            found.append(
                compare(
                    f"more transfer: CW-L2, kappa {higher:g} over {lower:g}",
                    black("carlini_wagner_l2", higher), black("carlini_wagner_l2", lower),
                )
            )  # fmt: skip
    return found


def label(name: str, confidence: float) -> str:
    """An attack and its confidence, for tables and pictures."""
    return f"CW-L2, kappa {confidence:g}" if name == "carlini_wagner_l2" else name


def matrix(config: Config, rows: Sequence[Mapping[str, Any]], name: str, confidence: float):
    """The transfer rates of an attack, f32[sources, targets]."""
    rate = {
        (row["source"], row["target"]): row["transfer_rate"]
        for row in rows
        if (row["attack"], row["confidence"]) == (name, confidence)
    }
    return np.array([[rate[s, t] for t in config.members] for s in config.members], np.float32)


def _draw(study: Study, config: Config) -> None:
    from advjax.experiments import set_figures  # matplotlib is slow to import

    rows, run = study.run.rows, study.run
    for name, confidence in config.variants:
        run.figure(
            f"matrix_{name}_{confidence:g}.png".replace("_0.png", ".png"),
            functools.partial(
                set_figures.transfer_matrix, matrix(config, rows, name, confidence),
                tuple(config.members), f"{config.dataset}: {label(name, confidence)}",
            ),
        )  # fmt: skip
    if "carlini_wagner_l2" in config.attacks:
        rates = {
            which: [
                mean_rate(rows, "carlini_wagner_l2", kappa, (which,))
                for kappa in config.confidences
            ]
            for which in RELATIONS
        }
        run.figure(
            "confidence.png",
            functools.partial(set_figures.confidence_curves, config.confidences, rates),
        )


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints mean transfer rates, the orderings and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    accuracies = ", ".join(f"{name} {value:.1%}" for name, value in study.clean_accuracy.items())
    table = Table(
        title=f"Transfer on {config.dataset}, {rows[0]['num_examples']} images, epsilon "
        f"{config.epsilon:g}: mean over pairs of networks (clean: {accuracies})"
    )
    table.add_column("attack")
    for name in (*RELATIONS, "L2 distance"):
        table.add_column(name, justify="right")
    for variant in config.variants:
        mine = [row for row in rows if (row["attack"], row["confidence"]) == variant]
        known = [row["mean_distance_l2"] for row in mine if row["mean_distance_l2"] is not None]
        rates = (mean_rate(rows, *variant, (which,)) for which in RELATIONS)
        distance = f"{np.mean(known):.2f}" if known else ""
        table.add_row(label(*variant), *(f"{rate:.1%}" for rate in rates), distance)
    console.print(table)
    claims = Table(title="Orderings of the lecture")
    for name in ("claim", "stronger", "weaker", ""):
        claims.add_column(name, justify="right" if name in ("stronger", "weaker") else "left")
    for row in study.orderings:
        claims.add_row(row["claim"], f"{row['stronger']:.1%}", f"{row['weaker']:.1%}", row["holds"])
    console.print(claims)
    console.print(f"Files: {study.run.workdir}/ (results.csv, orderings.csv, figures/)")
