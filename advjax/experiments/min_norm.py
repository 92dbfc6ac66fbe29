"""Minimum-norm attacks side by side: distances, the curves they give, and a targeted grid.

Cells are attacks; each gives one row an epsilon, with the statistics of its distances beside it.
Those are over the images that the classifier answers correctly, and a failure counts as infinitely
far, so that the medians of two attacks are about the same images whatever their success.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from advjax import attacks, data, evaluation
from advjax.core import balls, checks, io, metrics, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, LogitsFn, MinNorm
from advjax.experiments import networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("attack", "epsilon")


class Entry(NamedTuple):
    """An attack of the study and the name of the norm of its distances."""

    attack: Callable[..., MinNorm]
    norm: str


def catalogue(config: "Config") -> dict[str, Entry]:
    """The attacks of the study by name.

    Args:
      config: the study, for the numbers of steps.
    """
    cw = {
        "num_steps": config.num_steps, "learning_rate": config.cw_learning_rate,
        "initial_constant": config.cw_initial_constant, "confidence": config.confidence,
    }  # fmt: skip
    part = functools.partial
    cw_l2 = part(attacks.carlini_wagner_l2, num_search_steps=config.num_search_steps, **cw)
    fab = part(attacks.fab, num_steps=config.num_steps)
    return {
        "carlini_wagner_l2": Entry(cw_l2, "l2"),
        "deepfool_l2": Entry(attacks.deepfool, "l2"),
        "fab_l2": Entry(part(fab, ball=balls.l2), "l2"),
        "ddn": Entry(part(attacks.ddn, num_steps=config.num_steps), "l2"),
        "carlini_wagner_linf": Entry(part(attacks.carlini_wagner_linf, **cw), "linf"),
        "deepfool_linf": Entry(part(attacks.deepfool, ball=balls.linf), "linf"),
        "fab_linf": Entry(fab, "linf"),
        "fab_l1": Entry(part(fab, ball=balls.l1), "l1"),
        "carlini_wagner_l0": Entry(part(attacks.carlini_wagner_l0, **cw), "l0"),
    }


@dataclasses.dataclass(frozen=True)
class Config(networks.NetworkConfig):
    """A study of distances.

    Attributes:
      attacks: names of the catalogue.
      seed: of the network and of the attacks.
      num_examples: test images that are attacked.
      epsilons_l2, epsilons_linf, epsilons_l1, epsilons_l0: radii at which the curves are read.
      num_steps: steps of the iterated attacks (for Carlini and Wagner of each constant).
      num_search_steps: constants of Carlini and Wagner's l2 attack.
      cw_learning_rate, cw_initial_constant: of Carlini and Wagner.
      confidence: kappa.
      grid: whether to draw the source class x target class picture.
    """

    attacks: tuple[str, ...] = ()
    seed: int = 0
    num_examples: int = 64
    epsilons_l2: tuple[float, ...] = tuple(round(0.05 * i, 12) for i in range(41))
    epsilons_linf: tuple[float, ...] = tuple(round(0.01 * i, 12) for i in range(31))
    epsilons_l1: tuple[float, ...] = tuple(round(0.125 * i, 12) for i in range(41))
    epsilons_l0: tuple[float, ...] = tuple(float(i) for i in range(11))
    num_steps: int = 100
    num_search_steps: int = 5
    cw_learning_rate: float = 0.1
    cw_initial_constant: float = 0.1
    confidence: float = 0.0
    grid: bool = True

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network("min_norm")
        if not self.attacks:
            raise ValueError("min_norm: need at least one attack, got none.")
        for name in self.attacks:
            checks.known("min_norm", "attack", name, tuple(catalogue(self)))
        for name in ("num_steps", "num_search_steps"):
            checks.at_least("min_norm", name, getattr(self, name), 1)
        for name in (
            "epsilons_l2", "epsilons_linf", "epsilons_l1", "epsilons_l0", "cw_learning_rate",
            "cw_initial_constant", "confidence",
        ):  # fmt: skip
            checks.non_negative("min_norm", name, getattr(self, name))
        for name in ("epsilons_l2", "epsilons_linf", "epsilons_l1", "epsilons_l0"):
            if not getattr(self, name):
                raise ValueError(f"min_norm: need at least one radius in {name}, got none.")

    def epsilons_of(self, norm: str) -> tuple[float, ...]:
        """The radii for a norm, by its name, each once."""
        return tuple(dict.fromkeys(getattr(self, f"epsilons_{norm}")))


def default_attacks() -> tuple[str, ...]:
    """All names of the catalogue."""
    return tuple(catalogue(Config()))


def smaller(config: Config) -> Config:
    """The same study in seconds: every attack, few of everything else, no grid."""
    return dataclasses.replace(
        config, num_examples=min(config.num_examples, 8), num_epochs=min(config.num_epochs, 2),
        num_steps=min(config.num_steps, 5), num_search_steps=min(config.num_search_steps, 2),
        grid=False,
    )  # fmt: skip


class Grid(NamedTuple):
    """Targeted attacks from every class to every other.

    Attributes:
      x: one image a source class, f32[k, h, w, c].
      sources: their labels, int[k].
      x_adv: f32[k, k, h, w, c]; the image itself on the diagonal.
      distance: f32[k, k]; infinite where the attack failed.
    """

    x: np.ndarray
    sources: np.ndarray
    x_adv: np.ndarray
    distance: np.ndarray


def targeted_grid(
    attack: Callable[..., MinNorm], logits_fn: LogitsFn, x: Array, y: Array, num_classes: int
) -> Grid:
    """Takes the first correctly answered image of each class to every other class.

    Args:
      attack: a minimum-norm attack that takes `targeted`.
      logits_fn: classifier.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      num_classes: k. Classes without a correctly answered image are left out.

    Returns:
      A `Grid`.
    """
    x, y = np.asarray(x), np.asarray(y)
    correct = np.asarray(metrics.is_correct(evaluation.predict(logits_fn, x), jnp.asarray(y)))
    rows = [np.flatnonzero(correct & (y == label)) for label in range(num_classes)]
    rows = [row[0] for row in rows if row.size]
    sources = y[rows]
    images = np.repeat(x[rows], num_classes, axis=0)
    targets = np.tile(np.arange(num_classes, dtype=np.int32), len(rows))
    result = jax.jit(functools.partial(attack, targeted=True))(
        jax.random.key(0), logits_fn, images, targets
    )
    shape = (len(rows), num_classes)
    return Grid(
        x[rows],
        sources,
        np.asarray(result.x_adv).reshape(*shape, *x.shape[1:]),
        np.asarray(result.distance).reshape(shape),
    )


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      clean_accuracy: of the network.
      grid: the targeted grid, or None.
    """

    run: Run
    clean_accuracy: float
    grid: Grid | None


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
        config, workdir, study="min_norm", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, test, x, y = opened[1:]
    logits_fn, clean = networks.only_classifier(config, opened, data_dir)
    is_correct = np.asarray(metrics.is_correct(evaluation.predict(logits_fn, x), y))
    entries = catalogue(config)
    with tqdm(config.attacks, desc="attacks", disable=not parallel.is_main_process()) as bar:
        for name in bar:
            bar.set_postfix(attack=name)
            entry = entries[name]
            epsilons = config.epsilons_of(entry.norm)
            if run.is_done((name, epsilon) for epsilon in epsilons):
                continue
            with run.timed(name):
                key = random.named(jax.random.key(config.seed), name)
                result = jax.device_get(jax.jit(entry.attack)(key, logits_fn, x, y))
                run.append(_rows(config, name, entry.norm, result, is_correct))
    grid = None
    if config.grid:
        everything = data.load(config.dataset, "test", data_dir=data_dir)
        some = everything.take(min(20 * test.num_classes, len(everything)))
        with run.timed("grid"):
            grid = _grid(run, entries["carlini_wagner_l2"].attack, logits_fn, some)
    study = Study(run, clean, grid)
    run.finish(config.seed)
    _draw(study, config, test.class_names)
    return study


def _grid(run: Run, attack: Callable[..., MinNorm], logits_fn: LogitsFn, some: Any) -> Grid:
    """The grid of the run folder, made if it is not there."""
    path = run.workdir / "grid.npz"
    if path.exists():
        with np.load(path) as arrays:
            return Grid(**arrays)
    grid = targeted_grid(attack, logits_fn, some.float_images(), some.labels, some.num_classes)
    if parallel.is_main_process():
        with io.atomic_write(path) as temporary:
            np.savez(temporary, **grid._asdict())
    return grid


def _rows(
    config: Config, name: str, norm: str, result: MinNorm, is_correct: np.ndarray
) -> list[dict[str, Any]]:
    epsilons = config.epsilons_of(norm)
    radii = np.asarray(epsilons, np.float32)
    curve = np.asarray(evaluation.minimal_curve(result, radii, is_correct=is_correct))
    far = np.where(result.success, result.distance, np.inf)[is_correct]
    found = far[np.isfinite(far)]
    # null where there is none: infinity is no JSON number.
    median = float(np.median(far)) if 2 * found.size > far.size else None
    summary = {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "num_examples": len(is_correct),
        "num_correct": len(far),
        "num_success": len(found),
        "median_distance": median,
        "mean_distance_of_successes": float(np.mean(found)) if found.size else None,
    }
    return [
        {
            "attack": name,
            "norm": norm,
            "epsilon": epsilon,
            "robust_accuracy": float(value),
            **summary,
        }
        for epsilon, value in zip(epsilons, curve, strict=True)
    ]


def _draw(study: Study, config: Config, class_names: Sequence[str]) -> None:
    from advjax.experiments import figures  # matplotlib is slow to import

    rows = study.run.rows
    for norm in dict.fromkeys(row["norm"] for row in rows):
        series = {}
        for name in dict.fromkeys(row["attack"] for row in rows if row["norm"] == norm):
            mine = [row for row in rows if row["attack"] == name]
            series[name] = (
                [row["epsilon"] for row in mine], [row["robust_accuracy"] for row in mine]
            )  # fmt: skip
        study.run.figure(
            f"curve_{norm}.png",
            lambda path, series=series, norm=norm: figures.lines(
                series, xlabel=f"{norm} distance", ylabel="share without an adversarial image",
                title=f"{config.dataset}, {config.model}, {rows[0]['num_examples']} images",
                path=path,
            ),
        )  # fmt: skip
    if study.grid is None:
        return
    grid = study.grid
    captions = [
        [
            "source" if source == target
            else f"{far:.2f}" if np.isfinite(far) else "failed"
            for target, far in enumerate(row)
        ]
        for source, row in zip(grid.sources, grid.distance, strict=True)
    ]  # fmt: skip
    study.run.figure(
        "grid.png",
        lambda path: figures.image_grid(
            list(grid.x_adv), captions,
            row_names=[class_names[int(s)] for s in grid.sources], column_names=class_names,
            title="Carlini and Wagner, l2: source class (rows) to target class (columns), distance",
            path=path,
        ),
    )  # fmt: skip
