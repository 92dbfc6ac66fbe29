"""Checks that the attacks' own bad inputs (tests/attacks/test_inputs.py) do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax.core import checks


def test_known():
    checks.known("models.make", "model", "mlp", ["mlp", "cnn"])
    with pytest.raises(ValueError, match=r"^models\.make: unknown model 'x'; known: mlp, cnn\.$"):
        checks.known("models.make", "model", "x", iter(["mlp", "cnn"]))


def test_is_concrete():
    assert checks.is_concrete(1.0, np.ones(3), jnp.ones(3))
    seen = []
    jax.jit(lambda a: seen.append((checks.is_concrete(a), checks.is_concrete(2.0))))(1.0)
    assert seen == [(False, True)]


def test_constants_are_looked_at_under_jit():
    @jax.jit
    def run(x):
        checks.epsilon("attack", -1.0, x)
        return x

    with pytest.raises(ValueError, match=r"attack: need a finite epsilon >= 0, got epsilon=-1\.0"):
        run(jnp.ones((1, 2)))


def test_images():
    for good in (np.zeros((1, 2)), np.ones((1, 2, 2, 1), np.float16), np.zeros((0, 2, 2, 1))):
        checks.images("attack", good)
    # A rounding beyond the box, and a little more than that.
    checks.images("attack", np.float32([[1 + 9e-7, -9e-7]]))
    with pytest.raises(ValueError, match="need images in"):
        checks.images("attack", np.float32([[1 + 2e-6, 0]]))


def test_labels_without_a_classifier_are_not_compared():
    x = np.zeros((2, 2, 2, 1))
    checks.labels("attack", np.array([5, -1]), x)
    checks.labels("attack", np.zeros(0, int), x[:0], lambda x: x)
    with pytest.raises(ValueError, match="need integer labels, got dtype bool"):
        checks.labels("attack", np.array([True, False]), x)


def test_at_least():
    checks.at_least("attack", "num_steps", np.int64(3), 3)
    for wrong in (2, 3.0, True, None, "3"):
        with pytest.raises(ValueError, match=rf"^attack: need num_steps >= 3, got .*{wrong!r}\.$"):
            checks.at_least("attack", "num_steps", wrong, 3)


def test_attack_inputs_become_jax_arrays():
    logits_fn = lambda x: x.reshape(x.shape[0], -1)
    x, y = checks.attack_inputs("attack", logits_fn, np.zeros((2, 2, 2, 1)), np.array([0, 3]), 0)
    assert isinstance(x, jax.Array)
    assert isinstance(y, jax.Array)
    assert x.dtype == jnp.float32
