"""The main job: train or restore a classifier, attack it, and draw its robustness curves.

Cells are (seed, attack); each gives one row an epsilon. Keys are derived from the cell's name, so
order and interruption never change a number.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from advjax import attacks, evaluation
from advjax.core import balls, checks, classifier, losses, metrics, parallel, random, traits
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, Key, LogitsFn
from advjax.experiments import networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("seed", "attack", "epsilon")


class Entry(NamedTuple):
    """An attack of the study.

    Attributes:
      attack: the attack.
      ball: the name of its ball, which chooses its list of epsilons.
    """

    attack: Attack
    ball: str


def toward_next_class(attack: Callable[..., Array], num_classes: int) -> Attack:
    """The targeted form of an attack, with the class after the label as its target.

    Args:
      attack: an attack that takes `targeted`.
      num_classes: k; the target of label y is (y + 1) mod k.
    """

    @traits.declare(**traits.of(attack)._asdict())
    def targeted(key: Key, logits_fn: LogitsFn, x: Array, y: Array, epsilon: Any) -> Array:
        return attack(key, logits_fn, x, (y + 1) % num_classes, epsilon, targeted=True)

    return targeted


def catalogue(num_classes: int, num_steps: int, num_restarts: int) -> dict[str, Entry]:
    """The attacks of the study by name.

    Args:
      num_classes: k, for the targeted forms.
      num_steps: steps of the iterated attacks.
      num_restarts: random starts of each PGD.
    """
    pgd = functools.partial(attacks.pgd, num_steps=num_steps, num_restarts=num_restarts)
    bim = functools.partial(attacks.bim, num_steps=num_steps)
    return {
        "fgsm": Entry(attacks.fgsm, "linf"),
        "fgsm_targeted": Entry(toward_next_class(attacks.fgsm, num_classes), "linf"),
        "least_likely": Entry(attacks.least_likely, "linf"),
        "rand_fgsm": Entry(attacks.rand_fgsm, "linf"),
        "bim": Entry(bim, "linf"),
        "bim_targeted": Entry(toward_next_class(bim, num_classes), "linf"),
        "pgd": Entry(pgd, "linf"),
        "pgd_margin": Entry(functools.partial(pgd, loss_fn=losses.margin), "linf"),
        "pgd_dlr": Entry(functools.partial(pgd, loss_fn=losses.dlr), "linf"),
        "fgm": Entry(attacks.fgm, "l2"),
        "fgm_targeted": Entry(toward_next_class(attacks.fgm, num_classes), "l2"),
        "pgd_l2": Entry(functools.partial(pgd, ball=balls.l2), "l2"),
        "pgd_l1": Entry(functools.partial(pgd, ball=balls.l1), "l1"),
    }


ATTACKS = tuple(catalogue(10, 1, 1))


@dataclasses.dataclass(frozen=True)
class Config(networks.NetworkConfig):
    """A robustness study.

    Attributes:
      attacks: names from `ATTACKS`.
      epsilons: radii of the linf attacks, in units of the image.
      epsilons_l2: radii of the l2 attacks.
      epsilons_l1: radii of the l1 attacks.
      seeds: one network a seed.
      num_steps: steps of the iterated attacks.
      num_restarts: random starts of PGD.
      method: how a curve is computed, see `evaluation.robust_accuracy`; "auto" is its default.
      attack_batch_size: images attacked at a time.
      fgsm_epsilon: radius of the FGSM table and of the fooling image.
    """

    attacks: tuple[str, ...] = ATTACKS
    epsilons: tuple[float, ...] = tuple(round(0.02 * i, 12) for i in range(16))
    epsilons_l2: tuple[float, ...] = tuple(round(0.2 * i, 12) for i in range(16))
    epsilons_l1: tuple[float, ...] = tuple(round(1.0 * i, 12) for i in range(16))
    seeds: tuple[int, ...] = (0,)
    num_steps: int = 40
    num_restarts: int = 1
    method: str = "auto"
    attack_batch_size: int = 512
    fgsm_epsilon: float = 0.25

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network("evasion")
        if not self.attacks:
            raise ValueError("evasion: need at least one attack, got none.")
        for name in self.attacks:
            checks.known("evasion", "attack", name, ATTACKS)
        checks.known("evasion", "method", self.method, ("auto", *evaluation.METHODS))
        for name in ("epsilons", "epsilons_l2", "epsilons_l1", "fgsm_epsilon"):
            checks.non_negative("evasion", name, getattr(self, name))
        for name in ("num_steps", "num_restarts", "attack_batch_size"):
            checks.at_least("evasion", name, getattr(self, name), 1)

    def epsilons_of(self, ball: str) -> tuple[float, ...]:
        """The radii for a ball, by its name."""
        of = {"linf": self.epsilons, "l2": self.epsilons_l2, "l1": self.epsilons_l1}
        return tuple(dict.fromkeys(of[ball]))  # a radius that is given twice is one row


def smaller(config: Config) -> Config:
    """The same study in seconds: every attack, few of everything else."""
    return dataclasses.replace(
        config, epsilons=(0.0, 0.1, 0.3), epsilons_l2=(0.0, 1.0, 3.0), epsilons_l1=(0.0, 5.0, 15.0),
        num_examples=min(config.num_examples, 32), num_epochs=min(config.num_epochs, 2),
        num_steps=min(config.num_steps, 3),
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      clean_accuracy: of each network, by seed.
      fgsm: the FGSM table: error and mean confidence on the errors, by seed.
      fooling: target class, and the network's answer and confidence on the fooling image.
    """

    run: Run
    clean_accuracy: dict[int, float]
    fgsm: dict[int, "ErrorAndConfidence"]
    fooling: "Fooling"


class ErrorAndConfidence(NamedTuple):
    """How often a classifier errs and how sure it is then.

    Attributes:
      error: share of wrong answers, in [0, 1].
      mean_confidence: mean softmax probability of the wrong answers; NaN if there is none.
    """

    error: float
    mean_confidence: float


# MNIST, epsilon 0.25, a maxout network: I. Goodfellow, J. Shlens, C. Szegedy, ICLR 2015, section 4.
# Only to compare with.
PUBLISHED_FGSM = ErrorAndConfidence(error=0.894, mean_confidence=0.976)


class Fooling(NamedTuple):
    """An image of nothing that the classifier calls a chosen class.

    Attributes:
      noise: where it started, f32[h, w, c].
      image: the fooling image, f32[h, w, c].
      target: the chosen class.
      answer: the classifier's class for `image`.
      confidence: the softmax probability of `answer`.
      share_called: share of all draws of the noise that end as the target; the image shown is the
        surest of them.
    """

    noise: Array
    image: Array
    target: int
    answer: int
    confidence: float
    share_called: float


def error_and_confidence(logits_fn: LogitsFn, x: Array, y: Array) -> ErrorAndConfidence:
    """Error of the classifier on images, and its mean confidence where it is wrong.

    Args:
      logits_fn: classifier.
      x: images, such as adversarial ones, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
    """
    logits = evaluation.predict(logits_fn, x)
    wrong = np.asarray(~metrics.is_correct(logits, jnp.asarray(y)))
    confidence = np.asarray(metrics.confidence(logits))
    return ErrorAndConfidence(
        float(wrong.mean()), float(confidence[wrong].mean()) if wrong.any() else float("nan")
    )


def fooling_image(
    key: Key, logits_fn: LogitsFn, image_shape: Sequence[int], target: int, epsilon: float
) -> Fooling:
    """Targeted FGSM from uniform noise: an image of nothing that is taken for a class.

    Of 64 draws of the noise the one that the network is surest about.

    Args:
      key: a key.
      logits_fn: classifier.
      image_shape: (h, w, c).
      target: the class that the network shall see.
      epsilon: size of the sign step.

    Source: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples",
    ICLR 2015 (rubbish class examples).
    """
    noise = jax.random.uniform(key, (64, *image_shape))
    image = jax.jit(functools.partial(attacks.fgsm, targeted=True))(
        key, classifier.as_pytree(logits_fn), noise, jnp.full(64, target), epsilon
    )
    logits = evaluation.predict(logits_fn, image)
    best = int(jnp.argmax(jax.nn.softmax(logits)[:, target]))
    return Fooling(
        noise[best], image[best], target,
        int(metrics.predictions(logits)[best]), float(metrics.confidence(logits)[best]),
        float(jnp.mean(metrics.predictions(logits) == target)),
    )  # fmt: skip


def run_study(
    config: Config,
    workdir: PathLike,
    *,
    data_dir: PathLike | None = None,
    mesh: Mesh | None = None,
) -> Study:
    """Runs what is missing of a study and writes its tables and figures.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.
      mesh: devices to split each batch of attacked images over.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one, a network whose logits are not
        finite.
    """
    opened = networks.open_study(
        config, workdir, study="evasion", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, test, x, y = opened[1:]
    entries = catalogue(test.num_classes, config.num_steps, config.num_restarts)
    train = networks.trainer(config, test.num_classes, data_dir, run)
    clean_accuracy, fgsm, classifiers = {}, {}, {}
    for seed in config.seeds:
        with run.timed("training"):
            classifiers[seed] = train(seed)
        clean_accuracy[seed] = networks.clean_accuracy(
            "evasion", f"seed {seed}", classifiers[seed], x, y, config.attack_batch_size
        )
    cells = [(seed, name) for name in config.attacks for seed in config.seeds]
    with tqdm(cells, desc="attacks", disable=not parallel.is_main_process()) as bar:
        for seed, name in bar:
            bar.set_postfix(attack=name, seed=seed)
            epsilons = config.epsilons_of(entries[name].ball)
            if not run.is_done((seed, name, epsilon) for epsilon in epsilons):
                with run.timed(name):
                    logits_fn = classifiers[seed]
                    run.append(_rows(config, seed, name, entries[name], logits_fn, x, y, mesh))
    for seed in config.seeds:
        x_adv = jax.jit(attacks.fgsm)(
            jax.random.key(seed), classifiers[seed], x, y, config.fgsm_epsilon
        )
        fgsm[seed] = error_and_confidence(classifiers[seed], x_adv, y)
    first = classifiers[config.seeds[0]]
    fooling = fooling_image(
        random.named(jax.random.key(config.seeds[0]), "fooling"), first, x.shape[1:],
        min(3, test.num_classes - 1), config.fgsm_epsilon,
    )  # fmt: skip
    study = Study(run, clean_accuracy, fgsm, fooling)
    run.table("fgsm.csv", [_fgsm_row(config, seed, fgsm[seed]) for seed in config.seeds])
    run.finish(config.seeds[0])
    _draw(study, config, first, x, y, test.class_names)
    return study


def _fgsm_row(config: Config, seed: int, result: ErrorAndConfidence) -> dict[str, Any]:
    """Our error and confidence under FGSM, and the published ones of PUBLISHED_FGSM beside them."""
    return {
        "dataset": config.dataset,
        "model": config.model,
        "seed": seed,
        "epsilon": config.fgsm_epsilon,
        **result._asdict(),
        **{f"published_{name}": value for name, value in PUBLISHED_FGSM._asdict().items()},
    }


def _rows(
    config: Config, seed: int, name: str, entry: Entry, logits_fn: LogitsFn, x, y, mesh
) -> list[Mapping[str, Any]]:
    key = random.named(jax.random.key(seed), name)
    epsilons = config.epsilons_of(entry.ball)
    method = evaluation.default_method(entry.attack) if config.method == "auto" else config.method
    withstood = np.asarray(
        evaluation.survival(
            key, entry.attack, logits_fn, x, y, np.asarray(epsilons, np.float32),
            method=method, batch_size=config.attack_batch_size, mesh=mesh,
        )
    )  # fmt: skip
    return [
        {
            "dataset": config.dataset,
            "model": config.model,
            "seed": seed,
            "attack": name,
            "ball": entry.ball,
            "epsilon": epsilon,
            "method": method,
            "num_examples": len(y),
            "num_correct": int(row.sum()),
            "robust_accuracy": int(row.sum()) / len(y),
        }
        for epsilon, row in zip(epsilons, withstood, strict=True)
    ]


def _draw(study: Study, config: Config, logits_fn: LogitsFn, x, y, class_names) -> None:
    from advjax.experiments import figures  # matplotlib is slow to import

    study.run.figure("curve.png", functools.partial(figures.curves, study.run.rows, config))
    pgd = functools.partial(attacks.pgd, num_steps=config.num_steps)
    epsilon = config.epsilons[len(config.epsilons) // 2]
    shown = min(6, len(y))
    x_adv = jax.jit(pgd)(
        random.named(jax.random.key(config.seeds[0]), "examples"), logits_fn,
        jnp.asarray(x[:shown]), jnp.asarray(y[:shown]), epsilon,
    )  # fmt: skip
    study.run.figure(
        "examples.png",
        functools.partial(
            figures.examples, logits_fn, x[:shown], x_adv, y[:shown], epsilon, class_names
        ),
    )
    study.run.figure("fooling.png", functools.partial(figures.fooling, study.fooling, class_names))
