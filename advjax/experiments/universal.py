"""Universal perturbations: the share of images that one perturbation fools, over epsilon.

Cells are (method, epsilon); each gives one row and one file `perturbations/METHOD_EPSILON.npy`.
"""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from advjax import attacks, data, evaluation
from advjax.core import balls, checks, classifier, io, metrics, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, LogitsFn
from advjax.experiments import networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("method", "epsilon")
METHODS = ("sgd", "deepfool")


class Published(NamedTuple):
    """Where others fit the "deepfool" form, in linf, only to compare with.

    Attributes:
      epsilon: the radius.
      target_rate: the share of fooled images at which they stop.
    """

    epsilon: float
    target_rate: float


# X. Ling et al., "DEEPSEC: A Uniform Platform for Security Analysis of Deep Learning Model", IEEE
# S&P 2019: the settings of its published code.
PUBLISHED = {"mnist": Published(0.3, 0.35), "cifar10": Published(0.1, 0.9)}
# What the "sgd" form is to reach on held-out images at that radius.
EXPECTED_RATE = 0.8


@dataclasses.dataclass(frozen=True)
class Config(networks.NetworkConfig):
    """A study of universal perturbations.

    Attributes:
      seed: of the network and of the attacks.
      methods: names from `METHODS`.
      epsilons: radii in units of the image.
      ball: name of the norm.
      num_fit: images of the training split that the perturbation is fitted to.
      num_passes: passes over them, at most.
      fit_batch_size: images a step of the SGD form.
    """

    seed: int = 0
    methods: tuple[str, ...] = METHODS
    epsilons: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    ball: str = "linf"
    num_fit: int = 512
    num_passes: int = 10
    fit_batch_size: int = 64

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network("universal")
        if not self.methods or not self.epsilons:
            raise ValueError("universal: need at least one method and one epsilon.")
        for name in self.methods:
            checks.known("universal", "method", name, METHODS)
        checks.non_negative("universal", "epsilons", np.asarray(self.epsilons))
        balls.get(self.ball)
        for name in ("num_fit", "num_passes", "fit_batch_size"):
            checks.at_least("universal", name, getattr(self, name), 1)


def smaller(config: Config) -> Config:
    """The same study in seconds: both forms, few of everything else."""
    return dataclasses.replace(
        config, epsilons=(0.0, config.epsilons[-1]), num_examples=min(config.num_examples, 32),
        num_epochs=min(config.num_epochs, 2), num_fit=min(config.num_fit, 16),
        num_passes=min(config.num_passes, 2),
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      clean_accuracy: of the network on the held-out images.
    """

    run: Run
    clean_accuracy: float


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
        config, workdir, study="universal", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, test, x, _ = opened[1:]
    train = data.load(config.dataset, "train", data_dir=data_dir)
    train = train.take(min(config.num_fit, len(train)))
    x_fit = train.float_images()
    logits_fn, clean_accuracy = networks.only_classifier(config, opened, data_dir)
    logits_fn = classifier.as_pytree(logits_fn)
    cells = [(method, epsilon) for method in config.methods for epsilon in config.epsilons]
    with tqdm(cells, desc="perturbations", disable=not parallel.is_main_process()) as bar:
        for method, epsilon in bar:
            bar.set_postfix(method=method, epsilon=epsilon)
            path = perturbation_path(run, method, epsilon)
            if path.exists() and run.is_done([(method, epsilon)]):
                continue
            with run.timed(method):
                delta = _fit(config, method, epsilon, logits_fn, x_fit, train.labels)
            if parallel.is_main_process():
                with io.atomic_write(path) as temporary:
                    np.save(temporary, delta)
            run.append([_row(config, method, epsilon, logits_fn, delta, x_fit, x)])
    run.finish(config.seed)
    _draw(run, config, logits_fn, x, test.class_names)
    return Study(run, clean_accuracy)


def perturbation_path(run: Run, method: str, epsilon: float) -> pathlib.Path:
    """Where a perturbation f32[h, w, c] is kept, for `numpy.load`."""
    return run.workdir / "perturbations" / f"{method}_{epsilon:g}.npy"


@functools.cache
def _compiled(method: str, ball: str, num_passes: int, batch_size: int) -> Any:
    """One program for all epsilons."""
    return jax.jit(
        functools.partial(
            attacks.universal, method=method, ball=balls.get(ball), num_epochs=num_passes,
            batch_size=batch_size,
        )
    )  # fmt: skip


def _fit(config: Config, method: str, epsilon: float, logits_fn: LogitsFn, x, y) -> np.ndarray:
    fit = _compiled(method, config.ball, config.num_passes, config.fit_batch_size)
    key = random.named(jax.random.key(config.seed), method)
    return np.asarray(fit(key, logits_fn, x, y, epsilon))


def _row(
    config: Config, method: str, epsilon: float, logits_fn: LogitsFn, delta: Array, x_fit, x
) -> dict[str, Any]:
    shifted = np.clip(x + delta, 0, 1)
    answers = metrics.predictions(evaluation.predict(logits_fn, shifted, batch_size=512))
    return {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "method": method,
        "ball": config.ball,
        "epsilon": epsilon,
        "num_fit": len(x_fit),
        "num_examples": len(x),
        "fooling_rate_fit": float(evaluation.fooling_rate(logits_fn, x_fit, delta, batch_size=512)),
        "fooling_rate": float(evaluation.fooling_rate(logits_fn, x, delta, batch_size=512)),
        "num_not_answered": int(np.sum(np.asarray(answers) < 0)),
    }


def _draw(run: Run, config: Config, logits_fn: LogitsFn, x: Array, class_names) -> None:
    from advjax.experiments import set_figures  # matplotlib is slow to import

    run.figure("curve.png", functools.partial(set_figures.fooling_curves, run.rows, config))
    epsilon = max(config.epsilons)
    deltas = {method: np.load(perturbation_path(run, method, epsilon)) for method in config.methods}
    run.figure(
        "perturbation.png",
        functools.partial(
            set_figures.perturbations, logits_fn, x[: min(6, len(x))], deltas, epsilon, class_names
        ),
    )


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints the fooling rates and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    published = PUBLISHED.get(config.dataset) if config.ball == "linf" else None
    table = Table(
        title=f"Universal perturbations in {config.ball}: {config.dataset}, {config.model}, fitted "
        f"to {study.run.rows[0]['num_fit']} training images, clean {study.clean_accuracy:.1%}"
    )
    for name in ("method", "epsilon", "fooled, fitted to", "fooled, held out", "expected"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in study.run.rows:
        expected = ""
        if published is not None and row["epsilon"] == published.epsilon:
            expected = {
                "sgd": f"> {EXPECTED_RATE:.0%}",
                "deepfool": f"{published.target_rate:.0%} (DEEPSEC stops there)",
            }[row["method"]]
        table.add_row(
            row["method"], f"{row['epsilon']:.4g}", f"{row['fooling_rate_fit']:.1%}",
            f"{row['fooling_rate']:.1%}", expected,
        )  # fmt: skip
    console.print(table)
    console.print(f"Files: {study.run.workdir}/ (results.csv, perturbations/, figures/)")
