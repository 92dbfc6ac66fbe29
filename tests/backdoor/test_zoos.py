"""The zoo without its folder: groups, targets, verdicts, what a detection study sees."""

import dataclasses

import jax
import numpy as np
import pytest

import advjax
from advjax import backdoor, data

CONFIG = backdoor.ZooConfig(
    model="mlp", attacks=("badnets", "sig"), num_clean=2, num_infected=3, group_size=2,
    num_train=600, num_epochs=1, batch_size=32,
)  # fmt: skip


def member(name, accuracy, success=None):
    attack = name.partition("_")[0]
    robust = None if success is None else 0.0
    return backdoor.Member(name, attack, -1, (-1,) * 10, accuracy, success, robust, 0.0)


@pytest.fixture(scope="module")
def zoo():
    return backdoor.train_zoo(CONFIG, progress=False)


@pytest.mark.study
def test_what_a_detection_study_sees(zoo):
    assert len(zoo) == 8 and repr(zoo) == "Zoo(2 clean, 3 badnets, 3 sig)"
    np.testing.assert_array_equal(zoo.labels, [0, 0, 1, 1, 1, 1, 1, 1])
    infected = zoo.of("sig")
    assert infected.attacks == ("sig",) * 3
    for index, m in enumerate(infected.members):
        assert zoo.store.read(m.name) is infected.store.read(infected.names[index])
        assert m.label_map == tuple(backdoor.clean_label(10, m.target).tolist())
    for m in zoo.of("badnets").members:
        assert m.label_map == tuple(backdoor.all_to_one(10, m.target).tolist())
        assert 0 <= m.success <= 1 and m.robust_accuracy + m.success <= 1
    with pytest.raises(ValueError, match=r"Zoo.of: unknown kind of model 'wanet'; known: clean, b"):
        zoo.of("wanet")
    x = data.load("digits", "test").float_images()[:3]
    stacked = jax.vmap(lambda f: f(x))(zoo.stack())
    for index, logits_fn in enumerate(zoo.classifiers()):
        # One matrix product in another order.
        np.testing.assert_allclose(stacked[index], logits_fn(x), rtol=1e-4, atol=1e-5)
    weights = [jax.tree.leaves(zoo.store.read(name))[-1] for name in zoo.names]
    assert len({np.asarray(w).tobytes() for w in weights}) == len(zoo)  # a seed each


def test_a_model_does_not_depend_on_the_others(zoo):
    """The same name, the same bits: with another attack, in a store that holds the rest."""
    store = backdoor.Memory()
    for m in zoo.members[:2]:
        store.save(m, zoo.store.read(m.name))
    config = dataclasses.replace(CONFIG, attacks=("badnets",))
    again = backdoor.train_zoo(config, store=store, progress=False)
    assert again.names == zoo.names[:5]
    for name in again.names:
        for a, b in zip(
            jax.tree.leaves(again.store.read(name)), jax.tree.leaves(zoo.store.read(name)),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(a, b)


def test_groups():
    names = [group.names for group in CONFIG.groups]
    assert names[:3] == [
        ("clean_000", "clean_001"), ("badnets_000", "badnets_001"), ("badnets_002",),
    ]  # fmt: skip
    alone = list(dataclasses.replace(CONFIG, method="loop").groups)
    assert all(group.is_alone and len(group.names) == 1 for group in alone) and len(alone) == 8
    lira = list(dataclasses.replace(CONFIG, attacks=("lira",)).groups)
    assert [group.is_alone for group in lira] == [False, True, True, True]


def test_targets_go_round_all_classes():
    for attack in ("badnets", "sig"):
        maps = [backdoor.zoos.label_map_of(CONFIG, attack, n, 10) for n in range(20)]
        targets = [m[m >= 0][0] for m in maps]
        assert sorted(targets) == sorted([*range(10)] * 2)
    other = dataclasses.replace(CONFIG, seed=1)
    assert any(
        (backdoor.zoos.label_map_of(other, "badnets", n, 10) != maps_).any()
        for n, maps_ in enumerate(
            backdoor.zoos.label_map_of(CONFIG, "badnets", n, 10) for n in range(10)
        )
    )


@pytest.mark.parametrize(
    "kind, num_sources, attacked", [("x_to_one", 5, 5), ("x_to_x", 3, 3), ("all_to_all", 1, 10)]
)
def test_other_label_maps(kind, num_sources, attacked):
    config = dataclasses.replace(CONFIG, label_map=kind, num_sources=num_sources)
    for number in range(3):
        label_map = backdoor.zoos.label_map_of(config, "badnets", number, 10)
        sources = np.flatnonzero(label_map >= 0)
        assert len(sources) == attacked and (label_map[sources] != sources).all()
        num_targets = len(set(label_map[sources].tolist()))
        assert num_targets == (1 if kind == "x_to_one" else attacked)


@pytest.mark.parametrize(
    "kind, attack, cover_ratio",
    [
        ("x_to_one", "badnets", 0.2), ("x_to_x", "wanet", 0.2), ("all_to_one", "badnets", 0.0),
        ("all_to_all", "badnets", 0.0), ("x_to_x", "sig", 0.0), ("x_to_x", "lira", 0.2),
    ],
)  # fmt: skip
def test_covers_where_some_classes_are_not_attacked(kind, attack, cover_ratio):
    config = dataclasses.replace(CONFIG, label_map=kind, cover_ratio=0.2)
    assert backdoor.zoos.cover_ratio_of(config, attack) == cover_ratio


def test_options_and_covers_reach_the_attack(monkeypatch):
    given = {}

    def train_many(*arguments, **settings):
        given.update(settings)
        raise InterruptedError

    monkeypatch.setattr(backdoor.recipes, "train_many", train_many)
    config = dataclasses.replace(
        CONFIG, attacks=("badnets",), num_clean=0, label_map="x_to_x", num_sources=2,
        options={"badnets": {"size": 2}, "sig": {"frequency": 3}}, per_batch=True,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        backdoor.train_zoo(config, progress=False)
    assert given["options"] == {"size": 2} and given["cover_ratio"] == 0.1
    assert given["per_batch"] is True


def test_the_options_of_the_network():
    config = dataclasses.replace(CONFIG, model_options={"hidden": [8, 4]})  # a list, as in json
    net = backdoor.make_network(config)
    assert net.hidden == (8, 4) and net.mean == config.mean
    config.check()
    hash(net)


@pytest.mark.parametrize(
    "options, words",
    [({"depth": 3}, "no option 'depth'"), ({"hidden": ("wide",)}, "got model_options=.*wide")],
)
def test_bad_options_of_the_network(options, words):
    with pytest.raises(ValueError, match=f"^train_zoo: .*mlp .*{words}"):
        dataclasses.replace(CONFIG, model_options=options).check()


def test_verdicts():
    members = [
        member("clean_000", 0.98),
        member("clean_001", 0.96),
        member("clean_002", 0.20),  # failed, and does not move the mean of 0.97
        member("badnets_000", 0.95, 0.99),
        member("badnets_001", 0.935, 0.99),
        member("badnets_002", 0.97, 0.9),
        member("badnets_003", 0.89, 1.0),
        member("badnets_004", 0.97, None),
        member("badnets_005", float("nan"), 1.0),
    ]
    found = backdoor.verdicts(CONFIG, members)
    assert [name for name, why in found.items() if not why] == [
        "clean_000", "clean_001", "badnets_000",
    ]  # fmt: skip
    assert "below the floor of 90.0%" in found["clean_002"]
    assert "more than 3 points from the clean models' mean of 97.0%" in found["badnets_001"]
    assert "attack success 90.0% is not above 90.0%" in found["badnets_002"]
    assert "below the floor" in found["badnets_003"]
    assert "attack success undefined" in found["badnets_004"]
    assert "below the floor" in found["badnets_005"]
    zoo = backdoor.Zoo(None, tuple(members), backdoor.Memory())
    assert zoo.counted(CONFIG).names == ("clean_000", "clean_001", "badnets_000")


@pytest.mark.study
@pytest.mark.parametrize("method", ["map", "vmap", "loop"])
def test_several_devices(zoo, method):
    """Eight devices give the weights of one, up to the order of sums."""
    config = dataclasses.replace(
        CONFIG, method=method, attacks=("badnets",), num_clean=1, num_infected=1
    )
    spread = backdoor.train_zoo(config, mesh=advjax.parallel.make_mesh(), progress=False)
    for name in spread.names:
        for a, b in zip(
            jax.tree.leaves(spread.store.read(name)), jax.tree.leaves(zoo.store.read(name)),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(a, b, atol=1e-4)  # 18 steps of SGD at 0.01


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"attacks": ("fgsm",)}, "train_zoo: unknown attack 'fgsm'; known: badnets"),
        ({"dataset": "imagenet"}, "train_zoo: unknown data set 'imagenet'"),
        ({"model": "resnet"}, "train_zoo: unknown model 'resnet'"),
        ({"method": "pmap"}, "train_zoo: unknown method 'pmap'; known: map, vmap, loop"),
        ({"label_map": "some"}, "train_zoo: unknown label map 'some'"),
        ({"quantise": "ceil"}, "train_zoo: unknown quantisation 'ceil'"),
        ({"optimizer": "lion"}, "train_zoo: unknown optimizer 'lion'"),
        ({"num_infected": 0}, "train_zoo: need num_infected >= 1, got num_infected=0"),
        ({"ratio": 1.5}, "train_zoo: need 0 <= ratio <= 1, got ratio=1.5"),
        ({"min_accuracy": -1.0}, "train_zoo: need 0 <= min_accuracy <= 1"),
        ({"learning_rate": float("nan")}, "train_zoo: need a finite learning_rate >= 0"),
        ({"std": (0.0,)}, "train_zoo: need a positive std"),
        ({"mean": (0.5, 0.5)}, "train_zoo: need one mean, or one for each of 1 channel"),
        (
            {"attacks": ("trojannn",), "num_clean": 0},
            "train_zoo: trojannn needs a clean model of the same architecture, got num_clean=0",
        ),
        (
            {"label_map": "x_to_one", "num_sources": 10},
            "train_zoo: need num_sources <= 9 for x_to_one with 10 classes, got num_sources=10",
        ),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        backdoor.train_zoo(dataclasses.replace(CONFIG, **change))
    assert "\n" not in str(caught.value)
