"""Tables for the terminal."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from advjax.experiments.evasion import PUBLISHED_FGSM, Config, Study
from advjax.experiments.grids import deviation

_MOST_COLUMNS = 6


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints the robust accuracies, the FGSM row and where the files are.

    Args:
      study: what `evasion.run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    clean = np.mean(list(study.clean_accuracy.values()))
    for ball in dict.fromkeys(row["ball"] for row in rows):
        epsilons = config.epsilons_of(ball)
        picks = sorted({round(i) for i in np.linspace(0, len(epsilons) - 1, _MOST_COLUMNS)})
        table = Table(
            title=f"Robust accuracy in {ball}: {config.dataset}, {config.model}, "
            f"{rows[0]['num_examples']} images, {len(config.seeds)} seed(s), clean {clean:.1%}"
        )
        table.add_column("attack")
        for i in picks:
            table.add_column(f"{epsilons[i]:.4g}", justify="right")
        for name in config.attacks:
            mine = [row for row in rows if row["attack"] == name and row["ball"] == ball]
            if mine:
                table.add_row(name, *(_cell(mine, epsilons[i]) for i in picks))
        console.print(table)
    for seed, result in study.fgsm.items():
        console.print(
            f"FGSM at epsilon {config.fgsm_epsilon:g}, seed {seed}: error {result.error:.1%}, mean "
            f"confidence on the errors {result.mean_confidence:.1%}  [dim](published for MNIST, "
            f"0.25: {PUBLISHED_FGSM.error:.1%} and {PUBLISHED_FGSM.mean_confidence:.1%})[/dim]"
        )
    fooling = study.fooling
    console.print(
        f"Fooling image: noise and one sign step toward class {fooling.target} is called "
        f"{fooling.answer} with confidence {fooling.confidence:.1%} (the surest of 64 draws; "
        f"{fooling.share_called:.0%} of them are called {fooling.target})"
    )
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")


def _cell(rows: list[dict[str, Any]], epsilon: float) -> str:
    values = [row["robust_accuracy"] for row in rows if row["epsilon"] == epsilon]
    text = f"{np.mean(values):.1%}"
    return f"{text} ± {deviation(values):.1%}" if len(values) > 1 else text


def print_distances(study: Any, config: Any, console: Console | None = None) -> None:
    """Prints success and distances of minimum-norm attacks.

    Args:
      study: what `min_norm.run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    table = Table(
        title=f"Distances: {config.dataset}, {config.model}, {rows[0]['num_examples']} images, "
        f"clean {study.clean_accuracy:.1%}",
        caption="Of the images answered correctly; a failure is infinitely far in the median and "
        "left out of the mean.",
    )
    for name in ("attack", "norm", "success", "median", "mean"):
        table.add_column(name, justify="left" if name in ("attack", "norm") else "right")
    for name in dict.fromkeys(row["attack"] for row in rows):
        row = next(row for row in rows if row["attack"] == name)
        table.add_row(
            name, row["norm"], f"{row['num_success']}/{row['num_correct']}",
            *(
                "none" if row[column] is None else f"{row[column]:.4g}"
                for column in ("median_distance", "mean_distance_of_successes")
            ),
        )  # fmt: skip
    console.print(table)
    if study.grid is not None:
        off = study.grid.distance[
            study.grid.sources[:, None] != np.arange(study.grid.distance.shape[1])
        ]
        found = off[np.isfinite(off)]
        mean = f"{np.mean(found):.3g}" if found.size else "none"
        console.print(
            f"Targeted grid: {found.size} of {off.size} targets reached, mean l2 distance {mean}"
        )
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")


def print_cascade(study: Any, config: Any, console: Console | None = None) -> None:
    """Prints the robust accuracy after each attack of AutoAttack.

    Args:
      study: what `auto_attack.run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    names = [name for name in rows[0] if name.startswith("after_")]
    table = Table(
        title=f"AutoAttack {config.version}, {config.ball}: {config.dataset}, {config.model}, "
        f"{rows[0]['num_examples']} images"
    )
    for name in ("epsilon", "clean", *(n.removeprefix("after_") for n in names)):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: row["epsilon"]):
        table.add_row(
            f"{row['epsilon']:.4g}", f"{row['clean_accuracy']:.1%}",
            *(f"{row[name]:.1%}" for name in names),
        )  # fmt: skip
    console.print(table)
    for sentence in study.warnings:
        console.print(f"[yellow]Warning:[/yellow] {sentence}")
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")
