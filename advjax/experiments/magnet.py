"""MagNet: what it does to attackers who do not know it, know one of many like it, or know it.

Black box: images made for the bare classifier. Gray box: made for the classifier behind one of K
reformers, shown to all the others. White box: made for the classifier behind the reformer, and
once more past the detectors too. Cells are attacks; keys are derived from a cell's name, so order
and interruption never change a number.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from advjax import defenses
from advjax.core import balls, checks, metrics, parallel
from advjax.core.io import PathLike
from advjax.core.typing import Array, LogitsFn
from advjax.experiments import defended, networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("setting", "attack", "strength", "source", "target")
SETTINGS = ("black box", "white box", "gray box")
ATTACKS = ("fgsm", "bim", "deepfool", "carlini_wagner_l2", "carlini_wagner_linf")


@dataclasses.dataclass(frozen=True)
class Config(defended.DefenceConfig):
    """A study of MagNet.

    Attributes:
      settings: names from `SETTINGS`.
      attacks: of the black box, names from `ATTACKS`.
      epsilons: radii of fgsm and bim in linf.
      confidences: kappas of Carlini and Wagner's l2 attack in the black box.
      linf_confidences: kappas of their linf attack in the black box.
      temperatures: of the detectors by divergence; published are 10 and 40, none for MNIST.
      false_positive_rate: budget of each detector on the held-out images.
      noise: standard deviation of the autoencoders' training noise.
      ae_num_epochs: epochs of the autoencoders.
      ae_batch_size: their images a step.
      ae_learning_rate: of their Adam, with a cosine schedule to 0.
      num_autoencoders: K of the gray box.
      alpha: weight of their diversity.
      gray_widths: channels of their encoders.
      gray_num_examples: test images in the gray box.
    """

    settings: tuple[str, ...] = SETTINGS
    attacks: tuple[str, ...] = ATTACKS
    epsilons: tuple[float, ...] = (0.1, 0.2)
    confidences: tuple[float, ...] = (0.0, 10.0, 20.0, 30.0, 40.0)
    linf_confidences: tuple[float, ...] = (0.0,)
    temperatures: tuple[float, ...] = (10.0, 40.0)
    false_positive_rate: float = 0.001
    noise: float = 0.1
    ae_num_epochs: int = 100
    ae_batch_size: int = 256
    ae_learning_rate: float = 1e-3
    num_autoencoders: int = 8
    alpha: float = 0.2
    gray_widths: tuple[int, ...] = (3,)
    gray_num_examples: int = 100

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_defence("magnet")
        for name in self.settings:
            checks.known("magnet", "setting", name, SETTINGS)
        if not self.settings:
            raise ValueError("magnet: need at least one setting, got none.")
        for name in self.attacks:
            checks.known("magnet", "attack", name, ATTACKS)
        for name in (
            "epsilons", "confidences", "linf_confidences", "noise", "ae_learning_rate"
        ):  # fmt: skip
            checks.non_negative("magnet", name, getattr(self, name))
        for name in ("ae_num_epochs", "ae_batch_size", "num_autoencoders", "gray_num_examples"):
            checks.at_least("magnet", name, getattr(self, name), 1)
        if not 0 <= self.false_positive_rate <= 1:
            raise ValueError(
                "magnet: need 0 <= false_positive_rate <= 1, got false_positive_rate="
                f"{self.false_positive_rate}."
            )
        if not 0 <= self.alpha < 1:
            raise ValueError(f"magnet: need 0 <= alpha < 1, got alpha={self.alpha}.")
        if any(not 0 < temperature < math.inf for temperature in self.temperatures):
            raise ValueError(
                f"magnet: need finite positive temperatures, got temperatures={self.temperatures}."
            )
        if not self.gray_widths or min(self.gray_widths) < 1:
            raise ValueError(f"magnet: need gray_widths >= 1, got {self.gray_widths}.")

    @property
    def variants(self) -> list[tuple[str, float]]:
        """Attack and strength of every row of the black box."""
        strengths = {
            "fgsm": self.epsilons, "bim": self.epsilons, "deepfool": (0.0,),
            "carlini_wagner_l2": self.confidences, "carlini_wagner_linf": self.linf_confidences,
        }  # fmt: skip
        return [
            ("none", 0.0),
            *((name, strength) for name in self.attacks for strength in strengths[name]),
        ]


def smaller(config: Config) -> Config:
    """The same study in a minute; without the white box, whose programs take long to compile."""
    quick = tuple(name for name in config.settings if name != "white box")
    return dataclasses.replace(
        config, settings=quick or config.settings, dataset="digits", model="mlp", weights="",
        num_train=800, num_held_out=100, num_examples=40, num_epochs=10,
        attacks=config.attacks[:1], epsilons=config.epsilons[:1], temperatures=(),
        false_positive_rate=0.01, ae_num_epochs=20, ae_batch_size=64, ae_learning_rate=0.03,
        num_autoencoders=min(config.num_autoencoders, 2), gray_num_examples=20, cw_num_steps=30,
        cw_num_search_steps=2,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
    """

    run: Run


class Defence(NamedTuple):
    """A classifier and the MagNet before it.

    Attributes:
      logits_fn: the classifier.
      reformed: the classifier behind the reformer.
      detectors: images to scores.
      thresholds: one a detector.
    """

    logits_fn: LogitsFn
    reformed: LogitsFn
    detectors: tuple[Partial, ...]
    thresholds: Array


@jax.jit
def _judge(defence: Defence, x: Array, y: Array) -> tuple[Array, Array, Array]:
    return (
        metrics.is_correct(defence.logits_fn(x), y),
        metrics.is_correct(defence.reformed(x), y),
        defenses.magnet_detects(defence.detectors, defence.thresholds, x),
    )


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
        config, workdir, study="magnet", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, x, y = opened.run, opened.x, opened.y
    splits = defended.load_splits(config, data_dir)
    with run.timed("classifier"):
        logits_fn = defended.fit_classifier(config, "classifier", config.model, splits.train, run)
    networks.clean_accuracy("magnet", config.model, logits_fn, x, y)
    entries = defended.catalogue(config)

    def measure(setting, name, strength, target_fn, labels, defences, source="") -> None:
        """The rows of one attack: one for each defence, by its name."""
        if run.is_done((setting, name, strength, source, target) for target in defences):
            return
        images = x[: len(labels)]
        with run.timed(setting):
            x_adv = defended.attacked(
                entries[name], config.key(f"{setting} {name} {strength} {source}"), target_fn,
                images, labels, strength, batch_size=config.attack_batch_size,
            )  # fmt: skip
            distance = float(np.mean(balls.l2.distance(x_adv, images)))
            run.append(
                {
                    "setting": setting, "attack": name, "strength": strength, "source": source,
                    "target": target, "num_examples": len(images), "mean_distance_l2": distance,
                    **shares(config, judged, x_adv, y[: len(images)]),
                }
                for target, judged in defences.items()
            )  # fmt: skip

    if set(config.settings) != {"gray box"}:
        with run.timed("autoencoders"):
            defence = trained_defence(config, logits_fn, splits, run)
        only, batch_size = {"": defence}, config.attack_batch_size
        variants = config.variants if "black box" in config.settings else []
        with tqdm(variants, desc="black box", disable=not parallel.is_main_process()) as bar:
            for name, strength in bar:
                bar.set_postfix(attack=name, strength=strength)
                measure("black box", name, strength, logits_fn, y, only)
        if "white box" in config.settings:
            measure("white box", "carlini_wagner_l2", 0.0, defence.reformed, y, only)
            rejecting = defenses.magnet_rejecting(
                defence.reformed, defence.detectors, defence.thresholds
            )
            measure(
                "white box, past the detectors", "carlini_wagner_l2_targeted", 0.0, rejecting,
                runners_up(defence.reformed, x, y, batch_size), only,
            )  # fmt: skip
    if "gray box" in config.settings:
        with run.timed("autoencoders"):
            family = _family(config, logits_fn, splits, run)
        labels = y[: config.gray_num_examples]
        measure("gray box", "none", 0.0, logits_fn, labels, family)
        sources = [name for name in family if name != "random"]
        for source in tqdm(sources, desc="gray box", disable=not parallel.is_main_process()):
            measure(
                "gray box", "carlini_wagner_l2", 0.0, family[source].reformed, labels, family,
                source,
            )  # fmt: skip
    study = Study(run)
    run.finish(config.seed)
    _draw(study, config)
    return study


def shares(config: Config, defence: Defence, x: Array, y: Array) -> dict[str, float]:
    """Accuracies on some images; MagNet is right where it rejects or answers the label.

    Args:
      config: the study.
      defence: what they are shown to.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
    """
    undefended, reformed, detected = defended.in_batches(
        functools.partial(_judge, defence), config.attack_batch_size, x, y
    )
    return {
        "undefended": float(undefended.mean()),
        "reformed": float(reformed.mean()),
        "detected": float(detected.mean()),
        "defended": float((detected | reformed).mean()),
    }


@jax.jit
def _best_others(logits_fn: LogitsFn, x: Array, y: Array) -> Array:
    logits = logits_fn(x)
    is_label = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    return jnp.argmax(jnp.where(is_label, -jnp.inf, logits), axis=-1).astype(y.dtype)


def runners_up(logits_fn: LogitsFn, x: Array, y: Array, batch_size: int) -> np.ndarray:
    """The likeliest class of each image beside its label, a target for attacks, int32[n].

    Args:
      logits_fn: classifier.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      batch_size: images at a time.
    """
    return defended.in_batches(functools.partial(_best_others, logits_fn), batch_size, x, y)


def _autoencoder_settings(config: Config, num_examples: int, run: Run, name: str) -> dict[str, Any]:
    batch_size = min(config.ae_batch_size, num_examples)
    num_steps = config.ae_num_epochs * (num_examples // batch_size)
    schedule = optax.cosine_decay_schedule(config.ae_learning_rate, num_steps)
    return {
        "noise": config.noise,
        "optimizer": optax.adam(schedule),
        "num_epochs": config.ae_num_epochs,
        "batch_size": batch_size,
        "checkpoint_dir": run.workdir / "checkpoints" / name,
    }


def trained_defence(
    config: Config, logits_fn: LogitsFn, splits: defended.Splits, run: Run
) -> Defence:
    """MagNet for MNIST: detectors I and II by error, detector I as reformer, and divergences.

    Args:
      config: the study.
      logits_fn: the classifier.
      splits: what the autoencoders are trained on, and what the thresholds are from.
      run: the run folder, which holds the checkpoints.
    """
    first, second = (
        defenses.train_autoencoder(
            config.key(name), defenses.Autoencoder(widths), splits.train,
            **_autoencoder_settings(config, len(splits.train), run, name),
        )
        for name, widths in (("detector I", (3, 3)), ("detector II", (3,)))
    )  # fmt: skip
    detectors = (
        defenses.error_detector(first, p=2),
        defenses.error_detector(second, p=1),
        *(
            defenses.divergence_detector(logits_fn, first, temperature=temperature)
            for temperature in config.temperatures
        ),
    )
    thresholds = _thresholds(config, detectors, splits)
    return Defence(logits_fn, defenses.magnet(logits_fn, first), detectors, thresholds)


def _thresholds(config: Config, detectors: Sequence[Partial], splits: defended.Splits) -> Array:
    return defenses.thresholds(
        detectors, splits.held_out.float_images(), config.false_positive_rate,
        batch_size=config.attack_batch_size,
    )  # fmt: skip


def _family(
    config: Config, logits_fn: LogitsFn, splits: defended.Splits, run: Run
) -> dict[str, Defence]:
    """K defences by number, each with its own reformer and detector by its error, and a random one.

    The random one draws a reformer for each image; its detector is that of the first.
    """
    stack = defenses.train_autoencoders(
        config.key("family"), defenses.Autoencoder(config.gray_widths), splits.train,
        num_autoencoders=config.num_autoencoders, alpha=config.alpha,
        **_autoencoder_settings(config, len(splits.train), run, "family"),
    )  # fmt: skip
    family = {}
    for i in range(config.num_autoencoders):
        autoencoder = defenses.member(stack, i)
        detectors = (defenses.error_detector(autoencoder, p=1),)
        family[str(i + 1)] = Defence(
            logits_fn, defenses.magnet(logits_fn, autoencoder), detectors,
            _thresholds(config, detectors, splits),
        )  # fmt: skip
    random = defenses.magnet(logits_fn, stack, key=config.key("random"))
    return family | {"random": family["1"]._replace(reformed=random)}


def matrix(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A table of the gray box: f64[sources, targets], and the names of the targets.

    Args:
      rows: rows of the study.
      column: "reformed" or "defended".
    """
    gray = [row for row in rows if row["setting"] == "gray box" and row["source"]]
    value = {(row["source"], row["target"]): row[column] for row in gray}
    sources = tuple(dict.fromkeys(row["source"] for row in gray))
    targets = (*sources, "random")
    return np.array([[value[s, t] for t in targets] for s in sources]), targets


def _draw(study: Study, config: Config) -> None:
    run = study.run
    if "gray box" not in config.settings:
        return
    from advjax.experiments import defended_figures  # matplotlib is slow to import

    values, targets = matrix(run.rows, "reformed")
    run.table(
        "gray_box.csv",
        [
            {"source": str(i + 1), **dict(zip(targets, row.tolist(), strict=True))}
            for i, row in enumerate(values)
        ],
    )
    run.figure(
        "gray_box.png",
        functools.partial(
            defended_figures.accuracy_matrix, values, targets[:-1], targets,
            f"{config.dataset}: accuracy behind reformers, images made against one of them",
        ),
    )  # fmt: skip


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints a line an attack, the gray box, and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    table = Table(
        title=f"MagNet: {config.dataset}, {config.model}, {rows[0]['num_examples']} images",
        caption="Defended: rejected, or answered correctly when reformed.",
    )
    table.add_column("setting")
    table.add_column("attack")
    for name in ("L2 distance", "undefended", "reformed", "rejected", "defended"):
        table.add_column(name, justify="right")
    for row in rows:
        if row["setting"] != "gray box":
            shares = (row[c] for c in ("undefended", "reformed", "detected", "defended"))
            table.add_row(
                row["setting"], defended.label(row["attack"], row["strength"]),
                f"{row['mean_distance_l2']:.2f}", *(f"{share:.1%}" for share in shares),
            )  # fmt: skip
    if table.row_count:
        console.print(table)
    if "gray box" in config.settings:
        clean = [
            row["reformed"] for row in rows if row["setting"] == "gray box" and not row["source"]
        ]
        values, _ = matrix(rows, "reformed")
        square, drawn = values[:, :-1], values[:, -1]
        others = square[~np.eye(len(square), dtype=bool)]
        rest = f"others {others.mean():.1%} ({others.min():.1%} at least), " if len(others) else ""
        console.print(
            f"Gray box, {len(square)} reformers without detectors: clean {np.mean(clean):.1%}, "
            f"attacked one {np.diagonal(square).mean():.1%}, {rest}a random one {drawn.mean():.1%}"
        )
    console.print(f"Files: {study.run.workdir}/ (results.csv, gray_box.csv, figures/)")
