"""The ten attacks as recipes: how each makes its trigger, and how its classifier is trained.

Eight poison data or batches, so their classifiers are trained by `training.fit`; two (LIRA, Blind)
train classifier and trigger, or weigh two losses, by a procedure of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from advjax import training
from advjax.backdoor import inputs, networks, poisoning, procedures, triggers
from advjax.core import checks, classifier, losses, random
from advjax.core.descriptions import described
from advjax.core.io import PathLike
from advjax.core.typing import Array, Key, LogitsFn
from advjax.data import Dataset
from advjax.training.augment import Augmentation

Trigger = Callable[[Array], Array]
_NUM_EXAMPLES = 5000  # images that a trigger is trained on, at most
_NEGATIVES = "negatives_per_poisoned"
_FEW = 8  # images that show whether a trigger gives numbers


class Infected(NamedTuple):
    """A classifier with a backdoor.

    Attributes:
      variables: the network's variables, for `advjax.bind`.
      trigger: `x -> x`, what opens the backdoor.
      label_map: where it leads, int32[k], -1 for classes that are not attacked.
    """

    variables: Any
    trigger: Trigger
    label_map: np.ndarray


class Setting(NamedTuple):
    """What an attacker may use to make a trigger.

    Attributes:
      module: the architecture that will be infected.
      dataset: the clean training images.
      label_map: int32[k].
      clean: variables of a clean model of the architecture, or None.
    """

    module: nn.Module
    dataset: Dataset
    label_map: np.ndarray
    clean: Any


class Recipe(NamedTuple):
    """How one attack is done, with its published defaults.

    Attributes:
      options: names and defaults of what `options=` may change; all but `negatives_per_poisoned`
        are the trigger's.
      make: `(key, setting, **trigger's options) -> trigger`; None if `procedure` makes it.
      ratio: poisoned share of each source class.
      clean_label: whether the poisoned images keep their labels.
      needs_clean: whether the trigger is made with a clean model.
      negatives: `(trigger, setting, **options) -> ((key, x) -> x)`: images like triggered ones
        that keep their own label, made with images of the setting, or with the other images of `x`
        if that is None; no negatives if this is None.
      per_batch: whether other images are poisoned in each step (`poisoning.poison_batch`), and not
        the same ones in every epoch.
      procedure: `(key, module, dataset, label_map, **settings, **options) -> Trained`, for attacks
        that train the classifier in their own way.
      colours: the options that are one number, or one a channel.
      choices: the texts that an option may be.
    """

    options: Mapping[str, Any]
    make: Any = None
    ratio: float = 0.1
    clean_label: bool = False
    needs_clean: bool = False
    negatives: Callable[..., Callable[[Key, Array], Array]] | None = None
    per_batch: bool = False
    procedure: Callable[..., Any] | None = None
    colours: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = {}


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A function with its static options; equal for equal ones, so that it does not recompile."""

    function: Callable[..., Array]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *inputs: Array, **arrays: Array) -> Array:
        return self.function(*inputs, **dict(self.options), **arrays)


def _configured(function: Callable[..., Array], **options: Any) -> Partial:
    """A trigger with its options: numbers and arrays are leaves, sizes and choices static."""
    leaves = (float, np.ndarray, jax.Array)
    arrays = {name: jnp.asarray(v) for name, v in options.items() if isinstance(v, leaves)}
    static = tuple((name, value) for name, value in options.items() if name not in arrays)
    return Partial(_Fixed(function, static), **arrays)


def _plain(function: Trigger) -> Callable[..., Trigger]:
    """The maker of a trigger that is a formula."""
    return lambda key, setting, **options: _configured(function, **options)


def _wanet(key: Key, setting: Setting, *, num_control: int, strength: float) -> Trigger:
    field = triggers.wanet_field(key, num_control)
    return _configured(triggers.wanet, field=field, strength=strength)


def _examples(dataset: Dataset) -> tuple[Array, Array]:
    """Images and labels that a trigger is trained on."""
    few = dataset.take(min(_NUM_EXAMPLES, len(dataset)))
    return few.float_images(), few.labels


# Compiled here, with the clean network as an argument: one program for all models of a zoo.
_jit_low_frequency = jax.jit(
    triggers.low_frequency, static_argnames=("num_images", "num_passes", "num_steps")
)
_jit_trojannn = jax.jit(triggers.trojannn, static_argnames=("num_neurons", "num_steps"))
_jit_ssba = jax.jit(
    triggers.ssba, static_argnames=("num_bits", "num_steps", "batch_size", "features")
)


def _low_frequency(key: Key, setting: Setting, **options: Any) -> Trigger:
    targets = np.unique(setting.label_map[setting.label_map >= 0])
    trigger = _jit_low_frequency(
        key, classifier.bind(setting.module, setting.clean), *_examples(setting.dataset),
        target=int(targets[0]) if len(targets) == 1 else None, **options,
    )  # fmt: skip
    if not np.any(trigger.keywords["pattern"]):  # what it cannot see itself when it is compiled
        raise ValueError(
            "backdoor.train: low_frequency found no image that DeepFool could push, so its pattern "
            f"is zero; try more num_images or num_steps than {options['num_images']} and "
            f"{options['num_steps']}, or another clean model."
        )
    return trigger


def _trojannn(key: Key, setting: Setting, **options: Any) -> Trigger:
    x, _ = _examples(setting.dataset)
    features_fn, last_weights = networks.last_layer(setting.module, setting.clean, x[:1])
    return _jit_trojannn(key, features_fn, last_weights, x[:1], **options)


def _ssba(key: Key, setting: Setting, **options: Any) -> Trigger:
    """One encoder for all models on these images, as published; the key draws the secret."""
    x, _ = _examples(setting.dataset)
    found = _steganography(_Images(training.fitting.fingerprint(x), x), tuple(options.items()))
    *encode, secret = found.trigger.args
    bits = jax.random.bernoulli(key, shape=secret.shape).astype(secret.dtype)
    return Partial(found.trigger.func, *encode, bits)


@dataclasses.dataclass(frozen=True)
class _Images:
    """Images that are equal if their fingerprints are."""

    fingerprint: int
    x: Array = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=2)  # it takes minutes
def _steganography(images: _Images, options: tuple[tuple[str, Any], ...]) -> triggers.SSBA:
    return _jit_ssba(random.named(jax.random.key(0), "ssba"), images.x, **dict(options))


RECIPES: dict[str, Recipe] = {
    "badnets": Recipe(
        {"size": 3, "value": 1.0, "margin": 0}, _plain(triggers.badnets), colours=("value",)
    ),
    "blended": Recipe({"alpha": 0.2}, _plain(triggers.blended)),
    # BackdoorBench poisons 10 % of the whole set: on CIFAR-10 that is the complete class, which is
    # left without a clean image. Half of the class keeps its clean accuracy.
    "sig": Recipe(
        {"amplitude": 40 / 255, "frequency": 6.0}, _plain(triggers.sig), ratio=0.5, clean_label=True
    ),
    "low_frequency": Recipe(
        {"num_images": 100, "amplitude": 0.2, "smoothness": 6 / 32, "target_rate": 0.2,
         "num_passes": 50, "num_steps": 200, "overshoot": 0.02},
        _low_frequency, needs_clean=True,
    ),
    "bpp": Recipe(
        {"num_levels": 8, "dithering": False, _NEGATIVES: 1.0}, _plain(triggers.bpp),
        negatives=lambda trigger, setting, **options: _configured(
            triggers.bpp_negatives,
            others=None if setting is None else _examples(setting.dataset)[0], **options,
        ),
        per_batch=True,
    ),
    "wanet": Recipe(
        {"strength": 0.5, "num_control": 4, _NEGATIVES: 2.0}, _wanet,
        negatives=lambda trigger, setting, **options: _configured(
            triggers.wanet_noise, **trigger.keywords
        ),
        per_batch=True,
    ),
    "ssba": Recipe(
        {"num_bits": 8, "epsilon": 0.1, "num_steps": 1000, "batch_size": 32,
         "learning_rate": 1e-3, "distance_weight": 20.0, "likeness_weight": 0.2,
         "features": (8, 16, 32, 64)},
        _ssba,
    ),
    "trojannn": Recipe(
        {"num_neurons": 2, "value": 100.0, "epsilon": 0.3, "step_size": 0.1, "num_steps": 1000},
        _trojannn, needs_clean=True,
    ),
    "lira": Recipe(
        {"num_joint_epochs": None, "epsilon": 0.01, "clean_weight": 0.5,
         "generator_learning_rate": 1e-4, "features": (16, 32, 64)},
        procedure=procedures.train_lira,
    ),
    "blind": Recipe(
        {"balance": "fixed", "backdoor_weight": 0.9, "num_warm_up": None, "threshold": 1.0},
        procedure=procedures.train_blind, choices={"balance": procedures.BALANCES},
    ),
}  # fmt: skip
ATTACKS = tuple(RECIPES)
_FORMULAS = ("badnets", "blended", "sig", "bpp", "wanet")  # made without images or a network


def _check(
    attack: str, label_map: np.ndarray, num_classes: int, ratio: float | None, clean: Any,
    per_batch: bool | None,
) -> Recipe:  # fmt: skip
    checks.known("backdoor.train", "attack", attack, ATTACKS)
    inputs.label_map("backdoor.train", label_map, num_classes)
    recipe = RECIPES[attack]
    if recipe.needs_clean and clean is None:
        raise ValueError(
            f"backdoor.train: {attack} makes its trigger with a clean model of the same "
            "architecture; need clean=its variables, got none."
        )
    if recipe.procedure is not None and ratio is not None:
        raise ValueError(
            f"backdoor.train: {attack} attacks every image that it is shown, so it takes no ratio, "
            f"got ratio={ratio}."
        )
    if recipe.procedure is not None and per_batch is not None:
        raise ValueError(
            f"backdoor.train: {attack} shows every image with its trigger in each step, so it "
            f"takes no per_batch, got per_batch={per_batch}."
        )
    if recipe.clean_label and (label_map >= 0).sum() > (label_map == np.arange(num_classes)).sum():
        raise ValueError(
            f"backdoor.train: {attack} keeps the labels of the images that it poisons; need "
            f"label_map=clean_label(num_classes, target), got {label_map.tolist()}."
        )
    return recipe


def _options(attack: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    checks.known("backdoor.train", "attack", attack, ATTACKS)
    recipe = RECIPES[attack]
    values = dict(recipe.options)
    for name, value in (options or {}).items():
        checks.known("backdoor.train", f"option of {attack}", name, recipe.options)
        if name in recipe.choices:
            checks.known("backdoor.train", f"{name} of {attack}", value, recipe.choices[name])
        if name in recipe.colours and np.ndim(value):
            values[name] = jnp.asarray([_number(attack, name, each) for each in value], "f4")
        else:
            values[name] = _like(attack, name, value, recipe.options[name])
    return values


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The options of a trigger, and how many negatives there are for each poisoned image."""
    of_trigger = dict(options)
    return of_trigger, of_trigger.pop(_NEGATIVES, 0.0)


def _like(attack: str, name: str, value: Any, default: Any) -> Any:
    """The value in the type of the default, so that 1 and 1.0 are the same option."""
    if isinstance(default, bool):
        if not isinstance(value, (bool, np.bool_)):
            raise _not(attack, name, value, "True or False")
        return bool(value)
    if isinstance(default, float):
        if name == _NEGATIVES and isinstance(value, (int, float)):
            checks.non_negative("backdoor.train", f"{name} of {attack}", value)
        return _number(attack, name, value)
    if isinstance(default, int):
        return _count(attack, name, value, min(default, 1))
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or not value:
            raise _not(attack, name, value, "a list of whole numbers")
        return tuple(_count(attack, name, each, 1) for each in value)
    if default is None and value is not None:
        return _count(attack, name, value, 0)
    return value


def _number(attack: str, name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) or (hasattr(value, "dtype") and value.ndim == 0)
    if not is_number or isinstance(value, bool) or not np.isfinite(value):
        raise _not(attack, name, value, "a number")
    return float(value)


def _count(attack: str, name: str, value: Any, least: int) -> int:
    number = _number(attack, name, value)
    if number != int(number):
        raise _not(attack, name, value, "a whole number")
    checks.at_least("backdoor.train", f"{name} of {attack}", int(number), least)
    return int(number)


def _not(attack: str, name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(
        f"backdoor.train: need {wanted} for the option {name} of {attack}, got {value!r}."
    )


def check_options(
    attack: str, options: Mapping[str, Any] | None, image_shape: tuple[int, int, int]
) -> None:
    """Refuses what an attack cannot take, as far as that can be told before any training.

    Args:
      attack: a name from `ATTACKS`.
      options: as for `train`.
      image_shape: height, width and channels.

    Raises:
      ValueError: an unknown option, no number where one is needed, a trigger that does not fit.
    """
    options = _options(attack, options)
    if attack in _FORMULAS:
        of_trigger, _ = split_options(options)
        trigger = RECIPES[attack].make(jax.random.key(0), None, **of_trigger)
        trigger(np.zeros((1, *image_shape), np.float32))
    if attack == "ssba":  # traced, not run: its own checks, and layers that fit the images
        images = jax.ShapeDtypeStruct((2, *image_shape), np.float32)
        jax.eval_shape(functools.partial(triggers.ssba, **options), jax.random.key(0), images)


@functools.lru_cache(maxsize=8)  # one object for equal settings: a program is compiled for it
def make_optimizer(
    num_steps: int,
    name: str = "sgd",
    learning_rate: float = 0.01,
    weight_decay: float = 5e-4,
) -> optax.GradientTransformation:
    """The published optimiser: SGD at 0.01 with momentum 0.9, weight decay 5e-4 and a cosine to 0.

    The decay is added to the gradient, as PyTorch does. BackdoorBench's cosine always ends at epoch
    100, also where training stops at 50; here it ends with the training.

    Args:
      num_steps: steps of the whole run.
      name: "sgd", or "adam" for small networks that have few epochs.
      learning_rate: the first one.
      weight_decay: `gradient + weight_decay * params`.

    Raises:
      ValueError: an unknown optimiser.
    """
    checks.known("make_optimizer", "optimizer", name, ("sgd", "adam"))
    rate = optax.cosine_decay_schedule(learning_rate, num_steps)
    step = optax.adam(rate) if name == "adam" else optax.sgd(rate, momentum=0.9)
    return optax.chain(optax.add_decayed_weights(weight_decay), step)


def num_steps(num_examples: int, num_epochs: int, batch_size: int) -> int:
    """The steps that `training.fit` does: the last incomplete batch of an epoch is left out."""
    return num_epochs * max(1, num_examples // batch_size)


class _Poisoning(NamedTuple):
    """How a classifier is taught its trigger, as what `training.fit` takes."""

    trigger: Partial
    dataset: Dataset
    loss_fn: Callable[..., Array]
    loss_options: dict[str, Array]
    augment: Augmentation | None


@dataclasses.dataclass(frozen=True)
class _PerBatch:
    """Cross-entropy on batches that are poisoned anew in each step; equal for equal attacks.

    `functions` is the structure of trigger and negatives, whose arrays are options of the loss;
    `told` is the same in words, for checkpoints.
    """

    functions: jax.tree_util.PyTreeDef
    told: str
    quantise: str
    augment: Augmentation | None

    reads_classes = True  # for `training.fit`, which then checks that the network has them

    def __call__(
        self, key: Key, logits_fn: LogitsFn, x: Array, y: Array, *,
        label_map, ratio, negative_ratio, cover_ratio, **leaves,
    ) -> Array:  # fmt: skip
        key_poison, key_augment = jax.random.split(key)
        trigger, negatives = jax.tree.unflatten(
            self.functions, [leaves[_leaf(i)] for i in range(len(leaves))]
        )
        x, y = poisoning.poison_batch(
            key_poison, x, y, trigger, label_map, ratio, quantise=self.quantise,
            negatives=negatives, negative_ratio=negative_ratio, cover_ratio=cover_ratio,
        )  # fmt: skip
        x = x if self.augment is None else self.augment(key_augment, x)
        return losses.cross_entropy(logits_fn(x), y)


def _leaf(number: int) -> str:
    return f"leaf_{number}"


def _stacked(*arrays: Array) -> Array:
    return jnp.stack(arrays)


def _as_float32(value: Any) -> Any:
    """A share of any type as one: 1 and 1.0 are the same run."""
    return np.float32(value) if isinstance(value, (int, float)) else value


def _shares(
    recipe: Recipe, dataset: Dataset, label_map: Array, ratio: float | None, per_poisoned: float
) -> tuple[float, float]:
    """The share of poisoned images in each source class, and of negatives in the whole set."""
    ratio = recipe.ratio if ratio is None else ratio
    share = ratio * float(np.mean(np.asarray(label_map)[dataset.labels] >= 0))
    return ratio, share * per_poisoned


def check_shares(
    dataset: Dataset,
    attack: str,
    label_map: Array,
    *,
    ratio: float | None = None,
    cover_ratio: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Refuses shares of poisoned images that a data set does not have, before any training.

    Args:
      dataset: the clean training images.
      attack: a name from `ATTACKS`.
      label_map: as for `train`.
      ratio: as for `train`.
      cover_ratio: as for `train`.
      options: as for `train`.

    Raises:
      ValueError: what `poison` raises.
    """
    recipe = RECIPES[attack]
    if recipe.procedure is None:
        _, per_poisoned = split_options(_options(attack, options))
        ratio, share = _shares(recipe, dataset, label_map, ratio, per_poisoned)
        poisoning.check(dataset, label_map, ratio, negative_ratio=share, cover_ratio=cover_ratio)


def _poison(
    key: Key, attack: str, setting: Setting, ratio, quantise, options, cover_ratio, augment,
    per_batch,
) -> _Poisoning:  # fmt: skip
    """The trigger, and the data set or the loss that teaches it."""
    recipe = RECIPES[attack]
    per_batch = recipe.per_batch if per_batch is None else per_batch
    options, per_poisoned = split_options(options)
    trigger = recipe.make(random.named(key, "trigger"), setting, **options)
    ratio, share = _shares(recipe, setting.dataset, setting.label_map, ratio, per_poisoned)
    negatives = None
    if recipe.negatives is not None and share:
        negatives = recipe.negatives(trigger, None if per_batch else setting, **options)
    if per_batch:
        poisoning.check(
            setting.dataset, setting.label_map, ratio,
            quantise=quantise, negative_ratio=share, cover_ratio=cover_ratio,
        )  # fmt: skip
        few = setting.dataset.take(_FEW).float_images()
        if not np.all(np.isfinite(trigger(few))):
            raise ValueError(
                "backdoor.train: need a trigger whose images are finite, got one with NaN."
            )
        leaves, functions = jax.tree.flatten((trigger, negatives))
        told = described(jax.tree.map(lambda _: None, (trigger, negatives)))
        arrays = {
            "label_map": setting.label_map, "ratio": ratio, "negative_ratio": share,
            "cover_ratio": cover_ratio, **{_leaf(i): leaf for i, leaf in enumerate(leaves)},
        }  # fmt: skip
        return _Poisoning(
            trigger, setting.dataset, _PerBatch(functions, told, quantise, augment),
            {name: jnp.asarray(_as_float32(value)) for name, value in arrays.items()}, None,
        )  # fmt: skip
    poisoned = poisoning.poison(
        random.named(key, "poison"), setting.dataset, trigger, setting.label_map, ratio,
        quantise=quantise, negatives=negatives, negative_ratio=share, cover_ratio=cover_ratio,
    )  # fmt: skip
    return _Poisoning(trigger, poisoned.dataset, training.cross_entropy, {}, augment)


def train(
    key: Key,
    module: nn.Module,
    dataset: Dataset,
    attack: str,
    *,
    label_map: Array,
    ratio: float | None = None,
    cover_ratio: float = 0.0,
    clean: Mapping[str, Any] | None = None,
    quantise: str = "round",
    options: Mapping[str, Any] | None = None,
    per_batch: bool | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_epochs: int = 10,
    batch_size: int = 128,
    augment: Augmentation | None = None,
    checkpoint_dir: PathLike | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Infected:
    """Trains a classifier with a backdoor: makes the trigger, poisons the data, fits the network.

    A function of its arguments alone: the same key gives the same bits.

    Args:
      key: a key.
      module: the network, as for `training.fit`.
      dataset: clean training images.
      attack: a name from `ATTACKS`.
      label_map: int32[k], see `label_maps`; an attack that keeps labels (sig) needs a
        `clean_label` map.
      ratio: poisoned share of each source class; the recipe's if None.
      cover_ratio: share of each class that is not attacked that carries the trigger with its own
        label, see `poison`; for lira and blind the weight of such images, see `train_lira`.
      clean: variables of a clean model of the same architecture, for the attacks that need one
        (low_frequency, trojannn).
      quantise: what poisoned images are rounded to: "none", "floor" or "round" (to 1 / 255); lira
        and blind make theirs while they train, and do not round.
      options: of the attack, in place of the published defaults in `RECIPES`.
      per_batch: whether other images are poisoned in each step (`poison_batch`), as published for
        bpp and wanet, or the same ones in every epoch (`poison`); the recipe's if None. Not for
        lira and blind. The accuracy that is shown meanwhile is that of the clean labels.
      optimizer: an optax optimiser; `make_optimizer`, the published one, if None.
      num_epochs: passes over the data.
      batch_size: images a step.
      augment: `(key, x) -> x`, applied after the trigger, as published; by lira and blind before
        it.
      checkpoint_dir: folder for checkpoints of the fit; attacks with a training of their own
        (lira, blind) do not use it.
      progress: show a progress bar.
      mesh: devices to split each batch over.

    Returns:
      `Infected(variables, trigger, label_map)`.

    Static: everything but key.

    Raises:
      ValueError: an unknown attack or option, no clean model where one is needed, a map or a ratio
        that does not suit the attack, or what `poison` and `training.fit` raise.

    Example:
      >>> import jax
      >>> from advjax import backdoor, data, models
      >>> net, digits = models.make("mlp", num_classes=10), data.load("digits", "train")
      >>> infected = backdoor.train(
      ...     jax.random.key(0), net, digits, "badnets",
      ...     label_map=backdoor.all_to_one(10, target=3), num_epochs=1, progress=False)
      >>> infected.trigger(digits.float_images()[:2]).shape
      (2, 8, 8, 1)
    """
    key = random.as_typed(key)
    label_map = np.asarray(label_map)
    recipe = _check(attack, label_map, dataset.num_classes, ratio, clean, per_batch)
    options = _options(attack, options)
    if optimizer is None:
        optimizer = make_optimizer(num_steps(len(dataset), num_epochs, batch_size))
    settings: dict[str, Any] = {
        "optimizer": optimizer, "num_epochs": num_epochs, "batch_size": batch_size,
        "progress": progress, "mesh": mesh,
    }  # fmt: skip
    if recipe.procedure is not None:
        trained = recipe.procedure(
            key, module, dataset, label_map,
            cover_ratio=cover_ratio, augment=augment, **settings, **options,
        )  # fmt: skip
        return Infected(trained.variables, trained.trigger, label_map)
    setting = Setting(module, dataset, label_map, clean)
    poisoned = _poison(
        key, attack, setting, ratio, quantise, options, cover_ratio, augment, per_batch
    )
    fitted = training.fit(
        random.named(key, "train"), module, poisoned.dataset,
        loss_fn=poisoned.loss_fn, loss_options=poisoned.loss_options, augment=poisoned.augment,
        checkpoint_dir=checkpoint_dir, **settings,
    )  # fmt: skip
    return Infected(fitted.variables, poisoned.trigger, label_map)


def train_many(
    keys: Key,
    module: nn.Module,
    dataset: Dataset,
    attack: str,
    *,
    label_map: Array,
    ratio: float | None = None,
    cover_ratio: float = 0.0,
    clean: Sequence[Mapping[str, Any] | None] | None = None,
    quantise: str = "round",
    options: Mapping[str, Any] | None = None,
    per_batch: bool | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_epochs: int = 10,
    batch_size: int = 128,
    augment: Augmentation | None = None,
    method: str = "map",
    checkpoint_dir: PathLike | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> list[Infected]:
    """Trains many classifiers with the same kind of backdoor in one program.

    Args:
      keys: one key a model, [m].
      module: as for `train`.
      dataset: clean training images of all.
      attack: a name from `ATTACKS` whose classifier is trained on poisoned data (not lira, blind).
      label_map: one map a model, int32[m, k].
      ratio: as for `train`.
      cover_ratio: as for `train`.
      clean: variables of a clean model for each, for the attacks that need one.
      quantise: as for `train`.
      options: as for `train`.
      per_batch: as for `train`.
      optimizer: as for `train`.
      num_epochs: as for `train`.
      batch_size: as for `train`.
      augment: as for `train`.
      method: "map" or "vmap", see `training.fit_many`.
      checkpoint_dir: folder for checkpoints of all models together.
      progress: show a progress bar.
      mesh: devices to spread the models over.

    Returns:
      One `Infected` a model: what `train` gives for its key, up to rounding.

    Static: everything but keys.

    Raises:
      ValueError: what `train` and `training.fit_many` raise, or an attack with a training of its
        own.
    """
    keys = random.as_typed(keys)
    options = _options(attack, options)
    maps = np.asarray(label_map)
    for name, given in (("label_map", np.atleast_2d(maps)), ("clean", clean)):
        if given is not None and len(given) != len(keys):
            raise ValueError(
                f"backdoor.train_many: need one {name} a model, got {len(given)} for {len(keys)}."
            )
    # One optimiser for equal settings: the program is compiled for it once.
    if optimizer is None:
        optimizer = make_optimizer(num_steps(len(dataset), num_epochs, batch_size))
    cleans = [None] * len(keys) if clean is None else clean
    poisoned = []
    for key, each, network in zip(keys, maps, cleans, strict=True):
        recipe = _check(attack, each, dataset.num_classes, ratio, network, per_batch)
        if recipe.procedure is not None:
            raise ValueError(
                f"backdoor.train_many: {attack} has a training of its own; use backdoor.train for "
                "one model after the other."
            )
        setting = Setting(module, dataset, each, network)
        poisoned.append(
            _poison(key, attack, setting, ratio, quantise, options, cover_ratio, augment, per_batch)
        )
    datasets = [each.dataset for each in poisoned]
    is_shared = all(each is dataset for each in datasets)
    fitted = training.fit_many(
        jax.vmap(lambda key: random.named(key, "train"))(keys), module,
        dataset if is_shared else datasets, loss_fn=poisoned[0].loss_fn,
        hyperparameters={"loss": jax.tree.map(_stacked, *(p.loss_options for p in poisoned))},
        optimizer=optimizer, num_epochs=num_epochs, batch_size=batch_size,
        augment=poisoned[0].augment, method=method, checkpoint_dir=checkpoint_dir,
        progress=progress, mesh=mesh,
    )  # fmt: skip
    return [
        Infected(jax.tree.map(lambda leaf, i=i: leaf[i], fitted.variables), one.trigger, each)
        for i, (one, each) in enumerate(zip(poisoned, maps, strict=True))
    ]
