"""The power law of the adversarial error, on hundreds of random networks and a well-trained one.

A cell is a network under an attack. Networks are trained group by group and forgotten once their
rows are written; their keys are those of their numbers, so interruption never changes a number.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import advjax
from advjax import attacks, data, universality
from advjax.core import checks, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array
from advjax.experiments.networks import NetworkConfig, open_study, trainer
from advjax.experiments.runs import Run
from advjax.universality import networks, populations

KEY_COLUMNS = ("network", "attack")
ATTACKS = {
    "fgm": attacks.fgm,
    "fgsm": attacks.fgsm,
    "pgd": functools.partial(attacks.pgd, num_steps=20),
    "least_likely": attacks.least_likely,
}
# First and last epsilon of the near-perfect network and of the random ones, which are less robust:
# on MNIST errors from 1 % to beyond WIDE_CEILING.
RANGES = {
    "fgm": (0.1, 2.5), "fgsm": (0.005, 0.2), "pgd": (0.005, 0.2), "least_likely": (0.02, 0.5)
}  # fmt: skip
POPULATION_RANGES = {
    "fgm": (0.03, 0.7), "fgsm": (0.002, 0.045), "pgd": (0.002, 0.045), "least_likely": (0.01, 0.13)
}  # fmt: skip
# E. Cubuk et al., 2017: the exponents of a network that is near perfect on MNIST.
PUBLISHED = {"fgm": 1.1, "fgsm": 1.2, "pgd": 1.3, "least_likely": 2.3}
WIDE_CEILING = 0.3  # the exponents with this one are in the rows too, to show what the window does
NEAR_PERFECT = -1  # its number among the networks
_TEST_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Config(NetworkConfig):
    """A study of the power law.

    The settings of `NetworkConfig` are those of the one network that is trained until it is near
    perfect, and is attacked in all four ways.

    Attributes:
      near_perfect: whether there is such a network.
      num_networks: random architectures.
      kind: of them, see `universality.sample_architectures`.
      max_width: their largest width; 0 for the largest of the kind.
      population_attacks: what they are attacked by.
      population_train: training images for them; 0 for all.
      population_examples: test images for them.
      population_epochs: training epochs for them.
      group_size: networks a program.
      num_epsilons: of each curve, in geometric progression.
      ceiling: largest error of the window of the fit.
      seed: of everything.
    """

    num_examples: int = 5000
    near_perfect: bool = True
    num_networks: int = 500
    kind: str = "fully_connected"
    max_width: int = 0
    population_attacks: tuple[str, ...] = ("fgsm", "least_likely")
    population_train: int = 2000
    population_examples: int = 1000
    population_epochs: int = 3
    group_size: int = 32
    num_epsilons: int = 10
    ceiling: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network("power_law")
        checks.known("power_law", "kind", self.kind, networks.KINDS)
        for attack in self.population_attacks:
            checks.known("power_law", "attack", attack, ATTACKS)
        for name in ("population_examples", "population_epochs", "group_size"):
            checks.at_least("power_law", name, getattr(self, name), 1)
        for name in ("num_networks", "max_width", "population_train"):
            checks.at_least("power_law", name, getattr(self, name), 0)
        checks.at_least("power_law", "num_epsilons", self.num_epsilons, 3)
        if not 0 < self.ceiling <= 1:
            raise ValueError(f"power_law: need 0 < ceiling <= 1, got ceiling={self.ceiling}.")
        if not self.near_perfect and not self.num_networks:
            raise ValueError("power_law: need at least one network, got none.")
        if self.num_networks and not self.population_attacks:
            raise ValueError("power_law: need at least one of population_attacks, got none.")
        least, most = populations.RANGES[self.kind].width
        if self.max_width and not least <= self.max_width <= most:
            raise ValueError(
                f"power_law: need {least} <= max_width <= {most} for {self.kind}, or 0, got "
                f"max_width={self.max_width}."
            )


def _epsilons(config: Config, attack: str, *, is_population: bool) -> np.ndarray:
    ranges = POPULATION_RANGES if is_population else RANGES
    return np.geomspace(*ranges[attack], config.num_epsilons).astype(np.float32)


def smaller(config: Config) -> Config:
    """The same on the digits, in seconds."""
    return dataclasses.replace(
        config, dataset="digits", model="mlp", num_examples=359, num_epochs=10, num_networks=4,
        max_width=60 if config.kind == "fully_connected" else 8, population_attacks=("fgsm",),
        population_train=0, population_examples=359, population_epochs=8, ceiling=0.5,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
    """

    run: Run


@functools.partial(jax.jit, static_argnames=("attack", "models"))
def _curve(key, attack: str, logits_fn, x, y, epsilons, *, models):
    return universality.adversarial_error(
        key, ATTACKS[attack], logits_fn, x, y, epsilons, models=models, batch_size=_TEST_BATCH
    )


@jax.jit
def _fits(key, epsilons, curve, ceiling):
    """The fit, and one with the wide window."""
    fit = functools.partial(
        universality.fit_power_law, epsilons, curve.success, where=curve.is_correct, key=key
    )
    return fit(ceiling=ceiling), fit(ceiling=WIDE_CEILING, num_resamples=1)


def _row(config: Config, attack: str, epsilons, curve, **names: Any) -> dict[str, Any]:
    key = random.named(jax.random.key(config.seed), "bootstrap")
    law, wide = jax.device_get(_fits(key, epsilons, curve, config.ceiling))
    return {
        "dataset": config.dataset,
        "attack": attack,
        **names,
        "clean_accuracy": float(np.mean(curve.is_correct)),
        "num_examples": int(curve.is_correct.size),
        "exponent": _or_none(law.exponent),
        "exponent_low": _or_none(law.low),
        "exponent_high": _or_none(law.high),
        "amplitude": _or_none(law.amplitude),
        "num_in_window": int(np.sum(law.in_window)),
        "exponent_wide": _or_none(wide.exponent),
        "epsilons": np.round(epsilons.astype(float), 7).tolist(),
        "errors": [_or_none(error) for error in np.round(curve.error.astype(float), 6)],
    }


def _or_none(value: Array) -> float | None:
    """JSON knows no NaN, such as where fewer than three epsilons are in the window."""
    return float(value) if np.isfinite(value) else None


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Runs what is missing of a study and writes its table and figures.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one.
    """
    opened = open_study(
        config, workdir, study="power_law", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, key = opened.run, jax.random.key(config.seed)
    if config.num_networks:
        _run_population(config, run, key, data_dir)
    missing = [name for name in ATTACKS if not run.is_done([(NEAR_PERFECT, name)])]
    if config.near_perfect and missing:
        with run.timed("training"):
            train = trainer(config, opened.test.num_classes, data_dir, run)
            logits_fn = train(config.seed)
        for name in missing:
            epsilons = _epsilons(config, name, is_population=False)
            with run.timed(name):
                curve = jax.device_get(_curve(
                    random.named(key, name), name, logits_fn, opened.x, opened.y, epsilons,
                    models=None,
                ))  # fmt: skip
            run.append([
                _row(config, name, epsilons, curve, network=NEAR_PERFECT, kind=config.model)
            ])  # fmt: skip
    run.finish(config.seed)
    if config.num_networks:
        run.figure("exponents.png", functools.partial(draw_exponents, run.rows))
    if config.near_perfect:
        run.figure("curves.png", functools.partial(draw_curves, run.rows))
    return Study(run)


def _run_population(config: Config, run: Run, key, data_dir: PathLike | None) -> None:
    low, high = populations.RANGES[config.kind].width
    architectures = universality.sample_architectures(
        random.named(key, "architectures"), config.num_networks, kind=config.kind,
        width=(low, config.max_width or high),
    )  # fmt: skip
    groups = universality.group_architectures(
        architectures, data.info(config.dataset).num_classes, kind=config.kind,
        size=config.group_size,
    )  # fmt: skip

    def cells(group: populations.Group) -> list[tuple]:
        numbers = group.members.index.tolist()
        return [(number, name) for number in numbers for name in config.population_attacks]

    groups = [group for group in groups if not run.is_done(cells(group))]
    if not groups:
        return
    train = data.load(config.dataset, "train", data_dir=data_dir)
    train = train.take(min(config.population_train or len(train), len(train)))
    test = data.load(config.dataset, "test", data_dir=data_dir)
    test = test.take(min(config.population_examples, len(test)))
    x, y = test.float_images(), test.labels
    # The cheapest first: an interrupted run has done most of the networks, if not the largest.
    groups.sort(key=lambda group: populations.num_parameters(group, test.image_shape).sum())
    trained = universality.train_architectures(
        random.named(key, "population"), groups, train, num_epochs=config.population_epochs
    )
    with run.timed("population"), tqdm(
        total=config.num_networks, initial=config.num_networks - sum(
            len(group.members.index) for group in groups), unit="network",
        disable=not parallel.is_main_process(),
    ) as bar:  # fmt: skip
        for group in trained:
            members, rows = group.members, []
            logits_fn = advjax.bind(group.module, group.variables)
            num_parameters = populations.num_parameters(group, test.image_shape)
            for name in config.population_attacks:
                epsilons = _epsilons(config, name, is_population=True)
                curves = jax.device_get(
                    _curve(random.named(key, name), name, logits_fn, x, y, epsilons, models="map")
                )
                for i, number in enumerate(members.index.tolist()):
                    one = jax.tree.map(lambda leaf, i=i: leaf[i], curves)
                    rows.append(_row(
                        config, name, epsilons, one, network=number, kind=config.kind,
                        depth=int(members.depth[i]), width=int(members.width[i]),
                        dropout=float(members.dropout[i]), num_parameters=int(num_parameters[i]),
                    ))  # fmt: skip
            run.append(rows)
            bar.update(len(members.index))


def population_exponents(
    rows: Sequence[Mapping[str, Any]], attack: str, column: str = "exponent"
) -> np.ndarray:
    """The exponents of the random networks, without those whose window was too short."""
    values = [
        row[column] for row in rows if row["attack"] == attack and row["network"] != NEAR_PERFECT
    ]
    return np.array([value for value in values if value is not None])


def draw_exponents(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Histograms of the exponents of the random networks, one panel an attack.

    Args:
      rows: of the study.
      path: where to.
    """
    from advjax.experiments import figures  # matplotlib is slow to import

    names = dict.fromkeys(row["attack"] for row in rows if row["network"] != NEAR_PERFECT)
    values = {name: population_exponents(rows, name) for name in names}
    panels = {
        f"{name}: {len(exponents)} networks, median {np.median(exponents):.2f}": exponents
        for name, exponents in values.items()
        if exponents.size
    }
    figures.histograms(panels, xlabel="exponent of the adversarial error", path=path)


def draw_curves(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Errors of the near-perfect network over epsilon, both logarithmic, with the fitted lines.

    Args:
      rows: of the study.
      path: where to.
    """
    from advjax.experiments import figures

    curves = {}
    for row in (row for row in rows if row["network"] == NEAR_PERFECT):
        label = row["attack"]
        if row["exponent"] is not None:
            label = f"{label}: exponent {row['exponent']:.2f}"
        errors = np.array(row["errors"], float).tolist()
        curves[label] = (row["epsilons"], errors, row["amplitude"], row["exponent"])
    figures.power_laws(curves, title="one well-trained network", path=path)


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints the exponents and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    table = Table(
        title=f"Exponents of the adversarial error: {config.dataset}",
        caption=f"Errors up to {config.ceiling:g}; in brackets with errors up to "
        f"{WIDE_CEILING:g}. Published: one near-perfect network on MNIST.",
    )
    for name in ("attack", "networks", "median", "5 % to 95 %", "near perfect", "published"):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for name in (name for name in ATTACKS if any(row["attack"] == name for row in rows)):
        some, wide = (
            population_exponents(rows, name, column) for column in ("exponent", "exponent_wide")
        )
        cells = ["0", "", ""]
        if some.size and wide.size:
            low, high = np.quantile(some, (0.05, 0.95))
            cells = [
                str(some.size), f"{np.median(some):.2f} ({np.median(wide):.2f})",
                f"{low:.2f} to {high:.2f}",
            ]  # fmt: skip
        ours = [r for r in rows if r["network"] == NEAR_PERFECT and r["attack"] == name]
        table.add_row(name, *cells, *map(_one_network, ours or [None]), f"{PUBLISHED[name]:.1f}")
    console.print(table)
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")


def _one_network(row: Mapping[str, Any] | None) -> str:
    if row is None or row["exponent"] is None:
        return ""
    if row["exponent_low"] is None:
        return f"{row['exponent']:.2f}"
    interval = f"{row['exponent_low']:.2f} to {row['exponent_high']:.2f}"
    return f"{row['exponent']:.2f} ({interval})"
