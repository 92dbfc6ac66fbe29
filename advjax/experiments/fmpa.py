"""The tables and figures of FMPA, each a set of federated studies that differ in one thing.

A study has conditions, such as three reference models. Each condition is a run folder of
`experiments.federated` of its own; what is seen over the conditions is put together here.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from tqdm.auto import tqdm

from advjax.core import checks, parallel
from advjax.core.io import PathLike
from advjax.experiments import federated, fmpa_figures, grids
from advjax.experiments.runs import Run

# The rules of Table 1, where each dash of Fang's attack is one of the last three, and of Table 2,
# which is our reading: the page of references names norm-bounding and FABA beside these.
IMPACT_RULES = (
    "krum", "multi_krum", "bulyan", "trimmed_mean", "median", "centered_clipping", "afa", "dnc",
)  # fmt: skip
CONTROL_RULES = (
    "mean", "norm_bounding", "multi_krum", "faba", "median", "trimmed_mean", "afa",
    "centered_clipping", "dnc",
)  # fmt: skip
RIVALS = ("fang", "lie", "ipm", "mpaf", "min_max", "min_sum")
OURS = "i_fmpa"
_ALL = (federated.NO_ATTACK, *RIVALS, OURS)

# The networks of the paper. Its clients, rounds and learning rates are not published: 50 clients
# and a fifth of them malicious are those of the code that it builds on.
_FEDERATION = federated.Config(
    num_clients=50, num_byzantine=10, variant="ndss", eval_every=5, rules=IMPACT_RULES, attacks=_ALL
)
SETTINGS = {
    "mnist_fc": dataclasses.replace(
        _FEDERATION, dataset="mnist", model="mlp_512", num_steps=10, batch_size=16,
        learning_rate=0.2, num_rounds=100,
    ),
    # One gradient of 250 images a round, as in the code that the paper builds on. F-FMPA looks at
    # every image that it validates on: what it sees on 2,000 of them is off by half a point.
    "mnist_fc_sgd": dataclasses.replace(
        _FEDERATION, dataset="mnist", model="mlp_512", local="sgd", batch_size=250,
        learning_rate=0.1, num_rounds=200, control_validation=6000,
    ),
    "emnist_cnn": dataclasses.replace(
        _FEDERATION, dataset="emnist", model="cnn_512", num_steps=20, batch_size=32,
        learning_rate=0.05, num_rounds=100, direction="sign", partition="dirichlet",
    ),
    "cifar10_resnet20": dataclasses.replace(
        _FEDERATION, dataset="cifar10", model="resnet20", num_steps=20, batch_size=50,
        learning_rate=0.1, momentum=0.9, num_rounds=300,
    ),
    "cifar10_vgg16": dataclasses.replace(
        _FEDERATION, dataset="cifar10", model="vgg16", num_steps=20, batch_size=50,
        learning_rate=0.05, momentum=0.9, num_rounds=300,
    ),
    "digits_mlp": dataclasses.replace(
        _FEDERATION, dataset="digits", model="mlp", num_clients=25, num_byzantine=5, num_steps=5,
        batch_size=16, learning_rate=0.1, num_rounds=60,
    ),
}  # fmt: skip
# What --scale multiplies, and where it stops; local work of the small network is left as it is.
_LEAST = {"num_rounds": 10, "num_steps": 1, "batch_size": 8, "num_examples": 500}
_WHOLE_WORK = ("mnist_fc", "mnist_fc_sgd", "digits_mlp")


class Condition(NamedTuple):
    """One point of a study.

    Attributes:
      name: of its folder.
      value: on the axis of the figure.
      changes: what it has other than the setting.
    """

    name: str
    value: float | str
    changes: Mapping[str, Any]


class Protocol(NamedTuple):
    """What a study varies and shows.

    Attributes:
      title: what it is.
      axis: what the conditions are; "" where there is one.
      attacks: names of `federated.ATTACKS`.
      rules: names of `federated.RULES`.
    """

    title: str
    axis: str
    attacks: tuple[str, ...]
    rules: tuple[str, ...] = IMPACT_RULES


PROTOCOLS = {
    "impact": Protocol("Table 1: attack impact", "", _ALL),
    "deviation": Protocol(
        "Table 2: deviation from the wanted drop", "",
        (federated.NO_ATTACK, federated.CONTROL), CONTROL_RULES,
    ),
    "attackers": Protocol("Figure 2: share of malicious clients", "malicious clients in %", _ALL),
    "references": Protocol(
        "Figure 3: reference models", "reference model", (federated.NO_ATTACK, OURS)
    ),
    # Without Bulyan, which needs 4 f + 3 clients: 11 where the smallest round has ten.
    "sampling": Protocol(
        "Figure 4: clients drawn a round", "clients a round in %", _ALL,
        tuple(rule for rule in IMPACT_RULES if rule != "bulyan"),
    ),
    "clients": Protocol("Figure 4: number of clients", "clients", _ALL),
    "non_iid": Protocol("Non-IID clients, Fang's partition", "q", _ALL),
}  # fmt: skip
_SHARES = (5, 10, 15, 20)
_SAMPLED = (20, 40, 60, 80, 100)
_CLIENTS = (30, 50, 100)
_DEGREES = (0.1, 0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class Config:
    """One table or figure.

    Attributes:
      study: name from `PROTOCOLS`.
      setting: name from `SETTINGS`: data, network, clients.
      scale: share of the rounds, test images, and for the larger networks local steps and batch
        size; 1 is the full size.
      seeds: a partition, a network and an order of batches each.
      attacks: names to take in place of the study's; () for the study's.
      rules: the same of rules.
      overrides: other fields of `federated.Config` as (name, value).
    """

    study: str = "impact"
    setting: str = "digits_mlp"
    scale: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    attacks: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """Refuses what cannot run, with every condition of the study.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        checks.known("fmpa", "study", self.study, PROTOCOLS)
        checks.known("fmpa", "setting", self.setting, SETTINGS)
        if not 0 < self.scale <= 1:
            raise ValueError(f"fmpa: need 0 < scale <= 1, got scale={self.scale}.")
        known = {field.name for field in dataclasses.fields(federated.Config)}
        for name, _ in self.overrides:
            checks.known("fmpa", "field to override", name, known)
        for condition, config in self.conditions():
            # The clients' own numbers say what share of them is malicious in all conditions.
            lost = condition.changes.keys() & dict(self.overrides).keys()
            if lost and self.study != "clients":
                raise ValueError(
                    f"fmpa: the study {self.study} sets {', '.join(sorted(lost))} itself, so it "
                    "cannot be overridden."
                )
            config.check()
        shown = self.attacks or PROTOCOLS[self.study].attacks
        if federated.NO_ATTACK not in shown or len(shown) < 2:
            raise ValueError(
                f"fmpa: an impact is counted from the run without attack, so need "
                f"{federated.NO_ATTACK} and an attack beside it, got {','.join(shown)}."
            )

    def conditions(self) -> list[tuple[Condition, federated.Config]]:
        """The points of the study and the federated studies that they are."""
        base = scaled(SETTINGS[self.setting], self.scale, self.setting in _WHOLE_WORK)
        protocol = PROTOCOLS[self.study]
        base = dataclasses.replace(
            base, seeds=self.seeds, attacks=self.attacks or protocol.attacks,
            rules=self.rules or protocol.rules, **dict(self.overrides),
        )  # fmt: skip
        return [
            (condition, dataclasses.replace(base, **condition.changes))
            for condition in _conditions(self.study, base)
        ]


def _conditions(study: str, base: federated.Config) -> list[Condition]:
    checks.at_least("fmpa", "num_clients", base.num_clients, 1)
    n, share = base.num_clients, base.num_byzantine / base.num_clients
    if study == "attackers":
        # Few clients cannot be split at every share: the axis has the real ones.
        numbers = dict.fromkeys(max(1, round(p * n / 100)) for p in _SHARES)
        return [
            Condition(f"malicious_{m}", round(100 * m / n, 1), {"num_byzantine": m})
            for m in numbers
        ]
    if study == "references":
        # Without attack there is one run, in the first.
        attacks = tuple(name for name in base.attacks if name != federated.NO_ATTACK)
        return [
            Condition(
                reference, reference,
                {"fmpa_reference": reference, "fmpa_alpha": 0.7}
                | ({} if number == 0 else {"attacks": attacks}),
            )
            for number, reference in enumerate(federated.REFERENCES)
        ]  # fmt: skip
    if study == "sampling":
        return [
            Condition(f"sampled_{p}", p, {"clients_per_round": max(1, round(p * n / 100)) % n})
            for p in _SAMPLED
        ]
    if study == "clients":
        return [
            Condition(
                f"clients_{number}", number,
                {"num_clients": number, "num_byzantine": round(share * number)},
            )
            for number in _CLIENTS
        ]  # fmt: skip
    if study == "non_iid":
        return [Condition(f"q_{q}", q, {"partition": "fang", "fang_q": q}) for q in _DEGREES]
    return [Condition("table", "", {})]


def scaled(config: federated.Config, scale: float, keep_work: bool = False) -> federated.Config:
    """A smaller study with the same protocol: clients, attackers, rules, attacks, partition.

    Args:
      config: the full size.
      scale: of rounds and test images, and of local steps and batch size, in (0, 1].
      keep_work: leave local steps and batch size.
    """
    names = [name for name in _LEAST if not keep_work or name not in ("num_steps", "batch_size")]
    smaller: dict[str, Any] = {
        name: max(min(_LEAST[name], getattr(config, name)), round(scale * getattr(config, name)))
        for name in names
    }
    return dataclasses.replace(config, **smaller)


def tiny(config: Config) -> Config:
    """A version of a study in seconds."""
    checks.known("fmpa", "study", config.study, PROTOCOLS)
    protocol = PROTOCOLS[config.study]
    return dataclasses.replace(
        config, setting="digits_mlp", scale=0.05, seeds=(0,),
        attacks=tuple(a for a in protocol.attacks if a not in RIVALS[1:]),
        rules=tuple(r for r in protocol.rules if r in ("mean", "krum", "median")),
        overrides=(("num_rounds", 4), ("num_steps", 2), ("fmpa_steps", 8), ("eval_every", 2)),
    )  # fmt: skip


def parse_override(text: str) -> tuple[str, Any]:
    """A field of `federated.Config` and its value, from "name=value".

    Raises:
      ValueError: text of another form, a name that is no field, or a value of another type.

    Example:
      >>> parse_override("num_rounds=20")
      ('num_rounds', 20)
      >>> parse_override("control_drops=2.5,10")
      ('control_drops', (2.5, 10.0))
    """
    name, equals, value = text.partition("=")
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(federated.Config)
        if isinstance(field.default, int | float | str) or field.name == "control_drops"
    }
    if not equals or name not in defaults:
        raise ValueError(
            f"--override: need NAME=VALUE with a name among {', '.join(defaults)}, got {text!r}."
        )
    default = defaults[name]
    try:
        if isinstance(default, tuple):
            return name, tuple(map(float, value.split(",")))
        return name, type(default)(value)
    except ValueError:
        kind = "numbers with commas" if isinstance(default, tuple) else type(default).__name__
        raise ValueError(f"--override: need {name} as {kind}, got {value!r}.") from None


class Study(NamedTuple):
    """What `run_study` returns.

    Attributes:
      run: the folder; its rows are one (condition, seed, attack, rule) each.
      grids: the tables by name.
    """

    run: Run
    grids: dict[str, grids.Grid]


KEY_COLUMNS = ("condition", "seed", "attack", "rule")


def run_study(
    config: Config, workdir: PathLike, *, data_dir: PathLike | None = None, mesh: Any = None
) -> Study:
    """Runs every condition that is missing, and puts the tables and figures together.

    Args:
      config: the study.
      workdir: run folder, with a folder a condition in it; started again, it goes on.
      data_dir: prepared tfds data.
      mesh: devices to split the clients over.

    Raises:
      ValueError: a bad configuration, or a folder of another one.
    """
    config.check()
    workdir = pathlib.Path(workdir).expanduser()
    run = Run(workdir, config, study="fmpa", key_columns=KEY_COLUMNS)
    conditions = config.conditions()
    rows_of: dict[str, list[Mapping[str, Any]]] = {}
    is_quiet = len(conditions) == 1 or not parallel.is_main_process()
    with tqdm(conditions, desc=PROTOCOLS[config.study].title, disable=is_quiet) as bar:
        for condition, inner in bar:
            bar.set_postfix(condition=condition.name)
            with run.timed(condition.name):
                done = federated.run_study(
                    inner, workdir / condition.name, data_dir=data_dir, mesh=mesh
                )
            rows_of[condition.name] = _with_clean(rows_of, done.run.rows)
            run.append(_rows(condition, rows_of[condition.name]))
    run.finish(config.seeds[0])
    tables = summaries(config, run.rows)
    for name, grid in tables.items():
        grids.write(run, name, grid)
    run.table("paper.csv", comparison(config, run.rows))
    for suffix in ("png", "pdf"):
        run.figure(f"{config.study}.{suffix}", functools.partial(_draw, config, run.rows, tables))
    return Study(run, tables)


def _with_clean(
    rows_of: Mapping[str, Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The rows of a condition, with the runs without attack of the first if it has none."""
    if any(row["attack"] == federated.NO_ATTACK for row in rows) or not rows_of:
        return list(rows)
    first = next(iter(rows_of.values()))
    return [*(row for row in first if row["attack"] == federated.NO_ATTACK), *rows]


def _rows(condition: Condition, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    best, final = federated.accuracies(rows, "best"), federated.accuracies(rows, "final")
    impact = federated.impacts(rows)
    deviation, final_deviation = (federated.deviations(rows, at) for at in ("best", "final"))
    return [
        {
            "condition": condition.name,
            "value": condition.value,
            "seed": seed,
            "attack": attack,
            "rule": rule,
            "best_accuracy": best[attack, rule, seed],
            "final_accuracy": final[attack, rule, seed],
            "impact": impact.get((attack, rule, seed)),
            "deviation": deviation.get((attack, rule, seed)),
            "final_deviation": final_deviation.get((attack, rule, seed)),
        }
        for attack, rule, seed in best
    ]


def summaries(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, grids.Grid]:
    """The tables of a study by name.

    One condition: rules x attacks. Several: conditions x attacks, the mean over the rules of a
    seed.
    """
    protocol = PROTOCOLS[config.study]
    changed = ", with overrides" if config.overrides else ""
    setting = f"{protocol.title} ({config.setting}, scale {config.scale:g}{changed})"
    if len(config.conditions()) > 1:
        means: dict[tuple[str, str], list[float]] = {}
        by_seed: dict[tuple[str, str, int], list[float]] = {}
        for row in rows:
            if row["impact"] is not None:
                key = str(row["value"]), row["attack"], row["seed"]
                by_seed.setdefault(key, []).append(row["impact"])
        for (value, attack, _), impacts in by_seed.items():
            means.setdefault((value, attack), []).append(float(np.mean(impacts)))
        names = list(dict.fromkeys(attack for _, attack in means))
        values = [str(condition.value) for condition, _ in config.conditions()]
        title = f"{setting}: impact in %, mean over the rules"
        return {"impact": grids.Grid(title, protocol.axis, values, names, means)}
    tables = {}
    for name, title, digits in (
        ("impact", "impact in %", 1),
        ("deviation", "points, best accuracies", 2),
        ("final_deviation", "points, after the last round", 2),
    ):
        cells: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if row[name] is not None:
                cells.setdefault((row["rule"], row["attack"]), []).append(row[name])
        # Of F-FMPA the deviation counts, of the others the impact.
        is_control = {key: federated.wanted_drop(key[1]) is not None for key in cells}
        cells = {key: v for key, v in cells.items() if is_control[key] != (name == "impact")}
        if not cells:
            continue
        shown = list(dict.fromkeys(attack for _, attack in cells))
        names = list(dict.fromkeys(row["rule"] for row in rows))
        mean_row = {
            ("mean of all", attack): _means_of_seeds(rows, name, attack) for attack in shown
        }
        tables[name] = grids.Grid(
            f"{setting}: {title}", "rule", [*names, "mean of all"], shown, cells | mean_row, digits
        )
    return tables


def _means_of_seeds(rows: Sequence[Mapping[str, Any]], name: str, attack: str) -> list[float]:
    """The mean over the rules against which the attack exists, of each seed."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if row["attack"] == attack and row[name] is not None:
            by_seed.setdefault(row["seed"], []).append(row[name])
    return [float(np.mean(values)) for values in by_seed.values()]


# Of the paper's tables our reference has these facts and not the single cells. Ratio: the mean
# impact of I-FMPA over that of the attack, over the paper's three data sets.
_RATIOS = {
    "fang": 2.2, "lie": 2.1, "ipm": 2.7, "mpaf": 1.85, "min_max": 1.36, "min_sum": 1.36,
}  # fmt: skip
_SOURCE = "Zhang et al., IJCAI 2023"


def comparison(config: Config, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our values beside those of the paper that are known here: quantity, ours, paper, note."""
    made: list[dict[str, Any]] = []

    def add(quantity: str, ours: float, paper: float, note: str) -> None:
        made.append(
            {"quantity": quantity, "ours": ours, "paper": paper, "note": note, "source": _SOURCE}
        )

    if config.study == "impact":
        cells = _mean_cells(rows, "impact")
        mine = {rule: value for (rule, attack), value in cells.items() if attack == OURS}
        for rival, paper in _RATIOS.items():
            theirs = {rule: value for (rule, attack), value in cells.items() if attack == rival}
            common = [rule for rule in theirs if rule in mine]
            if common:
                below = np.mean([theirs[rule] for rule in common])
                ratio = np.mean([mine[rule] for rule in common]) / below if below > 0 else np.nan
                if np.isfinite(ratio):
                    add(
                        f"mean impact of {OURS} / {rival}", float(ratio), paper,
                        "paper: three data sets",
                    )  # fmt: skip
        rivals = {rule: [] for rule in mine}
        for (rule, attack), value in cells.items():
            if attack != OURS and rule in rivals:
                rivals[rule].append(value)
        won = [mine[rule] >= max(values) for rule, values in rivals.items() if values]
        if won:
            add(f"share of cells that {OURS} wins", float(np.mean(won)), 20 / 24, "paper: 20 of 24")
        clean = _mean_cells(rows, "best_accuracy")
        for rule, paper in (("trimmed_mean", 96.7), ("krum", 88.9)):
            value = clean.get((rule, federated.NO_ATTACK))
            if config.setting == "mnist_fc" and value is not None:
                add(f"accuracy without attack, {rule}", 100 * value, paper, "MNIST-FC")
    if config.study == "deviation":
        cells = _mean_cells(rows, "deviation")
        if cells:
            share = float(np.mean([value < 1 for value in cells.values()]))
            add("share of deviations below 1 point", share, 22 / 27, "paper: 22 of 27")
    return made


def _mean_cells(rows: Sequence[Mapping[str, Any]], name: str) -> dict[tuple[str, str], float]:
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row[name] is not None:
            cells.setdefault((row["rule"], row["attack"]), []).append(row[name])
    return {key: float(np.mean(values)) for key, values in cells.items()}


def _draw(
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    tables: Mapping[str, grids.Grid],
    path: pathlib.Path,
) -> None:
    protocol = PROTOCOLS[config.study]
    if protocol.axis:
        fmpa_figures.panels(rows, protocol.title, protocol.axis, path)
    elif tables:
        fmpa_figures.bars(next(iter(tables.values())), path)


def print_study(study: Study, console: Console | None = None) -> None:
    """Prints the tables and where the files are."""
    console = console or Console()
    for grid in study.grids.values():
        console.print(grids.to_rich(grid, console.width))
    console.print(
        f"Files: {study.run.workdir}/ (results.csv, {', '.join(study.grids)} as .csv .md .tex, "
        "paper.csv, figures/*.png and .pdf, a folder a condition)"
    )
