"""AutoAttack on one classifier: robust accuracy after each attack of the cascade.

Cells are radii; each is one row.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from advjax import attacks
from advjax.attacks.cascades import VERSIONS, square_sentences
from advjax.core import balls, checks, parallel, random
from advjax.core.io import PathLike
from advjax.experiments import networks
from advjax.experiments.runs import Run

KEY_COLUMNS = ("epsilon",)


@dataclasses.dataclass(frozen=True)
class Config(networks.NetworkConfig):
    """An AutoAttack study.

    Attributes:
      num_examples: test images that are attacked.
      version: "standard" or "plus".
      ball: the name of the norm.
      epsilons: radii.
      seed: of the network and of the attacks.
      num_steps: steps of APGD and FAB.
      num_queries: queries of Square.
      attack_batch_size: images attacked at a time.
    """

    num_examples: int = 128
    version: str = "standard"
    ball: str = "linf"
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    seed: int = 0
    num_steps: int = 100
    num_queries: int = 5000
    attack_batch_size: int = 512

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        self.check_network("auto_attack")
        checks.known("auto_attack", "version", self.version, VERSIONS[:2])
        balls.get(self.ball)
        if not self.epsilons:
            raise ValueError("auto_attack: need at least one epsilon, got none.")
        checks.non_negative("auto_attack", "epsilons", np.asarray(self.epsilons))
        for name, least in (("num_steps", 1), ("num_queries", 2), ("attack_batch_size", 1)):
            checks.at_least("auto_attack", name, getattr(self, name), least)


def smaller(config: Config) -> Config:
    """The same study in seconds."""
    return dataclasses.replace(
        config, num_examples=min(config.num_examples, 16), num_epochs=min(config.num_epochs, 2),
        num_steps=min(config.num_steps, 4), num_queries=min(config.num_queries, 10),
        epsilons=config.epsilons[:2],
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      warnings: sentences on masked gradients.
    """

    run: Run
    warnings: tuple[str, ...]


def run_study(
    config: Config,
    workdir: PathLike,
    *,
    data_dir: PathLike | None = None,
    mesh: Mesh | None = None,
) -> Study:
    """Runs what is missing of a study and writes its table and figure.

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
        config, workdir, study="auto_attack", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run, test, x, y = opened[1:]
    logits_fn, clean = networks.only_classifier(config, opened, data_dir)
    names = attacks.auto_attack_parts(
        config.version, balls.get(config.ball), config.num_steps, config.num_queries,
        test.num_classes,
    )  # fmt: skip
    found = attacks.masking_signs(logits_fn, x, y).sentences()
    with tqdm(config.epsilons, desc="epsilons", disable=not parallel.is_main_process()) as bar:
        for epsilon in bar:
            if run.is_done([(epsilon,)]):
                continue
            with run.timed(f"epsilon {epsilon:g}"):
                result = attacks.cascade(
                    random.named(jax.random.key(config.seed), f"{config.ball} {epsilon!r}"),
                    names, logits_fn, x, y, epsilon, batch_size=config.attack_batch_size,
                    mesh=mesh,
                    progress=lambda name, left: bar.set_postfix(attack=name, left=left),
                )  # fmt: skip
                run.append(
                    [_row(config, epsilon, clean, list(names), np.asarray(result.broken_by))]
                )
    run.finish(config.seed)
    for row in run.rows:
        before, after = (row[f"after_{name}"] for name in list(names)[-2:])
        by_last = round((before - after) * row["num_examples"])
        found = (*found, *square_sentences(tuple(names), by_last, row["num_examples"]))
    study = Study(run, tuple(dict.fromkeys(found)))
    _draw(study, config)
    return study


def _row(
    config: Config, epsilon: float, clean: float, names: list[str], broken_by: np.ndarray
) -> dict[str, Any]:
    after = {
        f"after_{name}": float(np.mean(broken_by > position)) for position, name in enumerate(names)
    }
    return {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "version": config.version,
        "ball": config.ball,
        "epsilon": epsilon,
        "num_examples": len(broken_by),
        "clean_accuracy": clean,
        **after,
        "num_correct": int(np.sum(broken_by == len(names))),
        "robust_accuracy": float(np.mean(broken_by == len(names))),
    }


def _draw(study: Study, config: Config) -> None:
    from advjax.experiments import figures  # matplotlib is slow to import

    rows = sorted(study.run.rows, key=lambda row: row["epsilon"])
    epsilons = [0.0, *(row["epsilon"] for row in rows)]
    series = {
        f"after {name.removeprefix('after_')}": (
            epsilons, [rows[0]["clean_accuracy"], *(row[name] for row in rows)]
        )
        for name in rows[0] if name.startswith("after_")
    }  # fmt: skip
    study.run.figure(
        "cascade.png",
        lambda path: figures.lines(
            series, xlabel=f"epsilon ({config.ball})", ylabel="robust accuracy",
            title=f"AutoAttack {config.version}: {config.dataset}, {config.model}, "
            f"{rows[0]['num_examples']} images", path=path,
        ),
    )  # fmt: skip
