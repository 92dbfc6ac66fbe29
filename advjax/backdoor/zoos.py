"""The zoo of a detection study: many clean and many infected classifiers of one architecture.

Every model has a name, such as `wanet_003`, from which its key is derived: which others are
trained, and in which order, never changes it. Models are trained in groups, each one program. What
a group gives goes to a store; `train_zoo` itself touches no file (see `advjax.experiments.zoo`).
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from advjax import data, evaluation, models, training
from advjax.backdoor import label_maps, metrics, poisoning, recipes
from advjax.core import checks, classifier, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Key, LogitsFn
from advjax.data import Dataset

CLEAN = "clean"
LABEL_MAPS = ("all_to_one", "x_to_one", "x_to_x", "all_to_all")
METHODS = ("map", "vmap", "loop")
AUGMENTATIONS = ("none", "crop", "crop_flip")
OPTIMIZERS = ("sgd", "adam")
_TEST_BATCH = 1000  # images at a time


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """Which models a zoo holds and how they are trained.

    Attributes:
      dataset: name for `data.load`.
      model: name for `models.make`.
      model_options: fields of the network in place of its name's, such as {"stages": (2, 2)}.
      mean: the network's input becomes `(x - mean) / std`; one number, or one a channel.
      std: see `mean`.
      attacks: names from `ATTACKS`.
      options: of attacks in place of their published ones, such as {"badnets": {"size": 5}}.
      num_clean: clean models.
      num_infected: infected models an attack, each with a seed and a target of its own.
      label_map: one of "all_to_one", "x_to_one", "x_to_x", "all_to_all"; an attack that keeps
        labels (sig) always has `label_maps.clean_label`.
      num_sources: the x of "x_to_one" and "x_to_x".
      ratio: poisoned share of each source class.
      clean_label_ratio: poisoned share of the target class, for attacks that keep labels.
      cover_ratio: see `cover_ratio_of`.
      per_batch: see `backdoor.train`; not for attacks with a training of their own.
      quantise: what stored poisoned images are rounded to: "none", "floor" or "round".
      num_train: training images that are used; 0 for all.
      num_examples: test images that accuracy and attack success are measured on; 0 for all.
      num_epochs: training epochs.
      batch_size: training images a step.
      optimizer: "sgd" (momentum 0.9) or "adam", with a cosine schedule to 0 over the whole run.
      learning_rate: its first learning rate.
      weight_decay: added to the gradient as `weight_decay * params`, as PyTorch does.
      augment: "none", "crop" (4 pixels) or "crop_flip".
      method: "map" and "vmap" train a group in one program (see `training.fit_many`), "loop" is
        for large networks: one model after the other, with the batch split over the mesh.
      group_size: models in a program. It also bounds the memory: the group's poisoned data sets
        are on the device together (one clean one where each batch is poisoned anew).
      min_accuracy: a model counts only if its clean accuracy is at least this.
      max_gap: ... and at most this far from the mean of the clean models.
      min_success: ... and, if infected, its attack success rate is above this.
      seed: of everything.
    """

    dataset: str = "digits"
    model: str = "cnn"
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    attacks: tuple[str, ...] = ("badnets", "blended", "wanet")
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    num_clean: int = 20
    num_infected: int = 20
    label_map: str = "all_to_one"
    num_sources: int = 1
    ratio: float = 0.1
    clean_label_ratio: float = 0.5
    cover_ratio: float = 0.1
    # Before this was there, all attacks poisoned the data once.
    per_batch: bool | None = dataclasses.field(default=None, metadata={"before": False})
    quantise: str = "round"
    num_train: int = 0
    num_examples: int = 0
    num_epochs: int = 20
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    augment: str = "none"
    method: str = "map"
    group_size: int = 10
    min_accuracy: float = 0.9
    max_gap: float = 0.03
    min_success: float = 0.9
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
            ("method", self.method, METHODS),
            ("augmentation", self.augment, AUGMENTATIONS),
            ("quantisation", self.quantise, poisoning.QUANTISATIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            *(("attack", attack, recipes.ATTACKS) for attack in self.attacks),
        ):
            checks.known("train_zoo", kind, name, names)
        for name in ("num_infected", "num_sources", "num_epochs", "batch_size", "group_size"):
            checks.at_least("train_zoo", name, getattr(self, name), 1)
        for name in ("num_clean", "num_train", "num_examples"):
            checks.at_least("train_zoo", name, getattr(self, name), 0)
        checks.non_negative("train_zoo", "learning_rate", self.learning_rate)
        checks.non_negative("train_zoo", "weight_decay", self.weight_decay)
        shares = ("ratio", "clean_label_ratio", "cover_ratio")
        for name in (*shares, "min_accuracy", "max_gap", "min_success"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"train_zoo: need 0 <= {name} <= 1, got {name}={value}.")
        if not self.attacks and not self.num_clean:
            raise ValueError("train_zoo: need at least one model, got num_clean=0 and no attack.")
        for attack in self.attacks:
            if recipes.RECIPES[attack].needs_clean and not self.num_clean:
                raise ValueError(
                    f"train_zoo: {attack} needs a clean model of the same architecture, got "
                    "num_clean=0."
                )
        check_normalisation("train_zoo", self)
        check_options("train_zoo", self)
        check_network("train_zoo", self)
        num_classes = data.info(self.dataset).num_classes
        # A map that cannot be says so now.
        for attack in self.attacks:
            label_map_of(self, attack, 0, num_classes)

    @property
    def groups(self) -> Iterator["Group"]:
        """What is trained together, in order: the clean models first."""
        for kind, count in (
            (CLEAN, self.num_clean),
            *((a, self.num_infected) for a in self.attacks),
        ):
            alone = self.method == "loop" or (
                kind != CLEAN and recipes.RECIPES[kind].procedure is not None
            )
            size = 1 if alone else self.group_size
            for first in range(0, count, size):
                yield Group(kind, tuple(range(first, min(first + size, count))), alone)


def check_normalisation(caller: str, config: Any) -> None:
    """Refuses a mean or std that is not one number, or one a channel of the data set's images.

    Args:
      caller: for the error.
      config: with dataset, mean and std.

    Raises:
      ValueError: another number of them, a std that is not positive, numbers that are not finite.
    """
    channels = data.info(config.dataset).image_shape[-1]
    for name, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{caller}: need one {name}, or one for each of {channels} channel(s), got "
                f"{len(values)}."
            )
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{caller}: need a finite {name}, got {name}={values}.")
    if not all(value > 0 for value in config.std):
        raise ValueError(f"{caller}: need a positive std, got std={config.std}.")


def check_network(caller: str, config: ZooConfig) -> None:
    """Refuses `model_options` with which no network can be made for the data set's images.

    Args:
      caller: for the error.
      config: a zoo.

    Raises:
      ValueError: what the network says.
    """
    if not config.model_options:
        return
    images = jax.ShapeDtypeStruct((1, *data.info(config.dataset).image_shape), "f4")
    try:
        jax.eval_shape(make_network(config).init, jax.random.key(0), images)
    except Exception as error:  # a network raises what it likes
        raise ValueError(
            f"{caller}: need options that {config.model} can take on {config.dataset}, got "
            f"model_options={dict(config.model_options)}: {error}"
        ) from error


def check_options(caller: str, config: Any) -> None:
    """Refuses options that an attack cannot take; the attack need not be one of the study's.

    Args:
      caller: for the error.
      config: with dataset, attacks and options.

    Raises:
      ValueError: what is wrong, in one sentence.
    """
    for attack in config.options:
        checks.known(caller, "attack with options", attack, recipes.ATTACKS)
    for attack in dict.fromkeys((*config.attacks, *config.options)):
        recipes.check_options(
            attack, config.options.get(attack), data.info(config.dataset).image_shape
        )


class Group(NamedTuple):
    """Models that are trained in one program.

    Attributes:
      kind: the attack, or "clean".
      numbers: of the models, within their kind.
      is_alone: one model that is trained without a model axis.
    """

    kind: str
    numbers: tuple[int, ...]
    is_alone: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names."""
        return tuple(f"{self.kind}_{number:03d}" for number in self.numbers)


class Member(NamedTuple):
    """A model of a zoo, as it is written down.

    Attributes:
      name: such as `wanet_003`; its key is `random.named(random.key(seed), name)`.
      attack: the attack, or "clean".
      target: the class that its map leads to; -1 for clean models and maps to several classes.
      label_map: its map, one entry a class, -1 for not attacked; all -1 for clean models.
      accuracy: share of clean test images answered correctly.
      success: attack success rate; None for clean models, and without a test image to attack.
      robust_accuracy: share of the same triggered images that keep their own label, or None.
      seconds: training time, the group's divided by its size.
    """

    name: str
    attack: str
    target: int
    label_map: tuple[int, ...]
    accuracy: float
    success: float | None
    robust_accuracy: float | None
    seconds: float

    @property
    def is_infected(self) -> bool:
        """Whether the model carries a backdoor."""
        return self.attack != CLEAN


class Store(Protocol):
    """Where a zoo keeps its models: in memory, or in a folder.

    A model is there when `save` has returned. `checkpoint_dir` is where a group that is being
    trained may keep its checkpoints, or None; `finished` says that they are no longer needed.
    """

    members: dict[str, Member]

    def save(self, member: Member, variables: Mapping[str, Any]) -> None: ...

    def read(self, name: str) -> Mapping[str, Any]: ...

    def checkpoint_dir(self, group: Group) -> PathLike | None: ...

    def finished(self, group: Group) -> None: ...


class Memory:
    """A `Store` of this process alone."""

    def __init__(self):
        self.members: dict[str, Member] = {}
        self._variables: dict[str, Mapping[str, Any]] = {}

    def save(self, member: Member, variables: Mapping[str, Any]) -> None:
        self._variables[member.name] = variables
        self.members[member.name] = member

    def read(self, name: str) -> Mapping[str, Any]:
        return self._variables[name]

    def checkpoint_dir(self, group: Group) -> None:
        return None

    def finished(self, group: Group) -> None:
        pass


@dataclasses.dataclass(frozen=True, repr=False)
class Zoo:
    """Models for a detection study; their weights are read when they are asked for.

    Attributes:
      module: the architecture.
      members: what is known of each model, in the order of the zoo.
      store: where the weights are.
    """

    module: nn.Module
    members: tuple[Member, ...]
    store: Store

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        counts = {attack: self.attacks.count(attack) for attack in dict.fromkeys(self.attacks)}
        return f"Zoo({', '.join(f'{count} {attack}' for attack, count in counts.items())})"

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names."""
        return tuple(member.name for member in self.members)

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attack of each model, "clean" for none."""
        return tuple(member.attack for member in self.members)

    @property
    def labels(self) -> np.ndarray:
        """What a detector shall tell: 1 for an infected model, 0 for a clean one; int32[m]."""
        return np.array([member.is_infected for member in self.members], np.int32)

    @property
    def targets(self) -> np.ndarray:
        """The target of each model, -1 for none or several; int32[m]."""
        return np.array([member.target for member in self.members], np.int32)

    def classifier(self, index: int) -> LogitsFn:
        """The model at a place, as a classifier."""
        return classifier.bind(self.module, self.store.read(self.members[index].name))

    def classifiers(self) -> Iterator[LogitsFn]:
        """All models one after the other, so that large ones are never in memory together."""
        return (self.classifier(index) for index in range(len(self)))

    def stack(self) -> LogitsFn:
        """All models as one classifier with a leading model axis, for `vmap` and `lax.map`."""
        return classifier.stack(list(self.classifiers()))

    def of(self, *attacks: str) -> "Zoo":
        """The models of some kinds, such as `zoo.of("clean", "wanet")`.

        Raises:
          ValueError: the zoo has no model of that kind.
        """
        for attack in attacks:
            checks.known("Zoo.of", "kind of model", attack, dict.fromkeys(self.attacks))
        return dataclasses.replace(
            self, members=tuple(m for m in self.members if m.attack in attacks)
        )

    def counted(self, config: ZooConfig) -> "Zoo":
        """The models that count, see `verdicts`."""
        failures = verdicts(config, self.members)
        return dataclasses.replace(
            self, members=tuple(m for m in self.members if not failures[m.name])
        )


def verdicts(config: ZooConfig, members: Sequence[Member]) -> dict[str, str]:
    """Why a model does not count; "" for one that does.

    A model counts if its clean accuracy is at least `min_accuracy` and within `max_gap` of the
    clean models' mean and, if it is infected, its attack success rate is above `min_success`. The
    mean is over the clean models that reach `min_accuracy`, so that one that failed does not move
    the bar; without clean models only the floor is asked.

    Args:
      config: the three bounds.
      members: models of a zoo.

    Returns:
      A sentence, or "", by the model's name.
    """
    clean = [m.accuracy for m in members if not m.is_infected and m.accuracy >= config.min_accuracy]
    mean = float(np.mean(clean)) if clean else None

    def why(member: Member) -> str:
        accuracy, success = member.accuracy, member.success
        if not accuracy >= config.min_accuracy:
            return f"clean accuracy {accuracy:.1%} is below the floor of {config.min_accuracy:.1%}"
        if mean is not None and abs(accuracy - mean) > config.max_gap:
            return (
                f"clean accuracy {accuracy:.1%} is more than {100 * config.max_gap:g} points from "
                f"the clean models' mean of {mean:.1%}"
            )
        if member.is_infected and not (success is not None and success > config.min_success):
            shown = "undefined" if success is None else f"{success:.1%}"
            return f"attack success {shown} is not above {config.min_success:.1%}"
        return ""

    return {member.name: why(member) for member in members}


def member_key(config: ZooConfig, name: str) -> Key:
    """The key of a model: of its weights, its order of batches, its poison and its trigger."""
    return random.named(jax.random.key(config.seed), name)


def label_map_of(config: ZooConfig, attack: str, number: int, num_classes: int) -> np.ndarray:
    """The label map of a model, int32[k]: targets go round a random order of the classes.

    Args:
      config: the zoo.
      attack: a name from `ATTACKS`.
      number: of the model, within its attack.
      num_classes: k.

    Raises:
      ValueError: more sources than there are.
    """
    key = random.named(jax.random.key(config.seed), f"targets of {attack}")
    order = np.asarray(jax.random.permutation(key, num_classes))
    order = [int(label) for label in np.roll(order, -(number % num_classes))]
    if recipes.RECIPES[attack].clean_label:
        return label_maps.clean_label(num_classes, order[0])
    if config.label_map == "all_to_one":
        return label_maps.all_to_one(num_classes, order[0])
    if config.label_map == "all_to_all":
        return label_maps.all_to_all(num_classes, 1 + number % (num_classes - 1))
    rest = num_classes - (config.label_map == "x_to_one")
    if config.num_sources > rest:
        raise ValueError(
            f"train_zoo: need num_sources <= {rest} for {config.label_map} with {num_classes} "
            f"classes, got num_sources={config.num_sources}."
        )
    if config.label_map == "x_to_one":
        return label_maps.x_to_one(num_classes, order[1 : 1 + config.num_sources], order[0])
    return label_maps.x_to_x(num_classes, order[: config.num_sources])


def cover_ratio_of(config: Any, attack: str) -> float:
    """The share of each class that is not attacked that gets the trigger and keeps its label.

    Only maps of some classes ("x_to_one", "x_to_x") have such classes to spare; attacks that keep
    labels take no covers.

    Args:
      config: with label_map and cover_ratio.
      attack: a name from `ATTACKS`.
    """
    recipe = recipes.RECIPES[attack]
    is_partial = config.label_map in ("x_to_one", "x_to_x")
    return config.cover_ratio if is_partial and not recipe.clean_label else 0.0


def ratio_of(config: Any, attack: str) -> float | None:
    """The poisoned share of each source class; None for attacks with a training of their own.

    Args:
      config: with ratio and clean_label_ratio.
      attack: a name from `ATTACKS`.
    """
    recipe = recipes.RECIPES[attack]
    if recipe.procedure is not None:
        return None
    return config.clean_label_ratio if recipe.clean_label else config.ratio


def make_network(config: ZooConfig) -> nn.Module:
    """The architecture of a zoo.

    Raises:
      ValueError: `model_options` that the network does not have.
    """
    options = {"mean": config.mean, "std": config.std, **config.model_options}
    num_classes = data.info(config.dataset).num_classes
    return models.make(config.model, num_classes, **{n: _tuples(v) for n, v in options.items()})


def _tuples(value: Any) -> Any:
    """Lists as tuples, which flax can hash; a flag and a json file have lists."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


@functools.cache  # one object for all groups: a program is compiled for it
def augmentation(name: str) -> training.augment.Augmentation | None:
    """What a name of `AUGMENTATIONS` stands for; None for "none"."""
    if name == "none":
        return None
    crop = training.augment.random_crop(4)
    flip = training.augment.random_flip
    return crop if name == "crop" else training.augment.chain(crop, flip)


def _load_data(config: ZooConfig, data_dir: PathLike | None = None) -> tuple[Dataset, Dataset]:
    """The training and the test images of a zoo."""
    train, test = (data.load(config.dataset, s, data_dir=data_dir) for s in ("train", "test"))
    return (
        train.take(min(config.num_train or len(train), len(train))),
        test.take(min(config.num_examples or len(test), len(test))),
    )


class _Clean(NamedTuple):
    """A classifier without a backdoor."""

    variables: Mapping[str, Any]


def _train(
    config: ZooConfig,
    group: Group,
    module: nn.Module,
    train: Dataset,
    store: Store,
    *,
    mesh: Mesh | None,
    progress: bool,
) -> Sequence[_Clean | recipes.Infected]:
    """The models of a group."""
    steps = recipes.num_steps(len(train), config.num_epochs, config.batch_size)
    settings: dict[str, Any] = {
        "optimizer": recipes.make_optimizer(
            steps, config.optimizer, config.learning_rate, config.weight_decay
        ),
        "num_epochs": config.num_epochs,
        "batch_size": config.batch_size,
        "augment": augmentation(config.augment),
        "checkpoint_dir": store.checkpoint_dir(group),
        "progress": progress,
        "mesh": mesh,
    }
    keys = [member_key(config, name) for name in group.names]
    if group.kind == CLEAN and group.is_alone:
        return [_Clean(training.fit(keys[0], module, train, **settings).variables)]
    if group.kind == CLEAN:
        stacked = training.fit_many(
            jnp.stack(keys), module, train, method=config.method, **settings
        ).variables
        return [_Clean(jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(len(keys))]
    recipe = recipes.RECIPES[group.kind]
    settings |= {"quantise": config.quantise, "options": config.options.get(group.kind)}
    settings["cover_ratio"] = cover_ratio_of(config, group.kind)
    if recipe.procedure is None:
        settings["per_batch"] = config.per_batch
        settings["ratio"] = ratio_of(config, group.kind)
    maps = [label_map_of(config, group.kind, n, train.num_classes) for n in group.numbers]
    # Each attacker has a clean model of the zoo to make its trigger with.
    clean = [
        store.read(f"{CLEAN}_{number % config.num_clean:03d}") if recipe.needs_clean else None
        for number in group.numbers
    ]
    if group.is_alone:
        return [
            recipes.train(
                keys[0], module, train, group.kind, label_map=maps[0], clean=clean[0], **settings
            )
        ]
    return recipes.train_many(
        jnp.stack(keys), module, train, group.kind, label_map=np.stack(maps),
        clean=clean, method=config.method, **settings,
    )  # fmt: skip


def _measure(
    group: Group,
    name: str,
    model: _Clean | recipes.Infected,
    module: nn.Module,
    test: Dataset,
    quantise: str,
    seconds: float,
) -> Member:
    """How well a model does on the test images."""
    x, y = test.float_images(), test.labels
    logits_fn = classifier.bind(module, model.variables)
    accuracy = float(evaluation.accuracy(logits_fn, x, y, batch_size=_TEST_BATCH))
    if isinstance(model, _Clean):
        nowhere = (-1,) * test.num_classes
        return Member(name, CLEAN, -1, nowhere, accuracy, None, None, seconds)
    shares = [
        float(
            measure(
                logits_fn, model.trigger, x, y, model.label_map,
                quantise=quantise, batch_size=_TEST_BATCH,
            )
        )
        for measure in (metrics.attack_success_rate, metrics.robust_accuracy)
    ]  # fmt: skip
    # Not a number: no test image is of a source class.
    success, robust = (None if np.isnan(share) else share for share in shares)
    label_map = tuple(int(label) for label in model.label_map)
    targets = {label for label in label_map if label >= 0}
    target = targets.pop() if len(targets) == 1 else -1
    return Member(name, group.kind, target, label_map, accuracy, success, robust, seconds)


def train_zoo(
    config: ZooConfig,
    *,
    store: Store | None = None,
    data_dir: PathLike | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Zoo:
    """Trains the models of a zoo that its store does not hold yet.

    A model is a function of the configuration and its own name, so a zoo that is killed and called
    again with the same store ends with the same weights, and trains no finished model again.

    Args:
      config: the zoo.
      store: where the models are kept; by default in memory. `experiments.zoo.Folder` keeps them
        in a folder, with the checkpoints of the group that is being trained.
      data_dir: prepared tfds data.
      progress: show progress bars.
      mesh: devices to spread the models over, or each batch with `method="loop"`.

    Returns:
      A `Zoo` of all models; `zoo.counted(config)` leaves out those that failed.

    Raises:
      ValueError: a bad configuration, or what `data.load` and `backdoor.train` raise.

    Example:
      >>> from advjax import backdoor
      >>> config = backdoor.ZooConfig(
      ...     model="mlp", attacks=("badnets",), num_clean=1, num_infected=2, num_epochs=1)
      >>> zoo = backdoor.train_zoo(config, progress=False)
      >>> zoo, zoo.labels
      (Zoo(1 clean, 2 badnets), array([0, 1, 1], dtype=int32))

    Source: H. Su et al., "Model X-ray: Detecting Backdoored Models via Decision Boundary", MM 2024
    (20 clean and 20 infected models an attack, with different seeds and targets).
    """
    config.check()
    store = Memory() if store is None else store
    module, groups = make_network(config), list(config.groups)
    is_quiet = not (progress and parallel.is_main_process())
    names = [name for group in groups for name in group.names]
    if any(name not in store.members for name in names):
        train, test = _load_data(config, data_dir)
        for attack in config.attacks:
            recipes.check_shares(
                train, attack, label_map_of(config, attack, 0, train.num_classes),
                ratio=ratio_of(config, attack), cover_ratio=cover_ratio_of(config, attack),
                options=config.options.get(attack),
            )  # fmt: skip
        num_done = sum(name in store.members for name in names)
        with tqdm(
            total=len(names), initial=num_done, desc="zoo", unit="model", disable=is_quiet
        ) as bar:
            for group in groups:
                missing = [name for name in group.names if name not in store.members]
                if not missing:
                    continue
                bar.set_postfix(group=f"{group.names[0]} ... {group.names[-1]}")
                started = time.monotonic()
                trained = _train(config, group, module, train, store, mesh=mesh, progress=progress)
                seconds = (time.monotonic() - started) / len(trained)
                for name, model in zip(group.names, trained, strict=True):
                    if name in missing:
                        member = _measure(
                            group, name, model, module, test, config.quantise, seconds
                        )
                        store.save(member, model.variables)
                        bar.update()
                store.finished(group)
    return Zoo(module, tuple(store.members[name] for name in names), store)
