"""Logit gaps near zero, the first-order response to FGSM, and the mean field, network by network.

A cell is a network on a data set, or "random", independent logits to compare with. Keys are derived
from the cell's name, so order and interruption never change a number.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import advjax
from advjax import data, evaluation, models, training, universality
from advjax.core import checks, io, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import LogitsFn
from advjax.experiments import grids
from advjax.experiments.networks import clean_accuracy
from advjax.experiments.runs import Run

KEY_COLUMNS = ("dataset", "model")
RANDOM = "random"
_NUM_RANDOM, _RANDOM_CLASSES = 100_000, 10
_NUM_EPSILONS = 40
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Config:
    """A study of logit gaps.

    Attributes:
      datasets: names for `data.load`.
      models: names for `models.make`, each trained on each data set.
      num_train: training images that are used; 0 for all.
      num_examples: test images whose gaps are looked at, at most.
      num_responses: of them, those whose response to FGSM is.
      num_epochs: training epochs.
      batch_size: training images a step.
      learning_rate: of Adam, with a cosine schedule to 0.
      share: the share of the gaps that the fit near zero uses.
      small_epsilons: up to where the explained variance is taken, one column each.
      max_epsilon: end of the mean-field curves.
      seed: of everything.
    """

    datasets: tuple[str, ...] = ("digits",)
    models: tuple[str, ...] = ("mlp", "cnn")
    num_train: int = 0
    num_examples: int = 10_000
    num_responses: int = 2000
    num_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    share: float = 0.05
    small_epsilons: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    max_epsilon: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        for name in self.datasets:
            checks.known("logit_gaps", "data set", name, data.NAMES)
        for name in self.models:
            checks.known("logit_gaps", "model", name, models.NAMES)
        if not self.datasets or not self.models or not self.small_epsilons:
            raise ValueError("logit_gaps: need at least one data set, one model and one epsilon.")
        for name in ("num_examples", "num_responses", "num_epochs", "batch_size"):
            checks.at_least("logit_gaps", name, getattr(self, name), 1)
        checks.at_least("logit_gaps", "num_train", self.num_train, 0)
        for name in ("learning_rate", "small_epsilons", "max_epsilon"):
            checks.non_negative("logit_gaps", name, getattr(self, name))
        if not 0 < self.share <= 1:
            raise ValueError(f"logit_gaps: need 0 < share <= 1, got share={self.share}.")


def smaller(config: Config) -> Config:
    """The same on the digits, in seconds."""
    return dataclasses.replace(
        config, datasets=("digits",), models=("mlp",), num_train=0, num_examples=359,
        num_responses=200, num_epochs=5, batch_size=32, share=0.2, small_epsilons=(0.1,),
        max_epsilon=0.4,
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
    config.check()
    tests = {name: data.load(name, "test", data_dir=data_dir) for name in config.datasets}
    run = Run(workdir, config, study="logit_gaps", key_columns=KEY_COLUMNS)
    if not run.is_done([(RANDOM, RANDOM)]):
        key = random.named(jax.random.key(config.seed), RANDOM)
        logits = universality.random_logits(key, _NUM_RANDOM, _RANDOM_CLASSES)
        _write(run, RANDOM, RANDOM, {}, universality.logit_gaps(logits, share=config.share))
    for dataset, test in tests.items():
        test = test.take(min(config.num_examples, len(test)))
        for model in config.models:
            if not run.is_done([(dataset, model)]):
                _measure(config, run, model, test, data_dir)
    run.finish(config.seed)
    cells = {
        f"{row['dataset']}, {row['model']}": np.load(_arrays_path(run, row)) for row in run.rows
    }
    trained = {name: cell for name, cell in cells.items() if "measured" in cell}
    run.figure("densities.png", functools.partial(draw_densities, cells))
    for name, draw in (
        ("responses.png", draw_responses),
        ("mean_field.png", draw_mean_fields),
        ("linearity.png", draw_linearity),
    ):
        run.figure(name, functools.partial(draw, trained))
    return Study(run)


def _arrays_path(run: Run, row: Mapping[str, Any]) -> pathlib.Path:
    return run.workdir / "arrays" / f"{row['dataset']}_{row['model']}.npz"


def _write(run: Run, dataset: str, model: str, more: Mapping[str, Any], result, **arrays) -> None:
    row = {
        "dataset": dataset,
        "model": model,
        "num_examples": len(result.gaps),
        "median_gap": float(np.median(result.gaps[:, 0])),
        "exponents": _numbers(result.exponents, 5),
        "deviations": _numbers(result.deviations, 5),
        "limits": _numbers(result.limits, 6),
        **more,
    }
    if parallel.is_main_process():
        with io.atomic_write(_arrays_path(run, row)) as path, path.open("wb") as file:
            np.savez(file, gaps=np.asarray(result.gaps), **arrays)
    run.append([row])


def _numbers(values: Any, digits: int) -> list[float | None]:
    """For JSON, which knows no NaN: None stands for that."""
    numbers = np.asarray(values, float).round(digits).tolist()
    return [number if np.isfinite(number) else None for number in numbers]


def _train(config: Config, run: Run, model: str, dataset: str, data_dir) -> LogitsFn:
    train = data.load(dataset, "train", data_dir=data_dir)
    train = train.take(min(config.num_train or len(train), len(train)))
    module = models.make(model, train.num_classes)
    num_steps = config.num_epochs * max(1, len(train) // config.batch_size)
    fitted = training.fit(
        random.named(jax.random.key(config.seed), f"{dataset} {model}"), module, train,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps)),
        num_epochs=config.num_epochs, batch_size=config.batch_size,
        checkpoint_dir=run.workdir / "checkpoints" / f"{dataset}_{model}",
    )  # fmt: skip
    return advjax.bind(module, fitted.variables)


@jax.jit
def _responses_of_batches(logits_fn, batches):
    responses = jax.lax.map(lambda x: universality.linear_response(logits_fn, x), batches)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), responses)


def _responses(logits_fn: LogitsFn, x: np.ndarray, batch_size: int):
    """The response of each image, in batches; the last is filled up with its last image."""
    size = min(batch_size, len(x))
    padding = np.repeat(x[-1:], parallel.padded(len(x), size) - len(x), axis=0)
    batches = np.concatenate([x, padding]).reshape(-1, size, *x.shape[1:])
    responses = _responses_of_batches(logits_fn, batches)
    return jax.tree.map(lambda leaf: leaf[: len(x)], responses)


def _measure(config: Config, run: Run, model: str, test: data.Dataset, data_dir) -> None:
    dataset, x, y = test.name, test.float_images(), test.labels
    with run.timed("training"):
        logits_fn = _train(config, run, model, dataset, data_dir)
    name = f"{model} on {dataset}"
    accuracy = clean_accuracy("logit_gaps", name, logits_fn, x, y, _BATCH)
    with jax.default_matmul_precision("highest"):  # the smallest gaps are what it is about
        logits = evaluation.predict(logits_fn, x, batch_size=_BATCH)
    result = universality.logit_gaps(logits, share=config.share)
    chosen = x[: config.num_responses]
    with run.timed("responses"):
        response = _responses(logits_fn, chosen, _BATCH)
    epsilons = np.linspace(0, config.max_epsilon, _NUM_EPSILONS)
    theory = universality.mean_field(response, epsilons)
    # The picture of linearity is of an image that changes early: the one of the lower quartile.
    shown = int(np.argsort(np.asarray(response.measured))[len(chosen) // 4])
    end = np.float32(3 * min(float(response.measured[shown]), config.max_epsilon))
    path = jnp.linspace(0, end, _NUM_EPSILONS)
    images = chosen[shown] + path[:, None, None, None] * response.direction[shown]
    more = {
        "accuracy": accuracy,
        "num_responses": len(chosen),
        "gamma": float(theory.gamma),
        "small_epsilons": list(config.small_epsilons),
        "num_small": [int(np.sum(response.measured <= e)) for e in config.small_epsilons],
        "explained_variances": _numbers(
            [universality.explained_variance(response, e) for e in config.small_epsilons], 5
        ),
    }
    _write(
        run, dataset, model, more, result,
        predicted=np.asarray(response.predicted), measured=np.asarray(response.measured),
        epsilons=epsilons, mean_field=np.asarray(theory.error),
        linear_error=np.asarray(theory.linear_error),
        measured_error=np.asarray(theory.measured_error), path=np.asarray(path),
        path_logits=np.asarray(logits_fn(jnp.clip(images, 0, 1))),
        path_gamma=np.asarray(response.gamma[shown]),
    )  # fmt: skip


def draw_densities(cells: Mapping[str, Any], path: pathlib.Path) -> None:
    """Densities of Delta_12, Delta_13 and Delta_14 near zero, one panel a network.

    Args:
      cells: name to arrays with `gaps`.
      path: where to.
    """
    from advjax.experiments import figures  # matplotlib is slow to import

    panels = {}
    for name, cell in cells.items():
        gaps = cell["gaps"][:, :3]
        bins = np.geomspace(np.quantile(gaps[:, 0], 0.01), gaps.max(), 30)
        centres = np.sqrt(bins[1:] * bins[:-1])
        panels[name] = {
            f"Delta_1{j + 2}": (centres, np.histogram(gaps[:, j], bins, density=True)[0])
            for j in range(gaps.shape[1])
        }
    figures.curve_panels(
        panels, xlabel="logit gap", ylabel="density", is_logarithmic=True, path=path
    )


def draw_responses(cells: Mapping[str, Any], path: pathlib.Path) -> None:
    """The epsilon at which the answer changes, predicted and measured, one panel a network.

    Args:
      cells: name to arrays with `predicted` and `measured`.
      path: where to.
    """
    from advjax.experiments import figures

    panels = {}
    for name, cell in cells.items():
        counts = np.isfinite(cell["predicted"]) & np.isfinite(cell["measured"])
        measured, predicted = cell["measured"][counts], cell["predicted"][counts]
        ends = np.array([measured.min(), measured.max()]) if counts.any() else np.ones(2)
        panels[name] = {"images": (measured, predicted), "equal": (ends, ends)}
    figures.curve_panels(
        panels, xlabel="measured epsilon", ylabel="first-order epsilon", is_logarithmic=True,
        points=("images",), path=path,
    )  # fmt: skip


def draw_mean_fields(cells: Mapping[str, Any], path: pathlib.Path) -> None:
    """Predicted and measured errors over epsilon, one panel a network.

    Args:
      cells: name to arrays with `epsilons` and the three errors.
      path: where to.
    """
    from advjax.experiments import figures

    panels = {
        name: {
            "measured": (cell["epsilons"], cell["measured_error"]),
            "first order, each image": (cell["epsilons"], cell["linear_error"]),
            "mean field": (cell["epsilons"], cell["mean_field"]),
        }
        for name, cell in cells.items()
    }
    figures.curve_panels(panels, xlabel="epsilon", ylabel="share of answers that change", path=path)


def draw_linearity(cells: Mapping[str, Any], path: pathlib.Path) -> None:
    """Logits of an image along the direction of the attack, and their tangents.

    Args:
      cells: name to arrays with `path`, `path_logits` and `path_gamma`.
      path: where to.
    """
    from advjax.experiments import figures

    panels = {}
    for name, cell in cells.items():
        logits, epsilons = cell["path_logits"], cell["path"]
        lines = {}
        for j in np.argsort(-logits.max(0))[:4]:
            lines[f"class {j}"] = (epsilons, logits[:, j])
            lines[f"tangent {j}"] = (epsilons, logits[0, j] + epsilons * cell["path_gamma"][j])
        panels[name] = lines
    figures.curve_panels(panels, xlabel="epsilon", ylabel="logit", path=path)


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints one line a network and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    table = Table(
        title="Logit gaps: exponents of their densities near zero",
        caption=f"Fitted to the smallest {config.share:.0%}. Right: explained share of the "
        "variance of the epsilon that changes the answer, among those up to the epsilon named.",
    )
    names = ("network", "accuracy", "Delta_12", "Delta_13", "Delta_14")
    for name in (*names, *(f"to {e:g}" for e in config.small_epsilons)):
        table.add_column(name, justify="left" if name == "network" else "right")
    for row in study.run.rows:
        exponents = zip(row["exponents"], row["deviations"], strict=True)
        table.add_row(
            f"{row['dataset']}, {row['model']}" if row["model"] != RANDOM else "independent logits",
            f"{row['accuracy']:.1%}" if "accuracy" in row else "",
            *(
                grids.MISSING if None in pair else f"{pair[0]:.2f} ± {pair[1]:.2f}"
                for pair in [*exponents][:3]
            ),
            *_explained(row),
        )
    console.print(table)
    console.print(f"Files: {study.run.workdir}/ (results.csv, figures/, manifest.json)")


def _explained(row: Mapping[str, Any]) -> Sequence[str]:
    shares = row.get("explained_variances", ())
    return [grids.MISSING if share is None else f"{share:.1%}" for share in shares]
