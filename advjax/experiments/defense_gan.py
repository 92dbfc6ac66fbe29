"""Defense-GAN: classifiers on the generator's copies of images, attacks on them, and BPDA.

White-box attacks on the classifier itself make images that its copy from the generator mostly
undoes; BPDA goes through the generator as if it were the identity. Cells are (classifier, training
images, attack, L); keys are derived from a cell's name, so order and interruption never change a
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
from tqdm.auto import tqdm

from advjax import attacks, data, defenses, evaluation, models
from advjax.core import checks, io, metrics, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, LogitsFn
from advjax.defenses import GeneratorFn
from advjax.experiments import defended, networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("classifier", "trained_on", "attack", "num_steps")
ATTACKS = ("fgsm", "rand_fgsm", "carlini_wagner_l2", "bpda")
TRAINED_ON = ("original", "reconstructed", "both")
_NUM_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Config(defended.DefenceConfig):
    """A study of Defense-GAN.

    Attributes:
      more_models: names for `models.make` beside `model`.
      trained_on: names from `TRAINED_ON`, a classifier each.
      num_fit: training images of the classifiers, each reconstructed once.
      attacks: names from `ATTACKS`.
      epsilon: radius of the attacks in linf.
      alpha: the random step of rand_fgsm.
      bpda_num_steps: steps of pgd in BPDA.
      bpda_descent_steps: L while BPDA attacks; it is judged with the defence's own.
      bpda_restarts: R while BPDA attacks.
      descent_steps: L of the defence.
      restarts: R of the defence.
      descent_rate: learning rate of the descent.
      momentum: of the descent.
      curve: further values of L, for the first classifier.
      fit_descent_steps: L for the training images.
      fit_restarts: R for the training images.
      latent_size: length of z.
      features: of the generator.
      critic_features: of the critic.
      gan_num_steps: steps of the generator's training.
      gan_critic_steps: steps of the critic for each.
      gan_learning_rate: of both.
    """

    more_models: tuple[str, ...] = ("mlp",)
    trained_on: tuple[str, ...] = ("original", "reconstructed")
    num_fit: int = 4000
    attacks: tuple[str, ...] = ATTACKS
    epsilon: float = 0.3
    alpha: float = 0.05
    bpda_num_steps: int = 20
    bpda_descent_steps: int = 50
    bpda_restarts: int = 2
    descent_steps: int = 200
    restarts: int = 10
    descent_rate: float = 10.0
    momentum: float = 0.7
    curve: tuple[int, ...] = (5, 10, 25, 50, 100)
    fit_descent_steps: int = 50
    fit_restarts: int = 2
    latent_size: int = 64
    features: int = 16
    critic_features: tuple[int, ...] = (16, 32)
    gan_num_steps: int = 30_000
    gan_critic_steps: int = 5
    gan_learning_rate: float = 1e-4

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        study = "defense_gan"
        self.check_defence(study)
        for kind, names, all_names in (
            ("model", self.more_models, models.NAMES), ("attack", self.attacks, ATTACKS),
            ("training images", self.trained_on, TRAINED_ON),
        ):  # fmt: skip
            for name in names:
                checks.known(study, kind, name, all_names)
        if not self.trained_on:
            raise ValueError(f"{study}: need at least one of trained_on, got none.")
        if self.weights:
            raise ValueError(f"{study}: trains its classifiers, so weights of one are of no use.")
        for name in ("epsilon", "alpha", "descent_rate", "momentum", "gan_learning_rate"):
            checks.non_negative(study, name, getattr(self, name))
        for name in (
            "num_fit", "bpda_num_steps", "bpda_descent_steps", "bpda_restarts", "descent_steps",
            "restarts", "fit_descent_steps", "fit_restarts", "latent_size", "features",
            "gan_num_steps", "gan_critic_steps",
        ):  # fmt: skip
            checks.at_least(study, name, getattr(self, name), 1)
        for name in ("curve", "critic_features"):
            for value in getattr(self, name):
                checks.at_least(study, name, value, 1)

    @property
    def classifiers(self) -> list[tuple[str, str]]:
        """Architecture and training images of every classifier."""
        names = dict.fromkeys((self.model, *self.more_models))
        return [(name, source) for name in names for source in self.trained_on]

    @property
    def cells(self) -> list[tuple[str, str, str, int]]:
        """Classifier, training images, attack and L of every row."""
        cells = [
            (*which, attack, self.descent_steps)
            for which in self.classifiers for attack in ("none", *self.attacks)
        ]  # fmt: skip
        curve = [
            (*self.classifiers[0], attack, num_steps)
            for num_steps in self.curve for attack in ("none", *self.attacks[:1])
        ]  # fmt: skip
        return list(dict.fromkeys(cells + curve))


def smaller(config: Config) -> Config:
    """The same study in seconds."""
    return dataclasses.replace(
        config, dataset="digits", model="mlp", more_models=(), trained_on=config.trained_on[:2],
        num_train=1000, num_held_out=100, num_fit=500, num_examples=30, num_epochs=10, num_steps=2,
        cw_num_steps=20, cw_num_search_steps=2, epsilon=0.2, bpda_num_steps=3,
        bpda_descent_steps=10, descent_steps=20, restarts=2, curve=(5,), fit_descent_steps=10,
        fit_restarts=1, latent_size=16, features=8, critic_features=(8,), gan_num_steps=200,
        gan_critic_steps=2, gan_learning_rate=1e-3,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      generator_fn: the generator.
    """

    run: Run
    generator_fn: GeneratorFn


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
    opened = networks.open_study(
        config, workdir, study="defense_gan", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, x, y = opened.run, opened.x, opened.y
    splits = defended.load_splits(config, data_dir)
    with run.timed("generator"):
        generator_fn = trained_generator(config, splits.train, run)
    with run.timed("classifiers"):
        classifiers = _classifiers(config, generator_fn, splits.train, run)
    for (model, source), logits_fn in classifiers.items():
        networks.clean_accuracy("defense_gan", f"{model} {source}", logits_fn, x, y)
    with tqdm(config.cells, desc="attacks", disable=not parallel.is_main_process()) as bar:
        for model, source, attack, num_steps in bar:
            bar.set_postfix(classifier=model, trained_on=source, attack=attack, L=num_steps)
            if not run.is_done([(model, source, attack, num_steps)]):
                with run.timed(attack):
                    _measure(
                        config, run, (model, source), classifiers[model, source], generator_fn,
                        attack, num_steps, x, y,
                    )  # fmt: skip
    study = Study(run, generator_fn)
    run.finish(config.seed)
    _draw(study, config, classifiers, opened)
    return study


def trained_generator(config: Config, train: data.Dataset, run: Run) -> GeneratorFn:
    """The generator of a study: trained, or restored where it is complete.

    Args:
      config: the study.
      train: what it is trained on.
      run: the run folder, which holds the checkpoints.
    """
    return defenses.train_generator(
        config.key("generator"),
        defenses.Generator(train.image_shape, config.latent_size, config.features),
        train, critic=defenses.Critic(config.critic_features),
        num_steps=config.gan_num_steps, num_critic_steps=config.gan_critic_steps,
        learning_rate=config.gan_learning_rate,
        checkpoint_dir=run.workdir / "checkpoints" / "generator",
    )  # fmt: skip


def attackers_classifier(
    config: Config, logits_fn: LogitsFn, generator_fn: GeneratorFn, gradient: str
) -> LogitsFn:
    """The classifier behind Defense-GAN as an attacker runs it, who does not know where the
    defence's descents will start, with descents of his own number and length.

    Args:
      config: the study.
      logits_fn: the classifier.
      generator_fn: the generator.
      gradient: see `defenses.defense_gan`; "straight_through" is BPDA.
    """
    return defenses.defense_gan(
        logits_fn, generator_fn, key=config.key("attacker"),
        num_steps=config.bpda_descent_steps, num_restarts=config.bpda_restarts,
        learning_rate=config.descent_rate, momentum=config.momentum, gradient=gradient,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("num_steps", "num_restarts"))
def _reconstruct(keys, generator_fn, x, descent_rate, momentum, *, num_steps, num_restarts):
    return defenses.reconstruct(
        keys, generator_fn, x, num_steps=num_steps, num_restarts=num_restarts,
        learning_rate=descent_rate, momentum=momentum,
    )  # fmt: skip


def reconstructed(
    config: Config, name: str, generator_fn: GeneratorFn, x: Array, num_steps: int, restarts: int
) -> np.ndarray:
    """The generator's copies of all images, in batches; each image has its own key.

    Args:
      config: the study.
      name: of the images; the keys go by it.
      generator_fn: the generator.
      x: images, f32[n, h, w, c] in [0, 1].
      num_steps: L.
      restarts: R.
    """
    return defended.in_batches(
        lambda keys, x: _reconstruct(
            keys, generator_fn, x, config.descent_rate, config.momentum,
            num_steps=num_steps, num_restarts=restarts,
        ),
        config.attack_batch_size, random.example_keys(config.key(name), len(x)), x,
    )  # fmt: skip


def _classifiers(
    config: Config, generator_fn: GeneratorFn, train: data.Dataset, run: Run
) -> dict[tuple[str, str], LogitsFn]:
    """A classifier for each architecture and kind of training images."""
    original = train.take(min(config.num_fit, len(train)))
    original = dataclasses.replace(original, images=original.float_images())
    sets = {"original": original}
    if set(config.trained_on) != {"original"}:
        path = run.workdir / "checkpoints" / "reconstructed.npy"
        if path.exists():
            images = np.load(path)
        else:
            images = reconstructed(
                config, "fit", generator_fn, original.images, config.fit_descent_steps,
                config.fit_restarts,
            )  # fmt: skip
            _save(path, images)
        sets["reconstructed"] = dataclasses.replace(original, images=images)
        sets["both"] = dataclasses.replace(
            original, images=np.concatenate([original.images, images]),
            labels=np.tile(original.labels, 2),
        )  # fmt: skip
    return {
        (model, source): defended.fit_classifier(
            config, f"{model} {source}", model, sets[source], run
        )
        for model, source in config.classifiers
    }


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    if parallel.is_main_process():
        with io.atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, array)


@functools.cache
def _attack(config: Config, name: str) -> Attack:
    if name == "bpda":
        return functools.partial(attacks.pgd, num_steps=config.bpda_num_steps)
    if name == "rand_fgsm":
        return functools.partial(attacks.rand_fgsm, alpha=config.alpha)
    return defended.catalogue(config)[name]


def _measure(
    config: Config, run: Run, which: tuple[str, str], logits_fn: LogitsFn,
    generator_fn: GeneratorFn, name: str, num_steps: int, x: np.ndarray, y: np.ndarray,
) -> None:  # fmt: skip
    """One row, and a file with the attacked images, which further values of L share."""
    path = _images_path(run, which, name)
    if path.exists():
        x_adv = np.load(path)
    else:
        attacked_fn = logits_fn
        if name == "bpda":
            attacked_fn = attackers_classifier(config, logits_fn, generator_fn, "straight_through")
        strength = 0.0 if name in ("none", "carlini_wagner_l2") else config.epsilon
        x_adv = defended.attacked(
            _attack(config, name), config.key(f"{which} {name}"), attacked_fn, x, y, strength,
            batch_size=config.attack_batch_size,
        )  # fmt: skip
        _save(path, x_adv)
    images = reconstructed(config, "test", generator_fn, x_adv, num_steps, config.restarts)
    undefended, behind = (
        float(evaluation.accuracy(logits_fn, seen, y, batch_size=config.attack_batch_size))
        for seen in (x_adv, images)
    )
    run.append(
        [
            {
                "classifier": which[0], "trained_on": which[1], "attack": name,
                "num_steps": num_steps, "restarts": config.restarts, "num_examples": len(y),
                "undefended": undefended, "defended": behind,
                "mean_distance_l2": float(
                    np.sqrt(((x_adv - x) ** 2).sum((1, 2, 3))).mean()
                ),
                "reconstruction_error": float(((images - x_adv) ** 2).mean()),
            }
        ]
    )  # fmt: skip


def _images_path(run: Run, which: tuple[str, str], name: str) -> pathlib.Path:
    return run.workdir / "examples" / f"{'_'.join(which)}_{name}.npy"


def _draw(
    study: Study,
    config: Config,
    classifiers: Mapping[tuple[str, str], LogitsFn],
    opened: networks.Opened,
) -> None:
    from advjax.experiments import figures  # matplotlib is slow to import

    run, first = study.run, config.classifiers[0]
    curves = {
        ("clean" if attack == "none" else attack): _curve(run.rows, first, attack)
        for attack in ("none", *config.attacks[:1])
    }
    run.figure(
        "steps.png",
        lambda path: figures.lines(
            curves, xlabel="steps of the descent, L", ylabel="accuracy behind Defense-GAN",
            title=f"{config.dataset}, {' on '.join(first)}, R = {config.restarts}", path=path,
        ),
    )  # fmt: skip
    names = opened.test.class_names
    for name in config.attacks:
        x_adv = np.load(_images_path(run, first, name))[:_NUM_SHOWN]
        copies = reconstructed(
            config, "test", study.generator_fn, x_adv, config.descent_steps, config.restarts
        )
        rows = (opened.x[:_NUM_SHOWN], x_adv, copies)
        answers = [_answers(classifiers[first], images, names) for images in rows]
        labels = [names[label] for label in opened.y[:_NUM_SHOWN]]
        run.figure(f"{name}.png", functools.partial(draw_images, name, rows, answers, labels))


def draw_images(
    name: str,
    rows: Sequence[Array],
    answers: Sequence[Sequence[str]],
    labels: Sequence[str],
    path: pathlib.Path,
) -> None:
    """Clean images, attacked ones and the generator's copies of these, with the answers to each.

    Args:
      name: the attack.
      rows: the three, f32[n, h, w, c] each.
      answers: names of the answers to each of them.
      labels: names of the labels.
      path: where to.
    """
    from advjax.experiments import figures

    figures.image_grid(
        [list(images) for images in rows], answers,
        row_names=("clean", name, "copy of it"),
        column_names=[f"true: {label}" for label in labels],
        title=f"{name}: images, the generator's copies, and the classifier's answers", path=path,
    )  # fmt: skip


def _answers(logits_fn: LogitsFn, x: Array, class_names: Sequence[str]) -> list[str]:
    answers = np.asarray(metrics.predictions(evaluation.predict(logits_fn, x)))
    return [class_names[answer] if answer >= 0 else "not finite" for answer in answers]


def _curve(
    rows: Sequence[Mapping[str, Any]], which: tuple[str, str], attack: str
) -> tuple[list[int], list[float]]:
    points = sorted(
        (row["num_steps"], row["defended"])
        for row in rows
        if (row["classifier"], row["trained_on"], row["attack"]) == (*which, attack)
    )
    return [step for step, _ in points], [accuracy for _, accuracy in points]


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints a line an attack and classifier, and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    rows = study.run.rows
    table = Table(
        title=f"Defense-GAN: {config.dataset}, {rows[0]['num_examples']} images, L = "
        f"{config.descent_steps}, R = {config.restarts}, epsilon {config.epsilon:g}"
    )
    for name in ("classifier", "trained on", "attack"):
        table.add_column(name)
    for name in ("L2 distance", "undefended", "defended"):
        table.add_column(name, justify="right")
    for row in rows:
        if row["num_steps"] == config.descent_steps:
            table.add_row(
                row["classifier"], row["trained_on"], row["attack"],
                f"{row['mean_distance_l2']:.2f}", f"{row['undefended']:.1%}",
                f"{row['defended']:.1%}",
            )  # fmt: skip
    console.print(table)
    for attack in ("none", *config.attacks[:1]):
        points = zip(*_curve(rows, config.classifiers[0], attack), strict=True)
        console.print(f"{attack}: " + ", ".join(f"L = {n}: {value:.1%}" for n, value in points))
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")
