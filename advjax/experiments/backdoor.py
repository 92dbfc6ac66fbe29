"""Backdoor attacks one by one: a clean classifier, an infected one an attack, and what each does.

A cell is an attack. Keys are derived from its name, so order and interruption never change a
number.
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

import advjax
from advjax import backdoor, data, evaluation, models, training
from advjax.backdoor import label_maps, zoos
from advjax.core import checks, io, metrics, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, LogitsFn
from advjax.experiments import zoo
from advjax.experiments.networks import Opened, clean_accuracy, open_study
from advjax.experiments.runs import Run

KEY_COLUMNS = ("attack",)
LABEL_MAPS = ("all_to_one", "x_to_one", "x_to_x", "all_to_all")
_TEST_BATCH = 500  # images at a time
_NUM_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """A study of backdoor attacks.

    Attributes:
      dataset: name for `data.load`.
      model: name for `models.make`.
      mean: the network's input becomes `(x - mean) / std`; one number, or one a channel.
      std: see `mean`.
      attacks: names from `backdoor.ATTACKS`, one infected classifier each.
      options: of attacks in place of their published ones, such as {"badnets": {"size": 5}}.
      label_map: one of `LABEL_MAPS`; an attack that keeps labels (sig) has `clean_label` in place
        of it.
      target: the class that triggered images shall get ("all_to_one", "x_to_one", `clean_label`).
      sources: the classes that are attacked ("x_to_one", "x_to_x").
      ratio: poisoned share of each source class; each attack's own if None. Attacks with a training
        of their own (lira, blind) have none.
      clean_label_ratio: poisoned share of the target class, for attacks that keep labels (sig).
      cover_ratio: for "x_to_one" and "x_to_x", the share of each other class that gets the trigger
        and keeps its label; without it the trigger works on all classes. Attacks that keep labels
        or have a training of their own take none.
      per_batch: whether other images are poisoned in each step, and not the same ones in every
        epoch; as each attack was published if None, see `backdoor.train`.
      quantise: what poisoned and triggered images are rounded to, see `backdoor.quantised`.
      num_train: training images that are used; 0 for all.
      num_examples: test images that are used, at most.
      num_epochs: training epochs.
      batch_size: training images a step.
      optimizer: "sgd" (momentum 0.9) or "adam", with a cosine schedule to 0.
      learning_rate: its first learning rate.
      weight_decay: added to the gradient as `weight_decay * params`.
      augment: "none", "crop" (4 pixels) or "crop_flip".
      seed: of everything.
    """

    dataset: str = "digits"
    model: str = "cnn"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    attacks: tuple[str, ...] = ("badnets",)
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    label_map: str = "all_to_one"
    target: int = 0
    sources: tuple[int, ...] = ()
    ratio: float | None = None
    clean_label_ratio: float = 0.5
    cover_ratio: float = 0.1
    # Before this was there, all attacks poisoned the data once.
    per_batch: bool | None = dataclasses.field(default=None, metadata={"before": False})
    quantise: str = "round"
    num_train: int = 0
    num_examples: int = 10_000
    num_epochs: int = 30
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    augment: str = "none"
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        for kind, name, names in (
            ("data set", self.dataset, data.NAMES),
            ("model", self.model, models.NAMES),
            ("label map", self.label_map, LABEL_MAPS),
            ("quantisation", self.quantise, backdoor.QUANTISATIONS),
            ("optimizer", self.optimizer, zoos.OPTIMIZERS),
            ("augmentation", self.augment, zoos.AUGMENTATIONS),
            *(("attack", attack, backdoor.ATTACKS) for attack in self.attacks),
        ):
            checks.known("backdoor", kind, name, names)
        for name in ("num_examples", "num_epochs", "batch_size"):
            checks.at_least("backdoor", name, getattr(self, name), 1)
        checks.at_least("backdoor", "num_train", self.num_train, 0)
        for name in ("learning_rate", "weight_decay"):
            checks.non_negative("backdoor", name, getattr(self, name))
        if not self.attacks:
            raise ValueError("backdoor: need at least one attack, got none.")
        zoos.check_normalisation("backdoor", self)
        zoos.check_options("backdoor", self)
        for name in ("ratio", "clean_label_ratio", "cover_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"backdoor: need 0 <= {name} <= 1, got {name}={value}.")
        for attack in self.attacks:  # a map that cannot be says so now
            label_map_of(self, attack)


def label_map_of(config: Config, attack: str) -> np.ndarray:
    """The label map of an attack, int32[k].

    Raises:
      ValueError: a target or sources that do not fit.
    """
    num_classes = data.info(config.dataset).num_classes
    if backdoor.RECIPES[attack].clean_label:
        return label_maps.clean_label(num_classes, config.target)
    if config.label_map == "all_to_one":
        return label_maps.all_to_one(num_classes, config.target)
    if config.label_map == "x_to_one":
        return label_maps.x_to_one(num_classes, config.sources, config.target)
    if config.label_map == "x_to_x":
        return label_maps.x_to_x(num_classes, config.sources)
    return label_maps.all_to_all(num_classes)


def smaller(config: Config) -> Config:
    """The same on the digits, in seconds."""
    attacks = config.attacks[:1]
    options = zoo.options_on_digits(config, attacks)
    return dataclasses.replace(
        config, dataset="digits", model="mlp", mean=(0.0,), std=(1.0,), attacks=attacks,
        options=options, num_examples=200, num_epochs=10, batch_size=32, optimizer="adam",
        learning_rate=3e-3, augment="none",
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
    """

    run: Run


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
    opened = open_study(
        config, workdir, study="backdoor", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run = opened.run
    missing = [attack for attack in config.attacks if not run.is_done([(attack,)])]
    if missing:
        train = data.load(config.dataset, "train", data_dir=data_dir)
        train = train.take(min(config.num_train or len(train), len(train)))
        module = models.make(config.model, train.num_classes, mean=config.mean, std=config.std)
        settings = _training_settings(config, len(train))
        for attack in missing:
            backdoor.recipes.check_shares(
                train, attack, label_map_of(config, attack),
                ratio=zoos.ratio_of(config, attack),
                cover_ratio=zoos.cover_ratio_of(config, attack),
                options=config.options.get(attack),
            )  # fmt: skip
        with run.timed("clean"):
            clean = training.fit(
                _key(config, "clean"), module, train,
                checkpoint_dir=run.workdir / "checkpoints" / "clean", **settings,
            ).variables  # fmt: skip
        for attack in missing:
            with run.timed(attack):
                infected = _infected(config, attack, module, train, clean, run, settings)
            _measure(config, attack, opened, advjax.bind(module, clean), infected, module)
    run.finish(config.seed)
    for attack in config.attacks:
        draw = functools.partial(
            draw_contact_sheet, attack, np.load(_examples_path(run, attack)),
            opened.test.class_names,
        )  # fmt: skip
        run.figure(f"{attack}.png", draw)
    return Study(run)


def _key(config: Config, name: str):
    return random.named(jax.random.key(config.seed), name)


def _training_settings(config: Config, num_examples: int) -> dict[str, Any]:
    num_steps = backdoor.recipes.num_steps(num_examples, config.num_epochs, config.batch_size)
    return {
        "optimizer": backdoor.make_optimizer(
            num_steps, config.optimizer, config.learning_rate, config.weight_decay
        ),
        "num_epochs": config.num_epochs,
        "batch_size": config.batch_size,
        "augment": zoos.augmentation(config.augment),
    }


def _infected(config: Config, attack: str, module, train, clean, run: Run, settings):
    is_own = backdoor.RECIPES[attack].procedure is not None
    return backdoor.train(
        _key(config, attack), module, train, attack,
        label_map=label_map_of(config, attack), clean=clean,
        ratio=zoos.ratio_of(config, attack), per_batch=None if is_own else config.per_batch,
        cover_ratio=zoos.cover_ratio_of(config, attack), quantise=config.quantise,
        options=config.options.get(attack), checkpoint_dir=run.workdir / "checkpoints" / attack,
        **settings,
    )  # fmt: skip


def _measure(
    config: Config, attack: str, opened: Opened, clean: LogitsFn, infected: Any, module
) -> None:
    """One row, and a file with the images of the contact sheet."""
    run, x, y = opened.run, opened.x, opened.y
    logits_fn = advjax.bind(module, infected.variables)
    goals = np.asarray(backdoor.goals(infected.label_map))

    def rates(network: LogitsFn) -> tuple[float | None, ...]:
        return tuple(
            _or_none(
                rate(
                    network, infected.trigger, x, y, infected.label_map,
                    quantise=config.quantise, batch_size=_TEST_BATCH,
                )
            )
            for rate in (backdoor.attack_success_rate, backdoor.robust_accuracy)
        )  # fmt: skip

    def answers(network: LogitsFn) -> np.ndarray:
        logits = evaluation.predict(network, x, batch_size=_TEST_BATCH)
        return np.asarray(metrics.predictions(logits))

    under_trigger = answers(
        backdoor.triggered(logits_fn, infected.trigger, quantise=config.quantise)
    )
    shown = _one_of_each_class(y, goals)
    triggered = backdoor.quantised(jax.jit(infected.trigger)(x[shown]), config.quantise)
    if parallel.is_main_process():
        with io.atomic_write(_examples_path(run, attack)) as path, path.open("wb") as file:
            np.savez(
                file, x=x[shown], triggered=np.asarray(triggered), y=y[shown],
                answers=answers(logits_fn)[shown], triggered_answers=under_trigger[shown],
            )  # fmt: skip
    success, robust = rates(logits_fn)
    success_of_clean, robust_of_clean = rates(clean)
    row = {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "attack": attack,
        "label_map": np.asarray(infected.label_map).tolist(),
        "num_examples": len(y),
        "accuracy": clean_accuracy("backdoor", attack, logits_fn, x, y, _TEST_BATCH),
        "attack_success_rate": success,
        "robust_accuracy": robust,
        "spill": spill(under_trigger, y, goals),
        "clean_model_accuracy": clean_accuracy("backdoor", "clean", clean, x, y, _TEST_BATCH),
        "clean_model_success_rate": success_of_clean,
        "clean_model_robust_accuracy": robust_of_clean,
    }
    run.append([row])


def _or_none(value: Array) -> float | None:
    """JSON knows no NaN: none of the images is of a source class."""
    return None if np.isnan(value) else float(value)


def spill(answers: Array, y: Array, goals: Array) -> float | None:
    """How often the trigger works on classes that are not attacked.

    Args:
      answers: to triggered images, int32[n].
      y: their labels, int32[n].
      goals: what the attacker wants of each class, int32[k], -1 for nothing.

    Returns:
      Of the images of classes that are neither attacked nor a target, the share that is answered
      as some target; None if there is no such image.
    """
    targets = goals[goals >= 0]
    is_bystander = (goals[y] < 0) & ~np.isin(y, targets)
    return float(np.mean(np.isin(answers[is_bystander], targets))) if is_bystander.any() else None


def _one_of_each_class(y: Array, goals: Array) -> np.ndarray:
    """Rows of the first image of each of the first classes that are attacked, or of all."""
    attacked = np.flatnonzero(goals[y] >= 0)
    attacked = attacked if attacked.size else np.arange(len(y))
    _, first = np.unique(y[attacked], return_index=True)
    return attacked[first][:_NUM_SHOWN]


def _examples_path(run: Run, attack: str) -> pathlib.Path:
    return run.workdir / "examples" / f"{attack}.npz"


def draw_contact_sheet(
    attack: str, shown: Mapping[str, Array], class_names: Sequence[str], path: pathlib.Path
) -> None:
    """Clean images, triggered ones and their difference, with the infected network's answers.

    Args:
      attack: its name, for the title.
      shown: x, triggered, y, answers and triggered_answers.
      class_names: a name a class.
      path: where to.
    """
    from advjax.experiments import figures  # matplotlib is slow to import

    def names(answers: Array) -> list[str]:
        return [class_names[answer] if answer >= 0 else "not finite" for answer in answers]

    difference = shown["triggered"] - shown["x"]
    scale = max(float(np.max(np.abs(difference))), 1e-6)
    figures.image_grid(
        [list(shown["x"]), list(shown["triggered"]), list(0.5 + difference / (2 * scale))],
        [names(shown["answers"]), names(shown["triggered_answers"]), [""] * len(difference)],
        row_names=("clean", "triggered", f"difference\nof ±{scale:.2g}"),
        column_names=[f"true: {name}" for name in names(shown["y"])],
        title=f"{attack}: images and the infected network's answers",
        path=path,
    )


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints one line an attack and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    table = Table(
        title=f"Backdoors: {config.dataset}, {config.model}, {rows[0]['num_examples']} images",
        caption="In brackets the clean model. Spill: triggered images of classes that are not "
        "attacked, answered as a target.",
    )
    table.add_column("attack", no_wrap=True)
    for name in ("accuracy", "success", "robust", "spill"):
        table.add_column(name, justify="right")
    for row in rows:
        pairs = (
            ("accuracy", "clean_model_accuracy"),
            ("attack_success_rate", "clean_model_success_rate"),
            ("robust_accuracy", "clean_model_robust_accuracy"),
        )
        cells = (f"{_percent(row[ours])} ({_percent(row[theirs])})" for ours, theirs in pairs)
        table.add_row(row["attack"], *cells, _percent(row["spill"]))
    console.print(table)
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
