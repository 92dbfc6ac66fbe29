"""Classifiers as values: one compilation for any weights, and stacks."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import advjax
from advjax.core import classifier

X = np.random.default_rng(0).random((3, 2, 2, 1)).astype(np.float32)


class Net(nn.Module):
    """A linear network with an option that is static."""

    num_classes: int = 4
    widths: tuple = (5,)

    @nn.compact
    def __call__(self, x, train=False, scale=1.0):
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.num_classes)(x) * scale


def variables(seed, **fields):
    return Net(**fields).init(jax.random.key(seed), X)


def counted(name):
    """A jitted call of a classifier that fails when it is traced a second time."""

    def call(logits_fn, x):
        return logits_fn(x)

    call.__name__ = name  # chex counts by the name
    return jax.jit(chex.assert_max_traces(call, n=1))


def test_bind_applies_the_module():
    logits_fn = advjax.bind(Net(), variables(0))
    assert isinstance(logits_fn, Partial)
    np.testing.assert_array_equal(logits_fn(X), Net().apply(variables(0), X))
    leaves, expected = jax.tree.leaves(logits_fn), jax.tree.leaves(variables(0))
    assert len(leaves) == len(expected)


def test_new_weights_do_not_recompile():
    call = counted("new weights")
    results = [call(advjax.bind(Net(), variables(seed)), X) for seed in range(3)]
    assert not np.array_equal(results[0], results[1])


def test_an_equal_module_does_not_recompile():
    call = counted("equal modules")
    call(advjax.bind(Net(4), variables(0)), X)
    call(advjax.bind(Net(num_classes=4), variables(1)), X)
    call(advjax.bind(Net(4).clone(), variables(2)), X)


def test_another_module_or_option_is_another_program():
    first = advjax.bind(Net(), variables(0))
    for other in (
        advjax.bind(Net(widths=(5, 5)), variables(0, widths=(5, 5))),
        advjax.bind(Net(), variables(0), scale=2.0),
    ):
        assert jax.tree.structure(first) != jax.tree.structure(other)
    # One rounding of the product.
    doubled = advjax.bind(Net(), variables(0), scale=2.0)(X)
    np.testing.assert_allclose(doubled, 2 * first(X), rtol=1e-6)


def test_options_in_any_order_are_one_program():
    call = counted("option order")
    call(advjax.bind(Net(), variables(0), train=False, scale=2.0), X)
    call(advjax.bind(Net(), variables(0), scale=2.0, train=False), X)


def test_bind_needs_params():
    for wrong in ({}, {"batch_stats": {}}, variables(0)["params"], None, [1]):
        with pytest.raises(ValueError, match="bind: variables need a 'params' collection, got"):
            advjax.bind(Net(), wrong)


def test_stack_runs_every_model():
    logits_fns = [advjax.bind(Net(), variables(seed)) for seed in range(3)]
    stacked = advjax.stack(logits_fns)
    together = jax.jit(jax.vmap(lambda f: f(X)))(stacked)
    for logits_fn, logits in zip(logits_fns, together, strict=True):
        # 1e-6: a batched product of matrices may add in another order.
        np.testing.assert_allclose(logits, logits_fn(X), rtol=1e-6, atol=1e-6)


def test_stack_errors():
    first = advjax.bind(Net(), variables(0))
    with pytest.raises(ValueError, match="stack: need at least one classifier, got none"):
        advjax.stack([])
    others = {
        "another shape": advjax.bind(Net(widths=(6,)), variables(0, widths=(6,))),
        "another depth": advjax.bind(Net(widths=(5, 5)), variables(0, widths=(5, 5))),
        "another option": advjax.bind(Net(), variables(0), scale=2.0),
        "another type": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), first),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match="number 2 differs from number 0"):
            advjax.stack([first, first, other])
            pytest.fail(name)


def test_num_classes():
    assert classifier.num_classes(advjax.bind(Net(), variables(0)), X) == 4
    assert classifier.num_classes(lambda x: jnp.zeros((x.shape[0], 1)), X) == 1
    for wrong in (lambda x: x, lambda x: jnp.zeros(10), lambda x: jnp.zeros((7, 10))):
        with pytest.raises(ValueError, match=r"logits_fn: need logits of shape \[3, k\]"):
            classifier.num_classes(wrong, X)


def test_images_that_the_weights_do_not_fit():
    logits_fn = advjax.bind(Net(), variables(0))
    with pytest.raises(ValueError, match=r"weights do not fit images of shape \(3,.*: For para"):
        classifier.num_classes(logits_fn, jnp.zeros((3, 1, 1, 1)))


def test_num_classes_does_not_run_the_network():
    def logits_fn(x):
        assert isinstance(x, jax.core.Tracer)
        return jnp.zeros((x.shape[0], 10))

    assert classifier.num_classes(logits_fn, X) == 10


def test_as_pytree():
    bound = advjax.bind(Net(), variables(0))
    assert classifier.as_pytree(bound) is bound
    logits_fn = lambda x: x.reshape(x.shape[0], -1)
    call = counted("as_pytree")
    call(classifier.as_pytree(logits_fn), X)
    call(classifier.as_pytree(logits_fn), X)


def shifted(weight, key, x):
    return weight * x.reshape(len(x), -1) + jax.random.uniform(key)


def test_what_is_a_pytree_crosses_a_jit_boundary_as_itself():
    randomised = [
        advjax.Randomised(Partial(shifted, weight), jax.random.key(seed))
        for seed, weight in enumerate([1.0, 2.0, 3.0])
    ]
    assert all(
        classifier.as_pytree(f) is f for f in [*randomised, advjax.bind(Net(), {"params": {}})]
    )
    call = counted("randomised classifiers")
    for f in randomised:
        np.testing.assert_allclose(call(classifier.as_pytree(f), X), f(X), rtol=1e-6)
    # A callable that is no pytree is static, also inside a Randomised.
    plain = advjax.Randomised(functools.partial(shifted, 2.0), jax.random.key(1))
    np.testing.assert_allclose(call(classifier.as_pytree(randomised[1]), X), plain(X), rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda f, x: f(x))(classifier.as_pytree(plain), X), plain(X), rtol=1e-6
    )
    assert isinstance(classifier.as_pytree(functools.partial(shifted, 2.0)), Partial)
