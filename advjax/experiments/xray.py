"""Detectors on a zoo: Model X-ray's planes, read in many ways, and its rivals.

A cell is a model under one detector; for Model X-ray also at one density and one expansion. What it
leaves is the shares of the classes on each plane, so that orders, limits, numbers of planes and
thresholds are re-readings.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from advjax import backdoor, data, detectors
from advjax.boundary import Survey
from advjax.core import checks, io, parallel, random
from advjax.core.io import PathLike, atomic_write
from advjax.core.typing import Array, Key
from advjax.detectors import Verdict
from advjax.experiments import zoo as zoos
from advjax.experiments.runs import Run

KEY_COLUMNS = ("detector", "model", "density", "expansion")
XRAY = "model_xray"
DETECTORS = (XRAY, "neural_cleanse", "mm_bd", "mntd")
READINGS = {"xray_entropy": "entropy", "xray_area": "area"}
# Su et al. (2024), averages of Table 2.
PUBLISHED = {"xray_entropy": 0.985, "xray_area": 0.978}


@dataclasses.dataclass(frozen=True)
class Config:
    """A detection study.

    Attributes:
      zoo: folder of a zoo (launch/backdoor_zoo.py); "" trains a small one on the digits.
      detectors: names from `DETECTORS`.
      with_failed: also models that do not count, see `backdoor.verdicts`.
      num_images: clean test images that the detectors get.
      num_planes: planes of Model X-ray.
      densities: points a side of a plane; each is a survey of its own.
      expansions: how far planes reach beyond their images; each is a survey of its own.
      normalised: planes are orthonormal in the space of normalised images.
      clip: clips the points of planes to [0, 1]; not the published method.
      orders: of the Renyi entropy; the first is the one of the tables.
      limits: of the area; the first is the one of the tables.
      own: whose region is an image's own: "true", "predicted" or "connected".
      cleanse_rounds: rounds of Neural Cleanse.
      null: distribution of MM-BD.
      num_shadows: of MNTD, a kind.
      num_shadow_images: clean training images of MNTD.
      seed: of everything.
    """

    zoo: str = ""
    detectors: tuple[str, ...] = (XRAY,)
    with_failed: bool = False
    num_images: int = 60
    num_planes: int = 20
    densities: tuple[int, ...] = (100,)
    expansions: tuple[float, ...] = (5.0,)
    normalised: bool = False
    clip: bool = False
    orders: tuple[float, ...] = (10.0, 1.0, 2.0, 5.0)
    limits: tuple[float, ...] = (0.5, 0.3, 0.4, 0.6, 0.7)
    own: str = "true"
    cleanse_rounds: int = 1000
    null: str = "gamma"
    num_shadows: int = 256
    num_shadow_images: int = 1000
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        for name in self.detectors:
            checks.known("xray", "detector", name, DETECTORS)
        checks.known("xray", "own", self.own, detectors.planes.OWN)
        checks.known("xray", "null", self.null, detectors.NULLS)
        for name in ("num_planes", "cleanse_rounds", "num_shadow_images"):
            checks.at_least("xray", name, getattr(self, name), 1)
        checks.at_least("xray", "num_shadows", self.num_shadows, 2)  # one of each kind is held out
        checks.at_least("xray", "num_images", self.num_images, 3)
        for density in self.densities:
            checks.at_least("xray", "density", density, 2)
        for kind in ("expansions", "orders", "limits"):
            checks.non_negative("xray", kind, np.asarray(getattr(self, kind)))
        for kind in ("detectors", "densities", "expansions", "orders", "limits"):
            if not getattr(self, kind):
                raise ValueError(f"xray: need at least one of {kind}, got none.")
        for kind in ("detectors", "densities", "expansions"):
            named = [
                f"{value:g}" if kind == "expansions" else value for value in getattr(self, kind)
            ]
            if len(set(named)) < len(named):  # each has files of its name
                raise ValueError(f"xray: need {kind} that differ, got {getattr(self, kind)}.")


def smaller(config: Config) -> Config:
    """The same on a tiny zoo of digits, in seconds."""
    return dataclasses.replace(
        config, zoo="", detectors=config.detectors[:1], num_planes=4, densities=(20,),
        expansions=config.expansions[:1], cleanse_rounds=20, num_shadows=4, num_shadow_images=200,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      summaries: a `detectors.Summary` by detector or reading.
      readings: one row an order, limit, number of planes, density and expansion.
      num_failed: how often Model X-ray failed at further densities and expansions.
    """

    run: Run
    summaries: Mapping[str, detectors.Summary]
    readings: list[dict[str, Any]]
    num_failed: int


def run_study(
    config: Config, workdir: PathLike, *, data_dir: PathLike | None = None, is_small: bool = False
) -> Study:
    """Runs what is missing of a study and writes its tables and figures.

    What failed is tried again. The models of the first run are written down in zoo.json; with
    others the folder does not go on.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.
      is_small: the zoo that is trained where none is given is a tiny one.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one, no zoo where one should be, one
        without clean or without infected models, a folder with results of other models.
    """
    config.check()
    folder = pathlib.Path(config.zoo or pathlib.Path(workdir) / "zoo").expanduser()
    if config.zoo:
        zoo_config = zoos.read_config(folder)  # before a folder is written
        zoo = _load_zoo(config, folder)
        run = _open(config, workdir)
    else:
        run = _open(config, workdir)  # first: in one of another configuration nothing is trained
        zoo_config = _own_zoo(is_small)
        zoos.run_study(zoo_config, folder, data_dir=data_dir)
        zoo = _load_zoo(config, folder)
    _check_same_models(run, zoo, folder)
    run.forget(lambda row: bool(row["error"]))
    x, y = clean_images(zoo_config.dataset, config.num_images, config.seed, data_dir)
    cells = list(_cells(config))
    total = len(zoo) * len(cells)
    with tqdm(total=total, desc="models", disable=not parallel.is_main_process()) as bar:
        for cell in cells:
            detector = None
            for index, name in enumerate(zoo.names):
                bar.set_postfix_str(f"{cell.detector} {name}")
                if not run.is_done([(cell.detector, name, cell.density, cell.expansion)]):
                    if detector is None:  # MNTD trains its shadows here
                        with run.timed(f"prepare {cell.detector}"):
                            detector = _detector(config, cell, zoo, zoo_config, data_dir)
                    with run.timed(cell.detector):
                        _judge(config, run, zoo, index, cell, detector, x, y)
                bar.update()
    study = read(config, run)
    run.finish(config.seed, zoo=str(folder), zoo_config=dataclasses.asdict(zoo_config))
    return study


def _open(config: Config, workdir: PathLike) -> Run:
    return Run(
        workdir, config, study="xray", key_columns=KEY_COLUMNS,
        may_change=("detectors", "densities", "expansions", "orders", "limits"),
    )  # fmt: skip


def _load_zoo(config: Config, folder: pathlib.Path) -> backdoor.Zoo:
    zoo = zoos.load_zoo(folder, with_failed=config.with_failed)
    num_infected = int(zoo.labels.sum())
    num_clean = len(zoo) - num_infected
    if not num_clean or not num_infected:
        raise ValueError(
            f"xray: need clean and infected models, got {num_clean} and {num_infected} in {folder}"
            + ("." if config.with_failed else " that count; --with_failed takes those that do not.")
        )
    return zoo


def _check_same_models(run: Run, zoo: backdoor.Zoo, folder: pathlib.Path) -> None:
    """Writes down which models a run is of, or compares: names stay where a zoo is made again."""
    path = run.workdir / "zoo.json"
    ours = {member.name: member._asdict() for member in zoo.members}
    if run.rows and path.exists():  # older folders have none
        theirs = io.read_json(path)
        for name in (*ours, *theirs):
            if json.dumps(ours.get(name)) != json.dumps(theirs.get(name)):
                raise ValueError(
                    f"{run.workdir} holds results of other models than are now in {folder}, such "
                    f"as another {name}; use another --workdir."
                )
    elif parallel.is_main_process():
        io.write_json(path, ours)


def _own_zoo(is_small: bool) -> backdoor.ZooConfig:
    config = backdoor.ZooConfig(
        attacks=("badnets", "blended"), num_clean=8, num_infected=8, num_epochs=30, batch_size=64,
        optimizer="adam", learning_rate=1e-3, group_size=8,
    )  # fmt: skip
    return zoos.smaller(config) if is_small else config


def clean_images(
    dataset: str, num_images: int, seed: int, data_dir: PathLike | None = None
) -> tuple[Array, Array]:
    """Test images for the detectors, the classes in turn: f32[n, h, w, c] and int32[n].

    Args:
      dataset: name for `data.load`.
      num_images: how many.
      seed: which.
      data_dir: prepared tfds data.
    """
    test = data.load(dataset, "test", data_dir=data_dir)
    order = np.random.default_rng(seed).permutation(len(test))
    labels = np.asarray(test.labels)[order]
    # The first image of each class, then the second of each, ...
    turn = np.zeros(len(labels), int)
    for label in np.unique(labels):
        turn[labels == label] = np.arange(np.sum(labels == label))
    chosen = order[np.argsort(turn, kind="stable")[:num_images]]
    images = np.asarray(test.images)[chosen]
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    return images, np.asarray(test.labels)[chosen].astype(np.int32)


class _Cell(NamedTuple):
    detector: str
    density: int = 0  # 0 and 0.0 for detectors without planes
    expansion: float = 0.0


def _cell_of(row: Mapping[str, Any]) -> _Cell:
    return _Cell(row["detector"], row["density"], row["expansion"])


def _cells(config: Config) -> Iterator[_Cell]:
    for name in config.detectors:
        if name != XRAY:
            yield _Cell(name)
            continue
        for expansion in config.expansions:
            for density in config.densities:
                yield _Cell(name, density, expansion)


def _detector(config: Config, cell: _Cell, zoo, zoo_config, data_dir):
    num_classes = data.info(zoo_config.dataset).num_classes
    if cell.detector == XRAY:
        std = np.asarray(zoo_config.std, np.float32) if config.normalised else 1.0
        return functools.partial(
            detectors.model_xray, num_classes=num_classes, num_planes=config.num_planes,
            density=cell.density, expansion=cell.expansion, std=std, clip=config.clip,
            own=config.own,
        )  # fmt: skip
    if cell.detector == "neural_cleanse":
        return functools.partial(
            detectors.neural_cleanse, num_classes=num_classes, num_steps=config.cleanse_rounds
        )
    if cell.detector == "mm_bd":
        return functools.partial(detectors.mm_bd, num_classes=num_classes, null=config.null)
    train = data.load(zoo_config.dataset, "train", data_dir=data_dir)
    meta = detectors.train_mntd(
        _key(config, "mntd"), zoo.module,
        train.take(min(config.num_shadow_images, len(train))), num_shadows=config.num_shadows,
    )  # fmt: skip
    return functools.partial(detectors.mntd, num_classes=num_classes, meta=meta)


def _key(config: Config, name: str) -> Key:
    return random.named(jax.random.key(config.seed), name)


def _survey_path(run: Run, row: Mapping[str, Any]) -> pathlib.Path:
    name = f"{row['model']}_{row['density']}_{row['expansion']:g}.npz"
    return run.workdir / "surveys" / name


def _judge(config: Config, run: Run, zoo, index, cell: _Cell, detector, x, y) -> None:
    kept = {}

    def asked(*args):
        found = detector(*args)
        kept.update(found.details)
        return found

    verdict = detectors.judge(_key(config, "detectors"), zoo, index, cell.detector, asked, x, y)
    row = {**verdict._asdict(), "density": cell.density, "expansion": cell.expansion}
    if cell.detector == XRAY and not verdict.error and parallel.is_main_process():
        path = _survey_path(run, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {name: np.asarray(kept[name]) for name in Survey._fields}
            np.savez(file, **arrays)
    run.append([row])


def _surveys(rows: Sequence[dict[str, Any]], run: Run) -> list[tuple[dict[str, Any], Survey]]:
    found = []
    for row in rows:
        if row["detector"] == XRAY and not row["error"]:
            with np.load(_survey_path(run, row)) as arrays:
                found.append((row, Survey(**arrays)))
    return found


def _stored(row: Mapping[str, Any]) -> Verdict:
    values: dict[str, Any] = {field: row[field] for field in Verdict._fields}
    return Verdict(**values)


def _verdicts(surveys, own: str, **reading) -> list[Verdict]:
    """Stored planes as verdicts of both readings."""
    verdicts = []
    for row, survey in surveys:
        for name, statistic in READINGS.items():
            said = detectors.read_survey(survey, statistic=statistic, own=own, **reading)
            verdict = _stored(row)._replace(
                detector=name, score=float(said.score), target_label=int(said.target_label)
            )
            verdicts.append(verdict)
    return verdicts


def read(config: Config, run: Run) -> Study:
    """Reads the stored rows: tables and figures, without asking any model.

    Args:
      config: the study.
      run: its folder.
    """
    cells = set(_cells(config))  # the folder may hold others, of earlier commands
    rows = [row for row in run.rows if _cell_of(row) in cells]
    surveys = _surveys(rows, run)
    base = _Cell(XRAY, config.densities[0], config.expansions[0])
    first = [(row, survey) for row, survey in surveys if _cell_of(row) == base]
    verdicts = _verdicts(first, config.own, order=config.orders[0], limit=config.limits[0])
    verdicts += [_stored(row) for row in rows if row["detector"] != XRAY]
    verdicts += [
        _stored(row)._replace(detector=name)
        for row in rows if _cell_of(row) == base and row["error"] for name in READINGS
    ]  # fmt: skip
    summaries = detectors.summarise(verdicts)
    readings = _readings(config, surveys)
    run.table("verdicts.csv", [verdict._asdict() for verdict in verdicts])
    run.table("auroc.csv", list(_table(summaries)))
    run.table("readings.csv", readings)
    if any(summary.attacks for summary in summaries.values()):
        from advjax.experiments import xray_figures  # only a run that can draw needs matplotlib

        run.figure("roc.png", functools.partial(xray_figures.roc, summaries))
        run.figure("scores.png", functools.partial(xray_figures.scores, verdicts))
        if readings:
            run.figure("readings.png", functools.partial(xray_figures.readings, readings))
    others = sum(bool(row["error"]) for row in rows if row["detector"] == XRAY)
    others -= sum(bool(row["error"]) for row in rows if _cell_of(row) == base)
    return Study(run, summaries, readings, others)


def _readings(config: Config, surveys) -> list[dict[str, Any]]:
    """One setting at a time, the others as in the tables."""
    base = {
        "order": config.orders[0], "limit": config.limits[0], "planes": config.num_planes,
        "density": config.densities[0], "expansion": config.expansions[0],
    }  # fmt: skip
    counts = sorted({n for n in (1, 2, 5, 10, 20, 50) if n < config.num_planes})
    settings = [("base", base)]
    for name, values in (
        ("order", config.orders), ("limit", config.limits), ("planes", counts),
        ("density", config.densities), ("expansion", config.expansions),
    ):  # fmt: skip
        varied = [value for value in values if value != base[name]]
        settings += [(name, {**base, name: value}) for value in varied]
    rows = []
    for varies, setting in settings:
        mine = [
            (row, Survey(*(np.asarray(part)[: setting["planes"]] for part in survey)))
            for row, survey in surveys
            if row["density"] == setting["density"] and row["expansion"] == setting["expansion"]
        ]
        verdicts = _verdicts(mine, config.own, order=setting["order"], limit=setting["limit"])
        for name, summary in detectors.summarise(verdicts, num_resamples=200).items():
            rows.extend(
                {"varies": varies, **setting, "reading": name, "attack": attack,
                 "auroc": found.auroc, "low": found.interval[0], "high": found.interval[1],
                 "threshold": found.threshold}
                for attack, found in summary.attacks.items()
            )  # fmt: skip
    return rows


def _table(summaries: Mapping[str, detectors.Summary]) -> Iterator[dict[str, Any]]:
    for name, summary in summaries.items():
        for attack, found in summary.attacks.items():
            yield {
                "detector": name, "attack": attack, "auroc": found.auroc,
                "low": found.interval[0], "high": found.interval[1],
                "threshold": found.threshold, "accuracy": found.accuracy,
                "shared_threshold": summary.threshold, "shared_accuracy": found.shared_accuracy,
                "target_hit_rate": found.hit_rate, "flagged_hit_rate": found.flagged_hit_rate,
                "clean_models": found.num_clean, "infected_models": found.num_infected,
                "seconds": summary.seconds, "clean_images": summary.num_images,
                "failed_models": summary.num_failed,
            }  # fmt: skip


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints one line a detector and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    attacks = list(
        dict.fromkeys(a for summary in study.summaries.values() for a in summary.attacks)
    )
    table = Table(
        title="AUROC against the clean models (95 % interval by bootstrap over models)",
        caption="Below 0.5 the score points the wrong way. Target: share of the models with one "
        "target whose target was named.",
    )
    for name in ("detector", *attacks, "average", "target", "seconds", "images"):
        table.add_column(name, justify="left" if name == "detector" else "right")

    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else f"{value:{form}}"

    for name, summary in study.summaries.items():
        cells = []
        for attack in attacks:
            found = summary.attacks.get(attack)
            low, high = found.interval if found else (0, 0)
            cells.append(f"{found.auroc:.2f} ({low:.2f} to {high:.2f})" if found else "")
        hits = [f.hit_rate for f in summary.attacks.values() if f.hit_rate is not None]
        table.add_row(
            name, *cells, number(summary.average),
            f"{np.mean(hits):.0%}" if hits else "", number(summary.seconds),
            str(summary.num_images),
        )  # fmt: skip
    console.print(table)
    if config.detectors[0] == XRAY:
        console.print(
            "[dim]Published averages over seven attacks on large networks: "
            + ", ".join(f"{name} {value:.3f}" for name, value in PUBLISHED.items())
            + "[/dim]"
        )
    for name, summary in study.summaries.items():
        if summary.num_failed:
            console.print(f"[yellow]{name} failed on {summary.num_failed} model(s):[/yellow] see "
                          "verdicts.csv.")  # fmt: skip
    if study.num_failed:
        console.print(f"[yellow]{XRAY} failed {study.num_failed} time(s) at further densities or "
                      "expansions:[/yellow] see results.csv.")  # fmt: skip
    console.print(
        f"Files: {study.run.workdir}/ (auroc.csv, readings.csv, verdicts.csv, surveys/, figures/)"
    )
