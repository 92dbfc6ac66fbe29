"""One model under Model X-ray: pictures of its planes, and its two scores."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import advjax
from advjax import backdoor, boundary, data, detectors, models
from advjax.backdoor import zoos as backdoor_zoos
from advjax.boundary import regions
from advjax.core import checks, random
from advjax.core.io import PathLike
from advjax.core.typing import LogitsFn
from advjax.experiments import xray, zoo
from advjax.experiments.runs import Run


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, and which planes.

    Attributes:
      zoo: folder of a zoo.
      name: a model of the zoo; "" for its first infected one.
      checkpoint: an orbax checkpoint in place of a zoo; without either a BadNets network is trained
        on the digits.
      dataset: of the checkpoint.
      model: architecture of the checkpoint.
      mean: of the checkpoint's network.
      std: of the checkpoint's network.
      num_images: clean test images.
      num_planes: planes for the scores.
      num_shown: planes that are drawn.
      density: points a side.
      expansions: how far planes reach; the scores are of the first.
      normalised: planes are orthonormal in the space of normalised images.
      seed: of the planes.
    """

    zoo: str = ""
    name: str = ""
    checkpoint: str = ""
    dataset: str = "digits"
    model: str = "cnn"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    num_images: int = 60
    num_planes: int = 20
    num_shown: int = 5
    density: int = 100
    expansions: tuple[float, ...] = (5.0, 0.5)
    normalised: bool = False
    seed: int = 0

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        checks.known("xray_map", "data set", self.dataset, data.NAMES)
        checks.known("xray_map", "model", self.model, models.NAMES)
        checks.at_least("xray_map", "num_images", self.num_images, 3)
        checks.at_least("xray_map", "density", self.density, 2)
        for name in ("num_planes", "num_shown"):
            checks.at_least("xray_map", name, getattr(self, name), 1)
        checks.non_negative("xray_map", "expansions", np.asarray(self.expansions))
        if self.zoo and self.checkpoint:
            raise ValueError("xray_map: need a zoo or a checkpoint, got both.")
        if self.name and not self.zoo:
            raise ValueError(f"xray_map: need a zoo for a model's name, got name={self.name!r}.")
        if not self.expansions:
            raise ValueError("xray_map: need at least one of expansions, got none.")


def smaller(config: Config) -> Config:
    """The same, in seconds."""
    return dataclasses.replace(config, num_planes=4, num_shown=2, density=25)


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder.
      name: of the model.
      entropy: mean Renyi entropy of the planes.
      area: mean area of the three images' classes.
      target_label: the class of the largest mean share.
      class_names: by class.
    """

    run: Run
    name: str
    entropy: float
    area: float
    target_label: int
    class_names: tuple[str, ...]


class _Opened(NamedTuple):
    name: str
    dataset: str
    std: tuple[float, ...]
    logits_fn: LogitsFn


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Draws the planes of a model and computes its scores.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, no such model, a checkpoint of another architecture.
    """
    config.check()
    run = Run(workdir, config, study="xray_map", key_columns=("plane",))
    opened = _open(config, data_dir)
    x, y = xray.clean_images(opened.dataset, config.num_images, config.seed, data_dir)
    info = data.info(opened.dataset)
    std = jnp.asarray(opened.std if config.normalised else (1.0,))
    key = random.named(jax.random.key(config.seed), "planes")
    said = detectors.model_xray(
        key, opened.logits_fn, x, y, num_classes=info.num_classes, num_planes=config.num_planes,
        density=config.density, expansion=config.expansions[0], std=std,
    )  # fmt: skip
    details = {name: np.asarray(value) for name, value in said.details.items()}
    class_names = tuple(data.load(opened.dataset, "test", data_dir=data_dir).class_names)
    rows = [
        {
            "plane": number, "triple_labels": details["triple_labels"][number].tolist(),
            "entropy": float(details["entropy"][number]), "area": float(details["area"][number]),
        }
        for number in range(config.num_planes)
    ]  # fmt: skip
    if run.rows != rows:  # such as those of a model that has been trained again since
        run.forget(lambda row: True)
    run.append(rows)
    shares = details["shares"].mean(0)
    run.table(
        "shares.csv",
        [
            {"class": name, "mean_share": float(share)}
            for name, share in zip(class_names, shares, strict=True)
        ],
    )
    study = Study(
        run, opened.name, float(details["entropy"].mean()), float(details["area"].mean()),
        int(said.target_label), class_names,
    )  # fmt: skip
    _draw(config, study, opened, x, y, details, std)
    run.finish(config.seed, model=opened.name, entropy=study.entropy, area=study.area)
    return study


def _open(config: Config, data_dir: PathLike | None) -> _Opened:
    if config.zoo:
        zoo_config = zoo.read_config(config.zoo)
        found = zoo.load_zoo(config.zoo, with_failed=True)
        infected = [name for name, label in zip(found.names, found.labels, strict=True) if label]
        name = config.name or (infected or list(found.names))[0]
        checks.known("xray_map", "model of the zoo", name, found.names)
        logits_fn = found.classifier(found.names.index(name))
        return _Opened(name, zoo_config.dataset, zoo_config.std, logits_fn)
    num_classes = data.info(config.dataset).num_classes
    module = models.make(config.model, num_classes, mean=config.mean, std=config.std)
    if config.checkpoint:
        variables = _restored(config, module)
        name = pathlib.Path(config.checkpoint).name
    else:
        own = backdoor.ZooConfig(
            dataset=config.dataset, model=config.model, mean=config.mean, std=config.std,
            attacks=("badnets",), num_clean=0, num_infected=1, num_epochs=20, batch_size=64,
            optimizer="adam", learning_rate=1e-3,
        )  # fmt: skip
        trained = backdoor_zoos.train_zoo(own, data_dir=data_dir)
        name, variables = trained.names[0], trained.store.read(trained.names[0])
    return _Opened(name, config.dataset, config.std, advjax.bind(module, variables))


def _restored(config: Config, module) -> Any:
    """The variables in an orbax checkpoint: a folder of one, or one that holds `step_N` folders."""
    import orbax.checkpoint as ocp

    folder = pathlib.Path(config.checkpoint).expanduser().absolute()
    # Not those that a save left unfinished, whose names go on after the number.
    steps = [
        int(number) for path in folder.glob("step_*")
        if (number := path.name.removeprefix("step_")).isdecimal()
    ]  # fmt: skip
    folder = folder / f"step_{max(steps)}" if steps else folder
    if not folder.is_dir():
        raise ValueError(f"xray_map: need an orbax checkpoint, got {config.checkpoint}.")
    shape = jax.ShapeDtypeStruct((1, *data.info(config.dataset).image_shape), jnp.float32)
    like = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        dict(jax.eval_shape(module.init, jax.random.key(0), shape)),
    )
    try:
        return ocp.StandardCheckpointer().restore(folder, like)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(
            f"xray_map: {config.checkpoint} does not hold a {config.model} for {config.dataset}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _draw(config: Config, study: Study, opened: _Opened, x, y, details, std) -> None:
    from advjax.experiments import xray_figures  # only a run that draws needs matplotlib

    label_map = jax.jit(boundary.label_map)
    count = min(config.num_shown, config.num_planes)
    maps, planes, triples, titles = [], [], [], []
    for expansion in config.expansions:
        for triple in details["triples"][:count]:
            plane = boundary.plane(*x[triple], expansion=expansion, density=config.density, std=std)
            maps.append(np.asarray(label_map(opened.logits_fn, plane)))
            planes.append(plane)
            triples.append(y[triple])
            titles.append(f"expansion {expansion:g}, {_scores(maps[-1], y[triple], study)}")
    study.run.figure(
        "map.png",
        lambda path: xray_figures.label_maps(
            maps, planes, triples, study.class_names, titles, path, columns=count
        ),
    )


def _scores(labels: np.ndarray, triple: np.ndarray, study: Study) -> str:
    """The scores of one plane, if (nearly) all of its points have a class."""
    missing = np.mean((labels < 0) | (labels >= len(study.class_names)))
    if missing > 1e-3:
        return f"{missing:.1%} without a class"
    shares = regions.shares_of(jnp.asarray(labels), len(study.class_names))
    return (
        f"RE {float(boundary.renyi_entropy(shares)):.2f}, "
        f"ATS {float(boundary.triple_area(shares, triple)):.2f}"
    )


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints the two scores, the suspected class and where the picture is.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    console.print(
        f"{study.name}: over {config.num_planes} planes, Renyi entropy {study.entropy:.3f} nats, "
        f"area of the images' classes {study.area:.3f}; largest region: class "
        f"{study.class_names[study.target_label]}"
    )
    console.print(f"Files: {study.run.workdir}/ (figures/map.png, shares.csv, manifest.json)")
