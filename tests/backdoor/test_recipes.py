"""Recipes: the table, bitwise reproducible training, one model against many, errors."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import advjax
from advjax import backdoor, data, models, training
from advjax.backdoor import recipes, triggers
from advjax.core import parallel

ATTACKS = (
    "badnets", "blended", "sig", "low_frequency", "bpp",
    "wanet", "ssba", "trojannn", "lira", "blind",
)  # fmt: skip
FORMULAS = ("badnets", "blended", "sig", "bpp", "wanet")
MODULE = models.make("mlp", 10, hidden=(32,))
TRAIN = data.load("digits", "train").take(600)
MAP = backdoor.all_to_one(10, 3)
# One object, so that all trainings here share one program.
SETTINGS = {
    "optimizer": optax.adam(3e-3), "num_epochs": 2, "batch_size": 32, "progress": False,
}  # fmt: skip


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def a_map(attack):
    return backdoor.clean_label(10, 3) if recipes.RECIPES[attack].clean_label else MAP


def test_the_ten():
    assert backdoor.ATTACKS == ATTACKS
    assert [name for name in ATTACKS if recipes.RECIPES[name].needs_clean] == [
        "low_frequency", "trojannn",
    ]  # fmt: skip
    assert [name for name in ATTACKS if recipes.RECIPES[name].clean_label] == ["sig"]
    assert [name for name in ATTACKS if recipes.RECIPES[name].negatives] == ["bpp", "wanet"]
    assert [name for name in ATTACKS if recipes.RECIPES[name].per_batch] == ["bpp", "wanet"]
    for recipe in recipes.RECIPES.values():
        assert (recipe.make is None) != (recipe.procedure is None)


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_published_defaults_are_those_of_the_trigger(attack):
    recipe = recipes.RECIPES[attack]
    made_by = recipe.procedure or getattr(triggers, attack)
    defaults = dict(inspect.signature(made_by).parameters)
    if attack == "wanet":
        defaults |= inspect.signature(triggers.wanet_field).parameters
    for name, value in recipes.split_options(recipe.options)[0].items():
        assert defaults[name].default == value


@pytest.mark.parametrize("attack", FORMULAS)
def test_training_is_bitwise_reproducible(attack):
    def train(seed):
        return backdoor.train(
            jax.random.key(seed), MODULE, TRAIN, attack, label_map=a_map(attack), **SETTINGS
        )

    infected, again, other = train(0), train(0), train(1)
    assert bits(infected.variables) == bits(again.variables)
    assert bits(infected.variables) != bits(other.variables)
    np.testing.assert_array_equal(infected.label_map, a_map(attack))
    x = TRAIN.float_images()[:4]
    triggered = np.asarray(infected.trigger(x))
    np.testing.assert_array_equal(triggered, again.trigger(x))
    assert triggered.shape == x.shape and triggered.dtype == x.dtype
    assert np.abs(triggered - x).max() > 1e-3


# As little work as each trained trigger can be made with.
SMALL = {
    "low_frequency": {"num_images": 8, "num_passes": 1, "num_steps": 30},
    "trojannn": {"num_steps": 3},
    "ssba": {"num_steps": 2, "batch_size": 4, "features": (4,)},
    "lira": {"num_joint_epochs": 1, "features": (4,)},
    "blind": {"num_warm_up": 1},
}


@pytest.mark.study
@pytest.mark.parametrize("attack", SMALL)
def test_trained_triggers_too(attack):
    """Each gets what it needs; how good they are is tested beside them."""
    clean = MODULE.init(jax.random.key(9), TRAIN.float_images()[:1])

    def train():
        return backdoor.train(
            jax.random.key(0), MODULE, TRAIN, attack, label_map=MAP, clean=clean,
            options=SMALL[attack], **SETTINGS,
        )  # fmt: skip

    infected, again = train(), train()
    assert bits(infected.variables) == bits(again.variables)
    x = TRAIN.float_images()[:4]
    triggered = np.asarray(infected.trigger(x))
    np.testing.assert_array_equal(triggered, again.trigger(x))
    assert triggered.shape == x.shape and np.any(triggered != x)
    success = backdoor.attack_success_rate(
        advjax.bind(MODULE, infected.variables), infected.trigger, x, TRAIN.labels[:4], MAP
    )
    assert 0 <= success <= 1


@pytest.mark.parametrize("attack", ["badnets", "wanet"])
def test_equal_options_are_one_program(attack):
    traces = []

    @jax.jit
    def apply(trigger, x):
        traces.append(0)
        return trigger(x)

    x = TRAIN.float_images()[:2]
    setting = recipes.Setting(MODULE, TRAIN, MAP, None)
    recipe = recipes.RECIPES[attack]
    for seed in range(2):
        options, _ = recipes.split_options(recipe.options)
        trigger = recipe.make(jax.random.key(seed), setting, **options)
        np.testing.assert_allclose(apply(trigger, x), trigger(x), atol=1e-6)  # jit may reorder
    assert len(traces) == 1


@pytest.mark.parametrize(
    "attack, method, maps, cover_ratio",
    [
        ("badnets", "map", (MAP, backdoor.all_to_one(10, 7)), 0.0),
        (
            "badnets", "vmap",
            (backdoor.x_to_one(10, [1], 3), backdoor.x_to_one(10, [2], 7)), 0.5,
        ),
        ("wanet", "vmap", (MAP, backdoor.all_to_one(10, 7)), 0.0),
        ("bpp", "map", (MAP, backdoor.x_to_one(10, [2], 7)), 0.3),
    ],
)  # fmt: skip
def test_many_equal_one_by_one(attack, method, maps, cover_ratio):
    """WaNet's and BPP's models share the images and have each a map in the loss."""
    keys = jax.random.split(jax.random.key(5), 2)
    settings = {**SETTINGS, "cover_ratio": cover_ratio}
    many = backdoor.train_many(
        keys, MODULE, TRAIN, attack, label_map=np.stack(maps), method=method, **settings
    )
    for key, each, label_map in zip(keys, many, maps, strict=True):
        one = backdoor.train(key, MODULE, TRAIN, attack, label_map=label_map, **settings)
        np.testing.assert_array_equal(each.label_map, label_map)
        for a, b in zip(
            jax.tree.leaves(each.variables), jax.tree.leaves(one.variables), strict=True
        ):
            # Adam divides by small numbers: a rounding of 1e-7 grows over 36 steps.
            np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("attack, per_batch", [("badnets", True), ("wanet", False)])
def test_either_way_of_poisoning_learns(attack, per_batch):
    """Not as published: patches in each step, and WaNet on the same images in every epoch."""
    train = functools.partial(
        backdoor.train, jax.random.key(0), MODULE, TRAIN, attack, label_map=MAP,
        options={"strength": 3.0} if attack == "wanet" else None, ratio=0.25, **SETTINGS,
    )  # fmt: skip
    infected = train(per_batch=per_batch)
    assert bits(infected.variables) != bits(train(per_batch=not per_batch).variables)
    x, y = TRAIN.float_images(), TRAIN.labels
    success = backdoor.attack_success_rate(
        advjax.bind(MODULE, infected.variables), infected.trigger, x, y, MAP
    )
    untaught = backdoor.attack_success_rate(
        advjax.bind(MODULE, train(ratio=0.0).variables), infected.trigger, x, y, MAP
    )
    assert success > untaught + 0.2


def test_augmentation_comes_after_the_trigger():
    """One that paints the image: nothing of the trigger is left to learn."""

    def painted(key, x):
        return jnp.full_like(x, 0.5)

    for per_batch in (False, True):
        first, second = (
            backdoor.train(
                jax.random.key(0), MODULE, TRAIN, "badnets", label_map=MAP, augment=painted,
                per_batch=per_batch, options={"size": size}, **SETTINGS,
            )
            for size in (2, 4)
        )  # fmt: skip
        assert bits(first.variables) == bits(second.variables)


def test_shares_of_any_type_are_the_same_run(tmp_path):
    options = {**SETTINGS, "label_map": MAP, "checkpoint_dir": tmp_path, "num_epochs": 1}
    first, again = (
        backdoor.train(
            jax.random.key(0), MODULE, TRAIN.take(64), "badnets",
            per_batch=True, ratio=ratio, cover_ratio=cover_ratio, **options,
        )
        for ratio, cover_ratio in ((1, 0), (1.0, np.float32(0)))
    )  # fmt: skip
    assert bits(first.variables) == bits(again.variables)


@pytest.mark.parametrize("attack", ["wanet", "bpp"])
def test_shares_that_are_not_there_are_refused_before_any_training(attack):
    check = functools.partial(recipes.check_shares, TRAIN, attack, MAP)
    check()
    with pytest.raises(ValueError, match="need a negative_ratio of at most the"):
        check(options={"negatives_per_poisoned": 20})
    with pytest.raises(ValueError, match="need a negative_ratio of at most the"):
        check(ratio=0.7)
    recipes.check_shares(TRAIN, "lira", MAP)


def test_a_trigger_that_gives_no_numbers_is_refused(monkeypatch):
    recipe = recipes.RECIPES["wanet"]._replace(
        make=lambda key, setting, **options: Partial(lambda x: x * jnp.nan)
    )
    monkeypatch.setitem(recipes.RECIPES, "wanet", recipe)
    with pytest.raises(ValueError, match="need a trigger whose images are finite, got one with"):
        backdoor.train(jax.random.key(0), MODULE, TRAIN, "wanet", label_map=MAP, **SETTINGS)


def test_programs_of_batches_are_equal_for_equal_attacks():
    """So a zoo's models are one program."""
    setting = recipes.Setting(MODULE, TRAIN, MAP, None)
    losses = [
        recipes._poison(
            jax.random.key(seed), attack, setting, 0.1, "round",
            recipes._options(attack, None), 0.0, None, None,
        ).loss_fn
        for attack in ("wanet", "bpp") for seed in (0, 1)
    ]  # fmt: skip
    assert losses[0] == losses[1] and hash(losses[0]) == hash(losses[1])
    assert losses[2] == losses[3] != losses[0]


@pytest.mark.parametrize(
    "attack, change",
    [
        ("bpp", {"options": {"num_levels": 4}}),
        ("wanet", {"options": {"strength": 0.6}}),
        ("wanet", {"options": {"negatives_per_poisoned": 0.0}}),
        ("wanet", {"quantise": "none"}),
        ("wanet", {"ratio": 0.2}),
        ("wanet", {"per_batch": False}),
        ("wanet", {"cover_ratio": 0.1}),
        ("wanet", {"augment": training.augment.random_flip}),
        ("bpp", {"options": {"dithering": True}}),
    ],
)
def test_a_checkpoint_of_another_attack_is_refused(attack, change, tmp_path):
    label_map = backdoor.x_to_one(10, [1], 3)
    options = {**SETTINGS, "label_map": label_map, "checkpoint_dir": tmp_path, "num_epochs": 1}
    few = TRAIN.take(64)
    first = backdoor.train(jax.random.key(0), MODULE, few, attack, **options)
    again = backdoor.train(jax.random.key(0), MODULE, few, attack, **options)
    assert bits(first.variables) == bits(again.variables)
    with pytest.raises(ValueError, match="belong to another run"):
        backdoor.train(jax.random.key(0), MODULE, few, attack, **{**options, **change})


def test_the_backdoor_is_learnt():
    test = data.load("digits", "test")
    infected = backdoor.train(
        jax.random.key(0), MODULE, data.load("digits", "train"), "badnets", label_map=MAP,
        **{**SETTINGS, "num_epochs": 15},
    )  # fmt: skip
    logits_fn = advjax.bind(MODULE, infected.variables)
    x, y = test.float_images(), test.labels
    assert advjax.evaluation.accuracy(logits_fn, x, y) > 0.9
    success = backdoor.attack_success_rate(logits_fn, infected.trigger, x, y, MAP)
    assert success > 0.9


def test_options_change_the_trigger():
    infected = backdoor.train(
        jax.random.key(0), MODULE, TRAIN, "badnets", label_map=MAP, options={"size": 2}, **SETTINGS
    )
    x = np.zeros((1, 8, 8, 1), np.float32)
    assert np.sum(np.asarray(infected.trigger(x))) == 4


def test_an_option_has_the_type_of_its_default():
    """1 and 1.0 are the same strength, and a list is a tuple, which can be hashed."""
    for strength in (1, 1.0, np.float32(1)):
        options, negatives = recipes.split_options(
            recipes._options("wanet", {"strength": strength, "negatives_per_poisoned": 1})
        )
        assert isinstance(negatives, float) and negatives == 1
        recipe, setting = recipes.RECIPES["wanet"], recipes.Setting(MODULE, TRAIN, MAP, None)
        trigger = recipe.make(jax.random.key(0), setting, **options)
        negatives = recipe.negatives(trigger, None, **options)
        assert trigger.keywords["strength"] == negatives.keywords["strength"] == 1
    assert recipes._options("ssba", {"features": [8, 16]})["features"] == (8, 16)
    colour = recipes._options("badnets", {"value": np.array([1, 1, 0])})["value"]
    np.testing.assert_array_equal(colour, np.float32([1, 1, 0]))


@pytest.mark.parametrize(
    "attack, options, sentence",
    [
        ("ssba", {"batch_size": 31}, "ssba: need an even batch_size, got batch_size=31"),
        ("low_frequency", {"num_passes": 0}, "need num_passes of low_frequency >= 1, got"),
        ("badnets", {"margin": -1}, "need margin of badnets >= 0, got"),
        ("wanet", {"negatives_per_poisoned": -1}, "a finite negatives_per_poisoned of wanet >= 0"),
        ("badnets", {"negatives_per_poisoned": 1}, "unknown option of badnets 'negatives_per_po"),
    ],
)
def test_options_are_refused_before_any_training(attack, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipes.check_options(attack, options, (8, 8, 1))


@pytest.mark.parametrize(
    "attack, change, sentence",
    [
        ("badnet", {}, "backdoor.train: unknown attack 'badnet'; known: badnets, "),
        ("badnets", {"options": {"size": 2.5}}, "a whole number for the option size .* got 2.5"),
        ("badnets", {"options": {"alpha": 1}}, "unknown option of badnets 'alpha'; known: size"),
        ("bpp", {"options": {"dithering": 1}}, "need True or False for .* dithering .* got 1"),
        ("lira", {"options": {"features": 16}}, "list of whole numbers for .* features .* got 16"),
        ("lira", {"options": {"num_joint_epochs": "half"}}, "need a number for .* got 'half'"),
        ("blind", {"options": {"balance": "x"}}, "unknown balance of blind 'x'; known: fixed"),
        ("low_frequency", {}, "backdoor.train: low_frequency makes its trigger with a clean model"),
        ("trojannn", {}, "backdoor.train: trojannn makes its trigger with a clean model"),
        ("blind", {"per_batch": True}, "backdoor.train: blind shows every .* got per_batch=True"),
        ("wanet", {"ratio": 1.5}, "poison: need 0 <= ratio <= 1, .* got ratio=1.5"),
        ("wanet", {"ratio": 0.6}, "negative_ratio of at most the .* images without a trigger"),
        ("bpp", {"quantise": "up"}, "poison: unknown quantisation 'up'"),
        ("bpp", {"batch_size": 1}, "bpp_negatives: need two images, .* got a single image"),
        ("wanet", {"module": models.make("mlp", 5)}, "need labels in 0 ... 4, the classes of the"),
        ("lira", {"ratio": 0.1}, "backdoor.train: lira attacks every image .* got ratio=0.1"),
        ("sig", {}, "backdoor.train: sig keeps the labels of the images that it poisons"),
    ],
)
def test_bad_input_is_one_sentence(attack, change, sentence):
    options = {**SETTINGS, "module": MODULE, "label_map": MAP, **change}
    with pytest.raises(ValueError, match=sentence) as caught:
        backdoor.train(jax.random.key(0), dataset=TRAIN, attack=attack, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.study
def test_a_pattern_that_is_zero_is_an_error():
    """Images that are all of the target: nothing can be pushed there."""
    rows = np.flatnonzero(TRAIN.labels == 3)
    few = dataclasses.replace(TRAIN, images=TRAIN.images[rows], labels=TRAIN.labels[rows])
    clean = MODULE.init(jax.random.key(9), TRAIN.float_images()[:1])
    with pytest.raises(ValueError, match="low_frequency found no image that DeepFool could push"):
        backdoor.train(
            jax.random.key(0), MODULE, few, "low_frequency", label_map=MAP, clean=clean,
            options=SMALL["low_frequency"], **SETTINGS,
        )  # fmt: skip


@pytest.mark.parametrize(
    "attack, label_map, sentence",
    [
        ("badnet", [MAP, MAP], "backdoor.train: unknown attack 'badnet'"),
        ("badnets", [MAP, MAP, MAP], "need one label_map a model, got 3 for 2"),
        ("badnets", MAP, "need one label_map a model, got 1 for 2"),
    ],
)
def test_models_and_maps_that_do_not_fit(attack, label_map, sentence):
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=sentence):
        backdoor.train_many(keys, MODULE, TRAIN, attack, label_map=label_map, **SETTINGS)


def test_procedures_are_not_trained_together():
    with pytest.raises(ValueError, match=r"backdoor.train_many: lira has a training of its own"):
        backdoor.train_many(
            jax.random.split(jax.random.key(0), 2), MODULE, TRAIN, "lira",
            label_map=np.stack([MAP, MAP]), **SETTINGS,
        )  # fmt: skip


def test_batches_over_devices():
    """Groups of triggered images are gathered from all devices; sums are in another order."""
    mesh = parallel.make_mesh()
    options = {**SETTINGS, "label_map": MAP, "num_epochs": 1}
    one, many = (
        backdoor.train(jax.random.key(0), MODULE, TRAIN.take(128), "wanet", mesh=each, **options)
        for each in (None, mesh)
    )
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(many.variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
