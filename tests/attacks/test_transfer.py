"""The transfer matrix: its diagonal, copies, stacks, what counts and what does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import attacks, evaluation, metrics
from advjax.attacks import transfer
from tests import helpers

NETWORKS = [helpers.mlp_network(seed) for seed in range(3)]
X = helpers.images(0, 40)
Y = np.array(metrics.predictions(NETWORKS[0](X)))
Y[:3] = (Y[:3] + 1) % helpers.NUM_CLASSES
KEY = jax.random.key(0)
ATTACK = attacks.rand_fgsm
matrix = jax.jit(transfer, static_argnames="attack")


@functools.cache
def usual():
    return np.asarray(matrix(KEY, ATTACK, NETWORKS, NETWORKS, X, Y, 0.1))


def test_follows_its_definition():
    """Entry by entry, in NumPy, from the attack's own images."""
    assert usual().shape == (3, 3) and usual().dtype == np.float32
    for s, source in enumerate(NETWORKS):
        x_adv = jax.jit(ATTACK)(KEY, source, X, Y, 0.1)
        for t, target in enumerate(NETWORKS):
            counts = np.asarray(target(X)).argmax(-1) == Y
            is_wrong = np.asarray(target(x_adv)).argmax(-1) != Y
            expected = np.float32((counts & is_wrong).sum()) / np.float32(counts.sum())
            # 1e-6: XLA may divide by multiplying with the inverse.
            np.testing.assert_allclose(usual()[s, t], expected, rtol=1e-6)
    assert 0.1 < usual().mean() < 0.5  # there is something to tell apart


def test_the_diagonal_is_the_white_box_error():
    for i, network in enumerate(NETWORKS):
        robust = evaluation.robust_accuracy(KEY, ATTACK, network, X, Y, [0.1], method="map")[0]
        clean = evaluation.accuracy(network, X, Y)
        # 1e-6: a share of a share.
        np.testing.assert_allclose(usual()[i, i], 1 - robust / clean, rtol=0, atol=1e-6)


def test_a_copy_of_the_source_is_the_source_and_architectures_may_differ():
    copy, other = jax.tree.map(jnp.copy, NETWORKS[0]), helpers.mlp_network(7, hidden=5)
    rates = matrix(KEY, ATTACK, [NETWORKS[0], other], [NETWORKS[0], copy, other], X, Y, 0.1)
    assert rates.shape == (2, 3) and rates[0, 0] == rates[0, 1]
    # 1e-6: see above; it is another program.
    np.testing.assert_allclose(rates[0, 0], usual()[0, 0], rtol=1e-6)


def test_a_stack_equals_a_list():
    stack = advjax.stack(NETWORKS)
    for sources, targets in ((stack, stack), (NETWORKS[:1], stack), (stack, NETWORKS[:1])):
        rates = matrix(KEY, ATTACK, sources, targets, X, Y, 0.1)
        expected = usual()[: 1 if sources is not stack else 3, : 1 if targets is not stack else 3]
        np.testing.assert_allclose(rates, expected, rtol=1e-6)  # as above


def test_nothing_is_transferred_at_epsilon_zero():
    np.testing.assert_array_equal(
        matrix(KEY, ATTACK, NETWORKS, NETWORKS, X, Y, 0.0), np.zeros((3, 3))
    )


def test_a_minimum_norm_attack_through_an_adapter():
    """Images from elsewhere, the epsilon not looked at."""
    black = lambda key, logits_fn, x, y, epsilon: x * 0
    rates = matrix(KEY, black, NETWORKS[:1], NETWORKS, X, Y, 0.0)
    for network, rate in zip(NETWORKS, rates[0], strict=True):
        counts = np.asarray(network(X)).argmax(-1) == Y
        at_black = np.asarray(network(X[:1] * 0)).argmax(-1)[0]
        expected = (counts & (at_black != Y)).sum() / counts.sum()
        np.testing.assert_allclose(rate, expected, rtol=1e-6)  # as above


def test_vmap_over_epsilons_equals_a_loop():
    run = lambda epsilon: transfer(KEY, ATTACK, NETWORKS[:1], NETWORKS, X, Y, epsilon)
    together = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.1]))
    np.testing.assert_array_equal(together[0], np.zeros((1, 3)))
    np.testing.assert_allclose(together[1], usual()[:1], rtol=1e-6)  # as above


def test_an_answer_of_nan_is_no_success():
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, NETWORKS[0])
    rates = np.asarray(matrix(KEY, ATTACK, NETWORKS[:1], [nan, NETWORKS[0]], X, Y, 0.1))
    assert np.isnan(rates[0, 0])
    np.testing.assert_allclose(rates[0, 1], usual()[0, 0], rtol=1e-6)  # as above
    known = jnp.asarray(X)
    only_clean = lambda x: jnp.where(jnp.all(x == known), NETWORKS[0](x), jnp.nan)
    rates = transfer(KEY, attacks.fgsm, NETWORKS[:1], [only_clean], X, Y, 0.3)
    np.testing.assert_array_equal(rates, np.zeros((1, 1)))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(source_fns=[]), "transfer: need at least one classifier in source_fns, got none"),
        (dict(target_fns=()), "transfer: need at least one classifier in target_fns, got none"),
        (dict(source_fns=NETWORKS[0]), "source_fns as a list .* got one classifier"),
        (dict(target_fns=lambda x: x), "target_fns as a list .* got one classifier"),
        (
            dict(target_fns=[helpers.mlp_network(0, num_classes=6)]),
            r"classifiers of the same classes, got \[4, 6\] classes",
        ),
        (dict(target_fns=[lambda x: x]), "logits_fn: need logits of shape"),
        (
            dict(source_fns={"a": NETWORKS[0]}),
            r"source_fns as a list .* got a dict; give list\(source_fns.values\(\)\)",
        ),
        (
            dict(attack=functools.partial(attacks.fgsm, targeted=True)),
            "transfer: need an untargeted attack",
        ),
        (
            dict(attack=attacks.deepfool),
            "transfer: need attack.* got .* see evaluation.minimal_cur",
        ),
        (dict(x=np.uint8(X * 255)), "transfer: need float images"),
        (dict(y=Y + 4), "transfer: need labels in 0 ... 3"),
        (dict(epsilon=-1.0), "transfer: need a finite epsilon >= 0"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    arguments = dict(
        key=KEY, attack=attacks.fgsm, source_fns=NETWORKS, target_fns=NETWORKS, x=X, y=Y,
        epsilon=0.1,
    ) | change  # fmt: skip
    with pytest.raises(ValueError, match=sentence) as caught:
        transfer(**arguments)
    assert "\n" not in str(caught.value)
