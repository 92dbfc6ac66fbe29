"""Keys that do not depend on batching or order, and what attacks promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, traits
from advjax.core import random


def data(keys):
    return np.asarray(jax.random.key_data(keys))


KEY = jax.random.key(7)


def test_example_keys_do_not_depend_on_the_number_of_examples():
    keys = random.example_keys(KEY, 8)
    assert keys.shape == (8,)
    np.testing.assert_array_equal(data(keys)[:3], data(random.example_keys(KEY, 3)))
    assert len({row.tobytes() for row in data(keys)}) == 8
    np.testing.assert_array_equal(data(keys)[5], data(jax.random.fold_in(KEY, 5)))


def test_example_keys_that_are_given_stay():
    keys = jax.random.split(KEY, 4)
    np.testing.assert_array_equal(data(random.example_keys(keys, 4)), data(keys))
    for wrong in (keys, keys.reshape(2, 2), keys[:0]):
        with pytest.raises(ValueError, match=r"one key an example \(3\), got shape"):
            random.example_keys(wrong, 3)


def test_raw_keys_are_wrapped():
    raw = jax.random.PRNGKey(7)
    np.testing.assert_array_equal(data(random.as_typed(raw)), data(KEY))
    np.testing.assert_array_equal(
        data(random.example_keys(raw, 3)), data(random.example_keys(KEY, 3))
    )
    both = jnp.stack([raw, raw])
    assert random.example_keys(both, 2).shape == (2,)
    assert random.as_typed(KEY) is KEY


def test_example_keys_under_jit_and_vmap():
    # One key for all epsilons of a sweep: `in_axes=None`.
    keys = jax.jit(lambda key: random.example_keys(key, 3))(KEY)
    np.testing.assert_array_equal(data(keys), data(random.example_keys(KEY, 3)))
    seeds = jax.random.split(KEY, 2)
    stack = jax.vmap(lambda key: random.example_keys(key, 3))(seeds)
    np.testing.assert_array_equal(data(stack[1]), data(random.example_keys(seeds[1], 3)))


def test_fold_in_each():
    keys = random.fold_in_each(KEY, jnp.array([5, 0, 5]))
    np.testing.assert_array_equal(data(keys)[0], data(keys)[2])
    np.testing.assert_array_equal(data(keys)[1], data(jax.random.fold_in(KEY, 0)))


def test_named_keys_depend_on_the_name_alone():
    one = data(random.named(KEY, "pgd/epsilon=0.1/seed=0"))
    random.named(KEY, "something else")
    np.testing.assert_array_equal(data(random.named(KEY, "pgd/epsilon=0.1/seed=0")), one)
    names = ["", "pgd", "bim", "pgd ", "PGD", "é", "pgd/epsilon=0.1/seed=1"]
    assert len({data(random.named(KEY, name)).tobytes() for name in names}) == len(names)
    assert not np.array_equal(data(random.named(jax.random.key(8), "pgd")), data(KEY))


def test_traits():
    assert traits.of(lambda *args: None) == traits.Traits(False, False)
    assert traits.of(attacks.pgd) == traits.Traits(example_keys=True, monotone=True)
    assert not traits.of(attacks.fgsm).monotone
    configured = functools.partial(functools.partial(attacks.pgd, num_steps=3), num_restarts=2)
    assert traits.of(configured) == traits.of(attacks.pgd)


def test_declare_leaves_the_function_alone():
    def attack():
        """Doc."""

    declared = traits.declare(monotone=True)(attack)
    assert declared is attack
    assert traits.of(attack) == traits.Traits(example_keys=False, monotone=True)
