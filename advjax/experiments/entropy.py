"""What entropy regularisation buys: training with and without it, on clean and on step l.l. images.

A cell is a seed, a network and a way to train it; it gives a row for each attack. With and without
the entropy is one program (`training.fit_many` over the weight). Keys are derived from names, so
order and interruption never change a number; all four trainings of a network and a seed start from
the same weights.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import advjax
from advjax import attacks, data, defenses, evaluation, losses, models, training, universality
from advjax.core import checks, random
from advjax.core.io import PathLike
from advjax.core.typing import TrainingLoss
from advjax.experiments.networks import clean_accuracy
from advjax.experiments.runs import Run

KEY_COLUMNS = ("seed", "model", "base", "has_entropy", "attack")
BASES = ("clean", "step_ll", "pgd")
ATTACKS = {
    "least_likely": attacks.least_likely,
    "pgd": functools.partial(attacks.pgd, num_steps=20),
    # Regularised logits are large and their cross-entropy flat; the ratio of logits has no scale.
    "pgd_dlr": functools.partial(attacks.pgd, num_steps=20, loss_fn=losses.dlr),
}
OPTIMIZERS = {"adam": optax.adam, "sgd": functools.partial(optax.sgd, momentum=0.9)}
_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Config:
    """A study of entropy regularisation.

    Attributes:
      dataset: name for `data.load`.
      models: names for `models.make`.
      bases: what is trained on, of `BASES`: clean images, half step l.l. ones, PGD ones.
      weight: of the entropy.
      all_images: the entropy of every image that is trained on, not of the clean ones only.
      epsilon: of the adversarial training.
      attacks: names of `ATTACKS`.
      max_epsilon: last epsilon of the curves, which start at 0.
      num_epsilons: of the curves.
      num_train: training images that are used; 0 for all.
      num_examples: test images that are used, at most.
      num_epochs: training epochs.
      batch_size: training images a step.
      optimizer: of `OPTIMIZERS`: "adam", or "sgd" with momentum 0.9.
      learning_rate: the first one, with a cosine schedule to 0.
      seed: of everything.
      seeds: trainings of each cell, with the seeds from `seed` on.
    """

    dataset: str = "digits"
    models: tuple[str, ...] = ("cnn", "mlp")
    bases: tuple[str, ...] = ("clean", "step_ll")
    weight: float = 1.0
    all_images: bool = False
    epsilon: float = 0.3
    attacks: tuple[str, ...] = ("least_likely", "pgd", "pgd_dlr")
    max_epsilon: float = 0.4
    num_epsilons: int = 9
    num_train: int = 0
    num_examples: int = 1000
    num_epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    seed: int = 0
    seeds: int = 1

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        for kind, names, known in (
            ("data set", (self.dataset,), data.NAMES),
            ("model", self.models, models.NAMES),
            ("base", self.bases, BASES),
            ("attack", self.attacks, ATTACKS),
            ("optimizer", (self.optimizer,), OPTIMIZERS),
        ):
            if not names:
                raise ValueError(f"entropy: need at least one {kind}, got none.")
            for name in names:
                checks.known("entropy", kind, name, known)
        for name in ("num_examples", "num_epochs", "batch_size", "seeds"):
            checks.at_least("entropy", name, getattr(self, name), 1)
        checks.at_least("entropy", "num_epsilons", self.num_epsilons, 2)
        checks.at_least("entropy", "num_train", self.num_train, 0)
        for name in ("weight", "epsilon", "max_epsilon", "learning_rate"):
            checks.non_negative("entropy", name, getattr(self, name))

    @property
    def epsilons(self) -> np.ndarray:
        """The epsilons of the curves, f32[e]."""
        return np.linspace(0, self.max_epsilon, self.num_epsilons, dtype=np.float32)


def smaller(config: Config) -> Config:
    """The same on the digits, in seconds."""
    return dataclasses.replace(
        config, dataset="digits", models=("mlp",), bases=("clean", "step_ll"),
        attacks=("least_likely",), num_train=0, num_examples=200, num_epochs=8, batch_size=32,
        num_epsilons=5, learning_rate={"adam": 3e-3, "sgd": 0.05}[config.optimizer], seeds=1,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
    """

    run: Run


@functools.cache  # one object for one loss, so that its programs are not compiled again
def base_loss(base: str, epsilon: float) -> TrainingLoss:
    """The loss of one of `BASES`: on clean images, half on step l.l. ones, on PGD ones."""
    return {
        "clean": training.cross_entropy,
        "step_ll": functools.partial(defenses.least_likely, epsilon=epsilon),
        "pgd": functools.partial(
            defenses.adversarial, epsilon=epsilon, alpha=0.0,
            attack=functools.partial(attacks.pgd, num_steps=7),
        ),
    }[base]  # fmt: skip


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
    config.check()
    test = data.load(config.dataset, "test", data_dir=data_dir)
    test = test.take(min(config.num_examples, len(test)))
    run = Run(workdir, config, study="entropy", key_columns=KEY_COLUMNS)
    seeds = range(config.seed, config.seed + config.seeds)
    for seed, model, base in itertools.product(seeds, config.models, config.bases):
        cells = [(seed, model, base, h, name) for h in (False, True) for name in config.attacks]
        if not run.is_done(cells):
            _train_and_measure(config, run, seed, model, base, test, data_dir)
    run.finish(config.seed)
    for name in config.attacks:
        run.figure(f"{name}.png", functools.partial(draw_curves, run.rows, name))
    return Study(run)


def _train_and_measure(
    config: Config, run: Run, seed: int, model: str, base: str, test, data_dir
) -> None:
    train = data.load(config.dataset, "train", data_dir=data_dir)
    train = train.take(min(config.num_train or len(train), len(train)))
    module = models.make(model, train.num_classes)
    num_steps = config.num_epochs * max(1, len(train) // config.batch_size)
    key = random.named(jax.random.key(seed), model)
    with run.timed("training"):
        fitted = training.fit_many(
            jax.random.wrap_key_data(jax.numpy.stack([jax.random.key_data(key)] * 2)),
            module, train,
            loss_fn=functools.partial(
                defenses.entropy_regularised, base_loss=base_loss(base, config.epsilon),
                all_images=config.all_images and base != "clean",
            ),
            hyperparameters={"loss": {"weight": np.array([0.0, config.weight], np.float32)}},
            optimizer=OPTIMIZERS[config.optimizer](
                optax.cosine_decay_schedule(config.learning_rate, num_steps)
            ),
            num_epochs=config.num_epochs, batch_size=config.batch_size, method="map",
            checkpoint_dir=run.workdir / "checkpoints" / f"{model}_{base}_seed{seed}",
        )  # fmt: skip
    x, y = test.float_images(), test.labels
    for i, has_entropy in enumerate((False, True)):
        variables = jax.tree.map(lambda leaf, i=i: leaf[i], fitted.variables)
        logits_fn = advjax.bind(module, variables)
        name = f"{model}, {base}{', entropy' if has_entropy else ''}"
        accuracy = clean_accuracy("entropy", name, logits_fn, x, y, _BATCH)
        gaps = universality.logit_gaps(evaluation.predict(logits_fn, x, batch_size=_BATCH)).gaps
        for attack in config.attacks:
            with run.timed(attack):
                curve = evaluation.robust_accuracy(
                    random.named(key, attack), ATTACKS[attack], logits_fn, x, y, config.epsilons,
                    batch_size=_BATCH,
                )  # fmt: skip
            run.append(
                [
                    {
                        "dataset": config.dataset,
                        "seed": seed,
                        "model": model,
                        "base": base,
                        "has_entropy": has_entropy,
                        "attack": attack,
                        "num_examples": len(y),
                        "accuracy": accuracy,
                        "median_gap": float(np.median(gaps[:, 0])),
                        "epsilons": config.epsilons.astype(float).round(6).tolist(),
                        "robust_accuracies": np.asarray(curve, float).round(6).tolist(),
                    }
                ]
            )


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['base']}{' + entropy' if row['has_entropy'] else ''}"


def _trainings(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list]:
    """The rows of each network and way to train it, in their order."""
    groups: dict[tuple[str, str], list] = {}
    for row in rows:
        groups.setdefault((row["model"], _label(row)), []).append(row)
    return groups


def _mean(values: Sequence[float], form: str) -> str:
    """The mean and, of several seeds, the range."""
    text = format(np.mean(values), form)
    if len(values) > 1:
        text += f" ({format(min(values), form)} to {format(max(values), form)})"
    return text


def draw_curves(rows: Sequence[Mapping[str, Any]], attack: str, path: pathlib.Path) -> None:
    """Robust accuracy over epsilon, mean of the seeds, for each training, one panel a network.

    Args:
      rows: of the study.
      attack: which attack.
      path: where to.
    """
    from advjax.experiments import figures  # matplotlib is slow to import

    panels: dict[str, dict[str, Any]] = {}
    for name, group in _trainings([row for row in rows if row["attack"] == attack]).items():
        model, label = name
        curves = panels.setdefault(f"{group[0]['dataset']}, {model}", {})
        mean = np.mean([row["robust_accuracies"] for row in group], axis=0)
        curves[label] = (group[0]["epsilons"], mean)
    figures.curve_panels(panels, xlabel="epsilon", ylabel=f"accuracy under {attack}", path=path)


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints one line a training and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    middle = config.num_epsilons // 2
    table = Table(
        title=f"Entropy regularisation: {config.dataset}, weight {config.weight:g}",
        caption=f"Accuracies under attack at epsilon {config.epsilons[middle]:.3g}"
        + (f"; mean and range of {config.seeds} seeds." if config.seeds > 1 else "."),
    )
    for name in ("network", "training", "accuracy", "median Delta_12", *config.attacks):
        table.add_column(name, justify="left" if name in ("network", "training") else "right")
    for (model, label), group in _trainings(rows).items():
        of_attack = {name: [row for row in group if row["attack"] == name] for name in ATTACKS}
        first = of_attack[config.attacks[0]]
        table.add_row(
            model, label, _mean([row["accuracy"] for row in first], ".1%"),
            _mean([row["median_gap"] for row in first], ".2f"),
            *(
                _mean([row["robust_accuracies"][middle] for row in of_attack[name]], ".1%")
                for name in config.attacks
            ),
        )  # fmt: skip
    console.print(table)
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")
