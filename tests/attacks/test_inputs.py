"""What users get wrong: one sentence that names the attack, the rule and what was given."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, balls, models
from tests import helpers

X = helpers.images(0, 3)
Y = np.int32([0, 1, 3])
NETWORK = helpers.mlp_network(0)
NAN, INF = float("nan"), float("inf")


def changed(array, value):
    array = np.array(array)
    array.flat[1] = value
    return array


BAD = {
    "uint8 images": ({"x": np.uint8(X * 255)}, "float images in \\[0, 1\\], got dtype uint8"),
    "integer images": ({"x": np.int32(X)}, "got dtype int32; divide uint8 images by 255"),
    "images up to 255": ({"x": X * 255}, "images in \\[0, 1\\], got values in \\[0.0, 255.0\\]"),
    "images below 0": ({"x": changed(X, -0.5)}, "got values in \\[-0.5, "),
    "normalised images": ({"x": (X - 0.5) / 0.25}, "need images in \\[0, 1\\]"),
    "NaN images": ({"x": changed(X, NAN)}, "need images in \\[0, 1\\], got values in \\[nan"),
    "infinite images": ({"x": changed(X, INF)}, "need images in \\[0, 1\\]"),
    "no batch axis": ({"x": X[0, 0, 0]}, "shape \\[b, h, w, c\\], got \\(1,\\)"),
    "label too large": ({"y": np.int32([0, 1, 4])}, "labels in 0 ... 3, got 0 ... 4"),
    "label negative": ({"y": np.int32([-1, 1, 2])}, "labels in 0 ... 3, got -1 ... 2"),
    "float labels": ({"y": np.float32(Y)}, "need integer labels, got dtype float32"),
    "one-hot labels": ({"y": np.eye(4, dtype=np.int32)[Y]}, "one label an image, got .*\\(3, 4\\)"),
    "too few labels": ({"y": Y[:2]}, "got labels of shape \\(2,\\) for images of shape \\(3, 4"),
    "negative epsilon": ({"epsilon": -0.1}, "need a finite epsilon >= 0, got epsilon=-0.1"),
    "NaN epsilon": ({"epsilon": NAN}, "need a finite epsilon >= 0, got epsilon=nan"),
    "infinite epsilon": ({"epsilon": INF}, "need a finite epsilon >= 0, got epsilon=inf"),
    "one negative": ({"epsilon": np.float32([0, -1, 1])}, "got epsilon=\\[0.0, -1.0, 1.0\\]"),
    "epsilons of a curve": (
        {"epsilon": np.linspace(0, 1, 5)},
        "\\(3\\), got shape \\(5,\\); for a",
    ),
    "epsilon [b, 1]": ({"epsilon": np.ones((3, 1))}, "got shape \\(3, 1\\)"),
}
NAMES = helpers.fixed_budget_attacks()
ATTACKS = [getattr(attacks, name) for name in NAMES]


def call(attack, x=X, y=Y, epsilon=0.1, logits_fn=NETWORK, key=None, **options):
    return attack(jax.random.key(0) if key is None else key, logits_fn, x, y, epsilon, **options)


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
@pytest.mark.parametrize("case", BAD)
def test_inputs(attack, case):
    arguments, sentence = BAD[case]
    with pytest.raises(ValueError, match=f"^{attack.__name__}: .*{sentence}"):
        call(attack, **arguments)


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_what_has_no_value_yet_is_not_looked_at(attack):
    # Under jit a shape is still checked, a value cannot be.
    run = lambda x, y, epsilon: call(attack, x, y, epsilon)
    assert jax.eval_shape(run, X * 255, Y + 9, -1.0).shape == X.shape
    with pytest.raises(ValueError, match="need integer labels"):
        jax.eval_shape(run, X, np.float32(Y), 0.1)
    with pytest.raises(ValueError, match="got shape"):
        jax.eval_shape(run, X, Y, np.ones(5))


BAD_OPTIONS = {
    "bim without steps": (attacks.bim, {"num_steps": 0}, "bim: need num_steps >= 1, got .*=0"),
    "bim with half a step": (attacks.bim, {"num_steps": 1.5}, "num_steps >= 1, got num_steps=1.5"),
    "bim with True steps": (attacks.bim, {"num_steps": True}, "num_steps >= 1, got num_steps=True"),
    "bim step": (attacks.bim, {"step_size": -0.1}, "bim: need a finite step_size >= 0"),
    "bim relative": (attacks.bim, {"relative_step_size": NAN}, "bim: .* relative_step_size >= 0"),
    "least_likely": (attacks.least_likely, {"num_steps": 0}, "least_likely: need num_steps >= 1"),
    "least_likely step": (attacks.least_likely, {"step_size": INF}, "finite step_size >= 0"),
    "alpha": (attacks.rand_fgsm, {"alpha": -0.1}, "rand_fgsm: need a finite alpha >= 0"),
    "pgd without steps": (attacks.pgd, {"num_steps": 0}, "pgd: need num_steps >= 1, got .*=0"),
    "pgd restarts": (attacks.pgd, {"num_restarts": 0}, "pgd: need num_restarts >= 1, got .*=0"),
    "pgd step": (attacks.pgd, {"step_size": NAN}, "pgd: need a finite step_size >= 0, got .*nan"),
    "pgd steps": (
        attacks.pgd,
        {"step_size": np.ones(5, np.float32)},
        r"pgd: need one step_size or one an image \(3\), got shape \(5,\)",
    ),
    "bim steps": (attacks.bim, {"relative_step_size": np.ones(2)}, "bim: need one relative_step"),
    "alphas": (attacks.rand_fgsm, {"alpha": np.ones(2)}, "rand_fgsm: need one alpha or one an"),
    "nes sigmas": (attacks.nes, {"sigma": np.ones(3)}, "nes: need one sigma for all images, got"),
    "nes steps": (attacks.nes, {"step_size": np.ones(2)}, "nes: need one step_size or one an"),
    "pgd relative": (attacks.pgd, {"relative_step_size": -1}, "finite relative_step_size >= 0"),
    "restarts from one point": (
        attacks.pgd,
        {"num_restarts": 2, "random_start": False},
        "pgd: restarts need random_start=True, got num_restarts=2",
    ),
    "keys": (attacks.pgd, {"key": jax.random.split(jax.random.key(0), 2)}, "one key an example"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options(case):
    attack, options, sentence = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=sentence):
        call(attack, **options)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"num_steps": 0}, "^auto_attack: need num_steps >= 1, got num_steps=0"),
        ({"num_queries": 1}, "^auto_attack: need num_queries >= 2, got num_queries=1"),
        ({"num_queries": 1, "version": "plus", "ball": balls.l2}, "^auto_attack: need num_queries"),
        # No Square, no queries: the next sentence is another one.
        ({"num_queries": 1, "ball": balls.l1, "num_samples": 0}, "^auto_attack: need num_samples"),
    ],
)
def test_auto_attack_checks_its_counts_before_any_work(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(attacks.auto_attack, **options)


def test_l1_standard_has_the_published_restarts_and_targets():
    def counts(version, ball):
        parts = attacks.auto_attack_parts(version, ball, 10, 10, 10)
        return (
            parts["apgd_ce"].keywords["num_restarts"],
            parts["apgd_t"].num_targets,
            parts["fab_t"].num_targets,
            "square" in parts,
        )

    assert counts("standard", balls.l1) == (5, 5, 9, False)
    assert counts("standard", balls.linf) == counts("standard", balls.l2) == (1, 9, 9, True)
    assert counts("plus", balls.l1) == (5, 9, 9, False)


def test_a_classifier_that_does_not_return_logits():
    for logits_fn in (lambda x: x, lambda x: jnp.ones(4), lambda x: jnp.ones((7, 4))):
        with pytest.raises(ValueError, match=r"logits_fn: need logits of shape \[3, k\]"):
            call(attacks.fgsm, logits_fn=logits_fn)


def test_what_is_allowed():
    run = functools.partial(jax.eval_shape, lambda *args: call(attacks.fgsm, *args))
    assert run(np.float64(X), np.int64(Y), 0).dtype == jnp.float32
    assert run(X, np.uint8(Y), 8 / 255).dtype == jnp.float32
    assert run(X, Y, np.float32([0, 0.1, 0.2])).shape == X.shape
    assert run(X[:1], Y[:1], np.float32([0.1])).shape == X[:1].shape
    raw = lambda x: call(attacks.pgd, x, key=jax.random.PRNGKey(0))
    assert jax.eval_shape(raw, X).shape == X.shape


WITHOUT_DRAWS = ("fgsm", "fgm", "bim", "least_likely")  # they look at no key


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_DRAWS])
@pytest.mark.parametrize("key", [0, "0", X], ids=["number", "text", "images"])
def test_no_key(name, key):
    with pytest.raises(ValueError, match=r"^key: need a key such as jax.random.key\(0\), got"):
        getattr(attacks, name)(key, NETWORK, X, Y, 0.1)


def with_ball(names):
    found = filter(inspect.isfunction, (getattr(attacks, name) for name in names))
    return [attack for attack in found if "ball" in inspect.signature(attack).parameters]


@pytest.mark.parametrize("attack", with_ball(attacks.__all__), ids=lambda attack: attack.__name__)
def test_a_ball_is_no_text(attack):
    radius = {"epsilon": 0.1} if "epsilon" in inspect.signature(attack).parameters else {}
    with pytest.raises(ValueError, match=f"^{attack.__name__}: need ball=balls.*, got ball='l2'"):
        attack(jax.random.key(0), NETWORK, X, Y, **radius, ball="l2")


def test_a_network_without_weights():
    with pytest.raises(ValueError, match=r"need a classifier, advjax.bind\(.*the module MLP alone"):
        call(attacks.fgsm, logits_fn=models.make("mlp", 4))


def test_unknown_ball_lists_the_known():
    assert balls.get("l1") is balls.l1
    with pytest.raises(ValueError, match=r"unknown ball 'l3'; known: linf, l2, l1\."):
        balls.get("l3")


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_no_images(attack):
    run = lambda x, y: call(attack, x, y)
    assert jax.eval_shape(run, X[:0], Y[:0]).shape == (0, *X.shape[1:])


def test_a_rounding_beyond_the_box_comes_back_inside():
    # Decoders and resizers overshoot by a rounding, and the checks let them.
    x = changed(X, np.float32(1 + 5e-7))
    x_adv = np.asarray(jax.jit(lambda x: call(attacks.fgsm, x=x, epsilon=0.0))(x))
    assert x_adv.max() == 1
