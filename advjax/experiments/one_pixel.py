"""How many pixels does it take: success of the one-pixel attack by the number of pixels.

Cells are numbers of pixels, and with `num_sources` also (pixels, source class) for a picture of
every class attacked toward every other. Keys are derived from the cell's name, so order and
interruption never change a number.
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

from advjax import attacks, data, evaluation
from advjax.attacks.pixels import STRATEGIES
from advjax.core import checks, io, metrics, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Key, LogitsFn
from advjax.experiments import networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("num_pixels", "source", "target")
# Share of Kaggle's CIFAR-10 test images that one pixel moves to at least one other class: J. Su,
# D. Vargas, K. Sakurai, 2019. Only to compare with.
PUBLISHED = {1: 0.6797}
_NUM_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Config(networks.NetworkConfig):
    """A study of the one-pixel attack.

    Attributes:
      num_pixels: how many pixels may change, one cell each.
      population: individuals an image.
      generations: of the differential evolution.
      strategy: of the differential evolution, see `attacks.one_pixel`.
      epsilon: largest change of a value; 1 leaves the colour free.
      num_sources: images of each class that are attacked toward every other class; 0 for none.
      attack_batch_size: images attacked at a time, each with its population.
      seed: of the network and of the attack.
    """

    num_examples: int = 100
    num_pixels: tuple[int, ...] = (1, 3, 5)
    population: int = 400
    generations: int = 100
    strategy: str = "best1"
    epsilon: float = 1.0
    num_sources: int = 0
    attack_batch_size: int = 32
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network("one_pixel")
        if not self.num_pixels:
            raise ValueError("one_pixel: need at least one number of pixels, got none.")
        height, width = data.info(self.dataset).image_shape[:2]
        for number in self.num_pixels:
            checks.at_least("one_pixel", "num_pixels", number, 1)
            if number > height * width:
                raise ValueError(
                    f"one_pixel: need num_pixels <= {height * width} for {self.dataset}, got "
                    f"num_pixels={number}."
                )
        checks.at_least("one_pixel", "population", self.population, 4)
        checks.at_least("one_pixel", "generations", self.generations, 1)
        checks.at_least("one_pixel", "num_sources", self.num_sources, 0)
        checks.at_least("one_pixel", "attack_batch_size", self.attack_batch_size, 1)
        checks.known("one_pixel", "strategy", self.strategy, STRATEGIES)
        checks.non_negative("one_pixel", "epsilon", self.epsilon)

    @property
    def num_queries(self) -> int:
        """How often an image asks the classifier."""
        return self.population * (self.generations + 1)


def smaller(config: Config) -> Config:
    """The same study in seconds."""
    return dataclasses.replace(
        config, num_examples=min(config.num_examples, 16), num_epochs=min(config.num_epochs, 2),
        population=min(config.population, 20), generations=min(config.generations, 3),
        num_sources=min(config.num_sources, 1),
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      clean_accuracy: of the network on the images, before the wrong ones are left out.
    """

    run: Run
    clean_accuracy: float


@functools.cache  # one program for all cells that differ only by their images
def _compiled(config: Config, num_pixels: int, targeted: bool):
    attack = functools.partial(
        attacks.one_pixel, num_pixels=num_pixels, population=config.population,
        generations=config.generations, strategy=config.strategy, targeted=targeted,
    )  # fmt: skip
    return jax.jit(attack)


def attacked(config: Config, num_pixels: int, key: Key, logits_fn, x, y, *, targeted: bool):
    """Attacks images in batches; example i gets the key `fold_in(key, i)`.

    Args:
      config: the study.
      num_pixels: how many pixels may change.
      key: a key.
      logits_fn: classifier.
      x: images, f32[n, h, w, c].
      y: labels, or the targets.
      targeted: whether they are targets.

    Returns:
      Adversarial images, f32[n, h, w, c], and the classifier's answers, int32[n].
    """
    attack = _compiled(config, num_pixels, targeted)
    size = min(config.attack_batch_size, len(x))
    batches = []
    for first in range(0, len(x), size):
        rows = np.arange(first, first + size) % len(x)  # padded by repetition
        keys = random.fold_in_each(key, rows)
        batches.append(np.asarray(attack(keys, logits_fn, x[rows], y[rows], config.epsilon)))
    x_adv = np.concatenate(batches)[: len(x)]
    logits = evaluation.predict(logits_fn, x_adv, batch_size=512)
    return x_adv, np.asarray(metrics.predictions(logits))


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Runs what is missing of a study and writes its table and figures.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one, a network that gets no image right
        or whose logits are not finite.
    """
    opened = networks.open_study(
        config, workdir, study="one_pixel", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, test, x, y = opened[1:]
    logits_fn, accuracy = networks.only_classifier(config, opened, data_dir)
    correct = np.asarray(metrics.is_correct(evaluation.predict(logits_fn, x, batch_size=512), y))
    if not correct.any():
        raise ValueError(f"one_pixel: the network gets none of the {len(y)} images right.")
    x, y = x[correct], y[correct]
    with tqdm(config.num_pixels, desc="pixels", disable=not parallel.is_main_process()) as bar:
        for num_pixels in bar:
            _untargeted(config, run, num_pixels, logits_fn, x, y)
            for source in range(test.num_classes if config.num_sources else 0):
                _toward_all(config, run, num_pixels, logits_fn, x, y, source, test.num_classes)
    run.finish(config.seed)
    _draw(config, run, test.class_names)
    return Study(run, accuracy)


def _row(config: Config, num_pixels: int, source, target, answers, fooled) -> Mapping[str, Any]:
    return {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "num_pixels": num_pixels,
        "source": source,
        "target": target,
        "num_queries": config.num_queries,
        "num_images": len(fooled),
        "num_fooled": int(fooled.sum()),
        "num_not_answered": int((answers < 0).sum()),
        "success_rate": float(fooled.mean()),
    }


def _untargeted(config: Config, run: Run, num_pixels: int, logits_fn: LogitsFn, x, y) -> None:
    """One row, and a file with the first images that are fooled."""
    if run.is_done([(num_pixels, None, None)]):
        return
    with run.timed(f"{num_pixels} pixels"):
        key = random.named(jax.random.key(config.seed), f"untargeted {num_pixels}")
        x_adv, answers = attacked(config, num_pixels, key, logits_fn, x, y, targeted=False)
    fooled = (answers >= 0) & (answers != y)
    shown = np.flatnonzero(fooled)[:_NUM_SHOWN]
    if parallel.is_main_process():
        with io.atomic_write(_examples_path(run, num_pixels)) as path, path.open("wb") as file:
            np.savez(file, x=x[shown], x_adv=x_adv[shown], y=y[shown], answers=answers[shown])
    run.append([_row(config, num_pixels, None, None, answers, fooled)])


def _examples_path(run: Run, num_pixels: int) -> pathlib.Path:
    return run.workdir / "examples" / f"{num_pixels}_pixels.npz"


def _toward_all(
    config: Config, run: Run, num_pixels: int, logits_fn: LogitsFn, x, y, source, num_classes
) -> None:
    """One row a target class: images of the source class attacked toward each other class."""
    targets = [target for target in range(num_classes) if target != source]
    chosen = np.flatnonzero(y == source)[: config.num_sources]
    if not chosen.size or run.is_done((num_pixels, source, target) for target in targets):
        return
    with run.timed(f"{num_pixels} pixels, targeted"):
        key = random.named(jax.random.key(config.seed), f"from {source} {num_pixels}")
        wanted = np.repeat(np.array(targets, np.int32), len(chosen))
        _, answers = attacked(
            config, num_pixels, key, logits_fn, x[np.tile(chosen, len(targets))], wanted,
            targeted=True,
        )  # fmt: skip
    run.append(
        _row(config, num_pixels, source, target, answers[mine], answers[mine] == target)
        for target in targets
        for mine in [wanted == target]
    )


def _draw(config: Config, run: Run, class_names: Sequence[str]) -> None:
    rows = [row for row in run.rows if row["source"] is None]
    run.figure("success.png", functools.partial(draw_success, rows))
    shown = {number: np.load(_examples_path(run, number)) for number in config.num_pixels}
    run.figure("examples.png", functools.partial(draw_examples, shown, class_names))
    grids = targeted_grids(run.rows, len(class_names))
    if grids:
        run.figure("targeted.png", functools.partial(draw_grids, grids, class_names))


def targeted_grids(rows: Sequence[Mapping[str, Any]], num_classes: int) -> dict[int, np.ndarray]:
    """Success rates [source, target] by the number of pixels; NaN where nothing was attacked."""
    grids: dict[int, np.ndarray] = {}
    for row in rows:
        if row["source"] is not None:
            empty = np.full((num_classes, num_classes), np.nan)
            grid = grids.setdefault(row["num_pixels"], empty)
            grid[row["source"], row["target"]] = row["success_rate"]
    return grids


def draw_success(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Success rate against the number of pixels.

    Args:
      rows: the untargeted rows.
      path: where to.
    """
    from advjax.experiments.figures import plt  # matplotlib is slow to import

    rows = sorted(rows, key=lambda row: row["num_pixels"])
    figure, axis = plt.subplots(figsize=(5.2, 4.0), layout="constrained")
    axis.plot([r["num_pixels"] for r in rows], [r["success_rate"] for r in rows], marker="o")
    axis.set(xlabel="pixels changed", ylabel="success rate", ylim=(-0.02, 1.02))
    axis.set_xticks([row["num_pixels"] for row in rows])
    axis.grid(alpha=0.3)
    first = rows[0]
    axis.set_title(
        f"{first['dataset']}, {first['model']}, {first['num_images']} images, "
        f"{first['num_queries']} queries each",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_examples(
    shown: Mapping[int, Mapping[str, Array]], class_names: Sequence[str], path: pathlib.Path
) -> None:
    """Fooled images, one row a number of pixels, with a ring around each pixel that changed.

    Args:
      shown: by number of pixels x, x_adv, y and answers.
      class_names: a name a class.
      path: where to.
    """
    from advjax.experiments import figures

    plt = figures.plt
    figure, axes = plt.subplots(
        len(shown), _NUM_SHOWN, figsize=(1.6 * _NUM_SHOWN, 1.9 * len(shown)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, (number, images) in zip(axes, shown.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        line[0].set_title(f"pixels: {number}, none fooled", fontsize=8)
        for i, (axis, image) in enumerate(zip(line, images["x_adv"], strict=False)):
            title = " → ".join(class_names[int(images[which][i])] for which in ("y", "answers"))
            title = title if i else f"pixels: {number}, {title}"
            figures._show(axis, image, title, **figures._grey(image))
            rows, columns = np.nonzero(np.any(image != images["x"][i], axis=-1))
            axis.scatter(columns, rows, s=90, facecolors="none", edgecolors="red", linewidths=1.2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_grids(
    grids: Mapping[int, np.ndarray], class_names: Sequence[str], path: pathlib.Path
) -> None:
    """Source class by target class, one panel a number of pixels.

    Args:
      grids: success rates [source, target] by the number of pixels.
      class_names: a name a class.
      path: where to.
    """
    from advjax.experiments.figures import plt

    figure, axes = plt.subplots(
        1, len(grids), figsize=(4.2 * len(grids), 4.0), squeeze=False, layout="constrained"
    )
    ticks = range(len(class_names))
    for axis, (number, grid) in zip(axes[0], grids.items(), strict=True):
        picture = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis")
        axis.set(xlabel="target class", title=f"pixels: {number}", xticks=ticks, yticks=ticks)
        axis.set_xticklabels(class_names, rotation=90, fontsize=7)
        axis.set_yticklabels(class_names, fontsize=7)
    axes[0, 0].set_ylabel("source class")
    figure.colorbar(picture, ax=axes, label="success rate")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints success by the number of pixels and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    table = Table(
        title=f"Success of the one-pixel attack: {config.dataset}, {config.model}, clean "
        f"{study.clean_accuracy:.1%}, {config.num_queries} queries an image"
    )
    columns = ("pixels", "images", "fooled", "success", "published (CIFAR-10)", "toward a class")
    for column in columns:
        table.add_column(column, justify="right")
    for row in study.run.rows:
        if row["source"] is None:
            number = row["num_pixels"]
            mine = [
                r["success_rate"]
                for r in study.run.rows
                if r["num_pixels"] == number and r["source"] is not None
            ]
            published = f"{PUBLISHED[number]:.1%}" if number in PUBLISHED else ""
            table.add_row(
                str(number), str(row["num_images"]), str(row["num_fooled"]),
                f"{row['success_rate']:.1%}", published, f"{np.mean(mine):.1%}" if mine else "",
            )  # fmt: skip
    console.print(table)
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")
