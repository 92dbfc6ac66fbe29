"""Adversarial error: against a loop, on stacks, with the attacks of the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import attacks, models, universality

KEY = jax.random.key(0)
EPSILONS = (0.02, 0.1, 0.3)
NET = models.make("mlp", num_classes=3, hidden=(8,))
X = np.random.default_rng(0).uniform(size=(20, 3, 3, 1)).astype(np.float32)
CLASSIFIERS = [advjax.bind(NET, NET.init(jax.random.key(seed), X)) for seed in range(2)]
# Labels that both networks get right now and then.
Y = np.array(jnp.argmax(CLASSIFIERS[0](X), axis=-1), np.int32)
Y[:5] = (Y[:5] + 1) % 3
ATTACKS = {
    "fgsm": attacks.fgsm,
    "fgm": attacks.fgm,
    "pgd": functools.partial(attacks.pgd, num_steps=3),
    "least_likely": attacks.least_likely,
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def looped(attack, logits_fn):
    """One epsilon after the other, with a memory of what was adversarial."""
    is_correct = np.argmax(logits_fn(X), -1) == Y
    broken, success = np.zeros(20, bool), []
    for epsilon in EPSILONS:
        x_adv = attack(jax.random.split(KEY, 20), logits_fn, X, Y, epsilon)
        broken = broken | (is_correct & (np.argmax(logits_fn(x_adv), -1) != Y))
        success.append(broken)
    return np.array(success), is_correct


@pytest.mark.parametrize("name", ["fgsm", "fgm", "least_likely"])
def test_it_is_a_loop_over_epsilons(name):
    success, is_correct = looped(ATTACKS[name], CLASSIFIERS[0])
    result = universality.adversarial_error(KEY, ATTACKS[name], CLASSIFIERS[0], X, Y, EPSILONS)
    np.testing.assert_array_equal(result.is_correct, is_correct)
    np.testing.assert_array_equal(result.success, success)
    # 1e-6: a quotient in float32.
    np.testing.assert_allclose(result.error, success.sum(1) / is_correct.sum(), rtol=1e-6)
    assert 0 < result.error[-1] <= 1


@pytest.mark.study
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("how", ["vmap", "map"])
def test_a_stack_is_its_members(name, how):
    together = universality.adversarial_error(
        KEY, ATTACKS[name], advjax.stack(CLASSIFIERS), X, Y, EPSILONS, models=how, batch_size=8
    )
    for i, logits_fn in enumerate(CLASSIFIERS):
        alone = universality.adversarial_error(KEY, ATTACKS[name], logits_fn, X, Y, EPSILONS)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_nothing_is_adversarial_at_zero():
    result = universality.adversarial_error(KEY, attacks.fgsm, CLASSIFIERS[0], X, Y, [0.0])
    assert result.error == 0 and not result.is_correct[:5].any()


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="unknown models 'loop'; known: None, vmap, map"):
        universality.adversarial_error(
            KEY, attacks.fgsm, CLASSIFIERS[0], X, Y, EPSILONS, models="loop"
        )
