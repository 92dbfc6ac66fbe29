"""Adversarial images printed and photographed: which survive, and attacks that reckon with it.

Cells are (attack, epsilon), one row each. Keys are derived from the cell's name, so order and
interruption never change a number. The photographs are the same draws for every attack and for
the clean images, and none that the attack through the channel has seen.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from advjax import attacks, evaluation
from advjax.core import checks, metrics, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Attack, Key, LogitsFn
from advjax.experiments import networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("attack", "epsilon")
ATTACKS = ("fast", "iterative", "least_likely", "pgd", "photo")

# ImageNet, Inception v3, a printer and a telephone, epsilon in units of 1/255, 102 images each: the
# destruction rates (top-1) of A. Kurakin, I. Goodfellow, S. Bengio, ICLR 2017 workshop, table 3,
# average and prefiltered. Only to compare with.
PUBLISHED: dict[tuple[str, float], tuple[float, float]] = {
    ("fast", 16): (0.125, 0.051),
    ("fast", 8): (0.333, 0.146),
    ("iterative", 16): (0.404, 0.600),
    ("iterative", 8): (0.521, 0.647),
    ("least_likely", 16): (0.722, 0.875),
    ("least_likely", 8): (0.863, 0.889),
}


def published(attack: str, epsilon: float) -> tuple[float, float]:
    """The published destruction rates, average and prefiltered; NaN where there are none."""
    levels = round(255 * epsilon, 6)
    return PUBLISHED.get((attack, levels), (float("nan"), float("nan")))


@dataclasses.dataclass(frozen=True)
class Config(networks.NetworkConfig):
    """A study of the physical world; what is not listed is explained in `NetworkConfig`.

    Attributes:
      attacks: names from `ATTACKS`.
      epsilons: radii in linf, in units of the image.
      num_photos: photographs of each image.
      strength: of the channel, `attacks.photograph`; 1 is its defaults.
      threshold: least confidence of an image of the prefiltered case, clean and adversarial.
      num_steps: steps of PGD and of the attack through the channel.
      num_samples: photographs a step of the attack through the channel.
      attack_batch_size: images attacked at a time.
      seed: of the network, the attacks and the photographs.
    """

    num_examples: int = 256
    attacks: tuple[str, ...] = ATTACKS
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    num_photos: int = 4
    strength: float = 1.0
    threshold: float = 0.8
    num_steps: int = 40
    num_samples: int = 8
    attack_batch_size: int = 64
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network("physical")
        for name in ("attacks", "epsilons"):
            if not getattr(self, name):
                raise ValueError(f"physical: need at least one of {name}, got none.")
        for name in self.attacks:
            checks.known("physical", "attack", name, ATTACKS)
        for name in ("epsilons", "strength", "threshold"):
            checks.non_negative("physical", name, getattr(self, name))
        for name in ("num_photos", "num_steps", "num_samples", "attack_batch_size"):
            checks.at_least("physical", name, getattr(self, name), 1)
        # Traced with a strength that can be looked at, the channel checks it; nothing is computed.
        channel = functools.partial(attacks.photograph, strength=self.strength)
        jax.eval_shape(channel, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))


def smaller(config: Config) -> Config:
    """The same study in seconds: every attack, few of everything else."""
    return dataclasses.replace(
        config, epsilons=config.epsilons[-1:], num_examples=min(config.num_examples, 32),
        num_epochs=min(config.num_epochs, 2), num_photos=min(config.num_photos, 2),
        num_steps=min(config.num_steps, 3), num_samples=min(config.num_samples, 2),
    )  # fmt: skip


def published_steps(epsilon: float) -> int:
    """Steps of 1/255 that the paper takes: `min(e + 4, 1.25 e)` for an epsilon of e / 255."""
    levels = 255 * epsilon
    return max(1, round(min(levels + 4, 1.25 * levels)))


def catalogue(config: Config, epsilon: float) -> dict[str, Attack]:
    """The attacks of the study at one epsilon, by name: three as published, and two more."""
    small_steps = dict(num_steps=published_steps(epsilon), step_size=1 / 255)
    return {
        "fast": attacks.fgsm,
        "iterative": functools.partial(attacks.bim, **small_steps),
        "least_likely": functools.partial(attacks.least_likely, **small_steps),
        "pgd": functools.partial(attacks.pgd, num_steps=config.num_steps),
        "photo": functools.partial(
            attacks.photo,
            num_steps=config.num_steps,
            num_samples=config.num_samples,
            channel=functools.partial(attacks.photograph, strength=config.strength),
        ),
    }


class Ordering(NamedTuple):
    """A claim that one number is less than another.

    Attributes:
      claim: in words.
      epsilon: the radius.
      quantity: which column of the rows.
      smaller: the attack that should have less of it.
      larger: the attack that should have more of it.
      left: the number of `smaller`.
      right: the number of `larger`.
      verdict: "holds", "equal" or "does not hold"; "no images" where a rate is over none.
    """

    claim: str
    epsilon: float
    quantity: str
    smaller: str
    larger: str
    left: float
    right: float
    verdict: str


_CLAIMS = (
    ("iterative is stronger on source images", "source_adversarial", "iterative", "fast"),
    ("fast survives better than iterative", "destruction_rate", "fast", "iterative"),
    ("fast survives better than least likely", "destruction_rate", "fast", "least_likely"),
    (
        "fast survives better than iterative, prefiltered",
        "prefiltered_destruction_rate", "fast", "iterative",
    ),
    ("through the channel EOT is stronger than PGD", "photo_adversarial", "photo", "pgd"),
)  # fmt: skip


def orderings(rows: Sequence[dict[str, Any]]) -> list[Ordering]:
    """The paper's orderings, computed from the rows; those whose attacks are missing are left out.

    Args:
      rows: rows of the study.
    """
    row_of = {(row["attack"], row["epsilon"]): row for row in rows}
    found = []
    for claim, quantity, lesser, greater in _CLAIMS:
        for epsilon in dict.fromkeys(row["epsilon"] for row in rows):
            if {(lesser, epsilon), (greater, epsilon)} <= row_of.keys():
                left, right = (row_of[name, epsilon][quantity] for name in (lesser, greater))
                if left is None or right is None:
                    verdict = "no images"
                elif left == right:
                    verdict = "equal"
                else:
                    verdict = "holds" if left < right else "does not hold"
                found.append(
                    Ordering(claim, epsilon, quantity, lesser, greater, left, right, verdict)
                )
    return found


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      clean_accuracy: of the network on the source images.
      orderings: the paper's claims and whether they hold here.
    """

    run: Run
    clean_accuracy: float
    orderings: list[Ordering]


def craft(
    key: Key, attack: Attack, logits_fn: LogitsFn, x: Array, y: Array, epsilon: float,
    batch_size: int,
) -> Array:  # fmt: skip
    """Attacks all images, some at a time.

    Args:
      key: a key; example i is attacked with `fold_in(key, i)`.
      attack: the attack.
      logits_fn: classifier.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      epsilon: radius.
      batch_size: images at a time.

    Returns:
      Adversarial images, like `x`.
    """
    program, keys = jax.jit(attack), random.example_keys(key, len(x))
    parts = [slice(start, start + batch_size) for start in range(0, len(x), batch_size)]
    return jnp.concatenate(
        [program(keys[part], logits_fn, x[part], y[part], epsilon) for part in parts]
    )


class Answers(NamedTuple):
    """What a classifier says of source images and of their photographs.

    Attributes:
      correct: right about the source image, bool[n].
      confidence: in its answer to the source image, f32[n].
      photo_correct: right about each photograph, bool[photos, n].
      num_unanswered: photographs with logits that are not finite; they count as not correct.
    """

    correct: np.ndarray
    confidence: np.ndarray
    photo_correct: np.ndarray
    num_unanswered: int


def photographs(config: Config, x: Array) -> Array:
    """The photographs of the study, [photos, n, h, w, c]: the same draws for whatever images.

    Args:
      config: the study.
      x: images, f32[n, h, w, c]; the photographs of number i depend on i, not on n.
    """
    key = random.named(jax.random.key(config.seed), "photographs")
    shoot = jax.jit(attacks.photograph)
    return jnp.stack(
        [
            shoot(jax.random.fold_in(key, number), x, strength=config.strength)
            for number in range(config.num_photos)
        ]
    )


def answers(config: Config, logits_fn: LogitsFn, x: Array, y: Array) -> Answers:
    """Asks the classifier about images and their photographs.

    Args:
      config: the study.
      logits_fn: classifier.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
    """
    predict = functools.partial(evaluation.predict, batch_size=config.attack_batch_size)
    logits = predict(logits_fn, x)
    photo_logits = jnp.stack([predict(logits_fn, photo) for photo in photographs(config, x)])
    photo_answers = np.asarray(metrics.predictions(photo_logits))
    return Answers(
        np.asarray(metrics.is_correct(logits, y)), np.asarray(metrics.confidence(logits)),
        photo_answers == np.asarray(y), int(np.sum(photo_answers < 0)),
    )  # fmt: skip


def row(
    config: Config, attack: str, epsilon: float, clean: Answers, adversarial: Answers
) -> dict[str, Any]:
    """The numbers of a cell: accuracies, and destruction rates of both cases.

    In the average case all images count, in the prefiltered case those that are answered right
    when clean and wrong when adversarial, both times with the confidence `threshold`.
    """
    is_sure = (clean.confidence >= config.threshold) & (adversarial.confidence >= config.threshold)
    chosen = clean.correct & ~adversarial.correct & is_sure

    def rate(among: np.ndarray) -> float | None:
        return _mean(
            evaluation.destruction_rate(
                clean.correct & among, adversarial.correct, adversarial.photo_correct
            )
        )

    published_rate, published_prefiltered = published(attack, epsilon)
    return {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "attack": attack,
        "epsilon": epsilon,
        "num_examples": len(chosen),
        "num_photos": config.num_photos,
        "source_clean": _mean(clean.correct),
        "source_adversarial": _mean(adversarial.correct),
        "photo_clean": _mean(clean.photo_correct),
        "photo_adversarial": _mean(adversarial.photo_correct),
        "num_adversarial": int(np.sum(clean.correct & ~adversarial.correct)),
        "destruction_rate": rate(np.ones_like(chosen)),
        "published_destruction_rate": _mean(published_rate),
        "num_prefiltered": int(chosen.sum()),
        "prefiltered_photo_clean": _mean(clean.photo_correct[:, chosen]),
        "prefiltered_destruction_rate": rate(chosen),
        "published_prefiltered_destruction_rate": _mean(published_prefiltered),
        "num_unanswered": clean.num_unanswered + adversarial.num_unanswered,
    }


def _mean(values: Any) -> float | None:
    """The mean as a number of JSON, which has no NaN; None where there is nothing to average."""
    values = np.asarray(values)
    mean = float(values.mean()) if values.size else float("nan")
    return None if np.isnan(mean) else mean


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
        config, workdir, study="physical", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, test, x, y = opened[1:]
    logits_fn, clean_accuracy = networks.only_classifier(config, opened, data_dir)

    def attacked(name: str, epsilon: float, x: Array, y: Array) -> Array:
        key = random.named(jax.random.key(config.seed), f"{name} {epsilon}")
        attack = catalogue(config, epsilon)[name]
        return craft(key, attack, logits_fn, x, y, epsilon, config.attack_batch_size)

    clean, shown = answers(config, logits_fn, x, y), slice(min(4, len(y)))
    kinds: dict[str, Array] = {"clean": x[shown]}
    cells = [(name, epsilon) for name in config.attacks for epsilon in config.epsilons]
    with tqdm(cells, desc="attacks", disable=not parallel.is_main_process()) as bar:
        for name, epsilon in bar:
            bar.set_postfix(attack=name, epsilon=f"{epsilon:.4g}")
            if not run.is_done([(name, epsilon)]):
                with run.timed(name):
                    x_adv = attacked(name, epsilon, x, y)
                    if epsilon == config.epsilons[-1]:
                        kinds[name] = x_adv[shown]
                    adversarial = answers(config, logits_fn, x_adv, y)
                    run.append([row(config, name, epsilon, clean, adversarial)])
    study = Study(run, clean_accuracy, orderings(run.rows))
    run.table("orderings.csv", [ordering._asdict() for ordering in study.orderings])
    run.finish(config.seed)
    for name in config.attacks:  # those that an earlier run has attacked
        if name not in kinds:
            kinds[name] = attacked(name, config.epsilons[-1], x[shown], y[shown])
    _draw(study, config, logits_fn, kinds, y[shown], test.class_names)
    return study


def _draw(study: Study, config: Config, logits_fn: LogitsFn, kinds, y, class_names) -> None:
    from advjax.experiments import physical_figures  # matplotlib is slow to import

    draw_rates = functools.partial(physical_figures.destruction_rates, study.run.rows, config)
    study.run.figure("destruction.png", draw_rates)
    photos = {name: photographs(config, images)[0] for name, images in kinds.items()}
    draw_examples = functools.partial(
        physical_figures.photographs, logits_fn, kinds, photos, y, config.epsilons[-1], class_names
    )
    study.run.figure("photographs.png", draw_examples)


def print_study(study: Study, config: Config) -> None:
    """Prints accuracies, destruction rates beside the published ones, and the orderings.

    Args:
      study: what `run_study` returned.
      config: its configuration.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    first = study.run.rows[0]
    table = Table(
        title=f"Printed and photographed: {config.dataset}, {config.model}, "
        f"{first['num_examples']} images, {config.num_photos} photograph(s) each; accuracy clean "
        f"{study.clean_accuracy:.1%}, of clean photographs {first['photo_clean']:.1%}",
        caption="destruction: adversarial images that are answered right once photographed; in "
        "brackets of how many; published: ImageNet, Inception v3, a real camera",
    )
    table.add_column("attack")
    for name in (
        "epsilon", "accuracy", "photo accuracy", "destruction", "published", "prefiltered",
        "published",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for cell in study.run.rows:
        table.add_row(
            cell["attack"], _levels(cell["epsilon"]), _percent(cell["source_adversarial"]),
            _percent(cell["photo_adversarial"]),
            f"{_percent(cell['destruction_rate'])} ({cell['num_adversarial']})",
            _percent(cell["published_destruction_rate"]),
            f"{_percent(cell['prefiltered_destruction_rate'])} ({cell['num_prefiltered']})",
            _percent(cell["published_prefiltered_destruction_rate"]),
        )  # fmt: skip
    console.print(table)
    table = Table(title="Orderings of the paper, from the numbers above")
    for name in ("claim", "epsilon", "less", "more", "verdict"):
        table.add_column(name)
    for ordering in study.orderings:
        table.add_row(
            ordering.claim, _levels(ordering.epsilon),
            f"{ordering.smaller} {_percent(ordering.left)}",
            f"{ordering.larger} {_percent(ordering.right)}", ordering.verdict,
        )  # fmt: skip
    console.print(table)
    unanswered = max(cell["num_unanswered"] for cell in study.run.rows)
    if unanswered:
        console.print(f"Logits that are not finite for up to {unanswered} photographs of a cell.")
    console.print(f"Files: {study.run.workdir}/ (results.csv, orderings.csv, figures/)")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _levels(epsilon: float) -> str:
    levels = 255 * epsilon
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:.4g}"
