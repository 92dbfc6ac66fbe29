"""Reference networks: the numbers that Foolbox 3.3.4 found on 256 MNIST images.

Some 400,000 gradients of a small CNN, which is what takes the time; each attack is compiled once
for both networks and all epsilons.
"""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import attacks, balls, metrics, models, parallel
from advjax.core import random
from tests import helpers

NETWORKS = ("mnist_standard", "mnist_adversarial")
ATTACKS = {
    "fgsm": attacks.fgsm,
    "bim": functools.partial(attacks.bim, num_steps=40, relative_step_size=1 / 30),
    "pgd-l2": functools.partial(
        attacks.pgd, num_steps=50, relative_step_size=0.025, random_start=False, ball=balls.l2
    ),
    "pgd-restarts": functools.partial(attacks.pgd, num_steps=40, num_restarts=2),
}


@pytest.fixture(scope="module")
def examples(reference_dir):
    with np.load(reference_dir / "mnist_test256.npz") as file:
        return np.float32(file["x"][..., None]) / 255, file["y"].astype(np.int32)


@pytest.fixture(scope="module")
def counts(reference_dir):
    return json.loads((reference_dir / "evasion.json").read_text())


@pytest.fixture(scope="module")
def networks(reference_dir):
    module = models.make("cnn", 10)
    return {
        name: advjax.bind(module, models.from_reference_npz(reference_dir / f"{name}.npz"))
        for name in NETWORKS
    }


@functools.cache
def compiled(name):
    def run(key, logits_fn, x, y, epsilon):
        x_adv = ATTACKS[name](key, logits_fn, x, y, epsilon)
        return x_adv, jnp.sum(metrics.is_correct(logits_fn(x_adv), y))

    run.__name__ = name  # chex counts traces by the name
    return jax.jit(chex.assert_max_traces(run, n=1))


def num_correct(name, logits_fn, x, y, epsilons):
    norm = "l2" if name.endswith("l2") else "linf"
    correct = []
    for epsilon in np.float32(epsilons):
        x_adv, number = compiled(name)(jax.random.key(0), logits_fn, x, y, epsilon)
        helpers.assert_in_ball_and_box(x_adv, x, norm, epsilon)
        correct.append(int(number))
    return np.array(correct)


@pytest.mark.parametrize("network", NETWORKS)
def test_clean_count(network, networks, examples, counts):
    x, y = examples
    correct = metrics.is_correct(networks[network](jnp.asarray(x)), jnp.asarray(y))
    assert int(correct.sum()) == counts[network]["clean_correct_256"]


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "name, stored, epsilons",
    [
        ("fgsm", "fgsm_correct", "linf_epsilons"),
        ("bim", "bim40_alpha_eps_over_30_correct", "linf_epsilons"),
        ("pgd-l2", "l2_pgd50_rel_step_0.025_correct", "l2_epsilons"),
    ],
    ids=["fgsm", "bim", "pgd-l2"],
)
def test_as_many_correct_as_foolbox_leaves(
    network, name, stored, epsilons, networks, examples, counts
):
    expected = np.array(counts[network][stored])
    correct = num_correct(name, networks[network], *examples, counts[network][epsilons])
    assert np.all(np.diff(correct) <= 0)
    # One image may lie so near the boundary that another order of summation decides.
    assert np.abs(correct - expected).max() <= 1, (correct, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    ["mnist_standard", pytest.param("mnist_adversarial", marks=pytest.mark.study)],
)
def test_pgd_with_restarts_leaves_no_more_than_foolbox_bim(network, networks, examples, counts):
    stored = counts[network]
    correct = num_correct("pgd-restarts", networks[network], *examples, stored["linf_epsilons"])
    assert np.all(np.diff([stored["clean_correct_256"], *correct]) <= 0)
    assert np.all(correct <= np.array(stored["bim40_alpha_eps_over_30_correct"])), correct


@pytest.mark.parametrize("network", NETWORKS)
def test_epsilon_zero_is_the_clean_count(network, networks, examples, counts):
    assert (
        num_correct("fgsm", networks[network], *examples, [0])
        == (counts[network]["clean_correct_256"])
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_fgsm_error_and_confidence(network, networks, examples, counts):
    x, y = examples
    logits_fn = networks[network]
    x_adv, _ = compiled("fgsm")(jax.random.key(0), logits_fn, x, y, np.float32(0.25))
    logits = logits_fn(x_adv)
    is_error = ~np.asarray(metrics.is_correct(logits, jnp.asarray(y)))
    # Within one image, as above.
    assert abs(is_error.mean() - counts[network]["fgsm_0.25_error"]) <= 1 / len(y)
    confidence = float(np.asarray(metrics.confidence(logits))[is_error].mean())
    # One image more or less among at least 53 errors moves the mean by at most 1 / 53.
    stored = counts[network]["fgsm_0.25_mean_confidence_on_errors"]
    assert confidence == pytest.approx(stored, abs=1 / 53)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fgsm", "pgd-l2"])
def test_eight_devices_are_one(name, networks, examples):
    """Bit for bit, with as many images at a time on each."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, has {jax.device_count()}")
    mesh = parallel.make_mesh(devices=jax.devices()[:8])
    attack = jax.jit(lambda *args: ATTACKS[name](*args, np.float32(0.5)))
    logits_fn, (x, y) = networks["mnist_standard"], examples
    keys = random.example_keys(jax.random.key(0), len(x))
    keys_placed, *placed = parallel.place((keys, x, y), mesh, axis=0)
    together = attack(keys_placed, parallel.place(logits_fn, mesh), *placed)
    parts = [
        attack(keys[rows], logits_fn, x[rows], y[rows]) for rows in np.split(np.arange(len(x)), 8)
    ]
    helpers.assert_same_bits(np.asarray(together), np.concatenate(parts))
    assert not np.array_equal(together, x)
