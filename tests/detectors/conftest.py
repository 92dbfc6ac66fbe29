"""A classifier with a backdoor that is known: one class looks at one patch."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests import helpers

SHAPE = (6, 6, 1)
NUM_CLASSES = 5
TARGET = 3
PATCH = (slice(4, 6), slice(4, 6))


def planted_weights(seed, strength):
    """Weights f32[36, k]: small random ones, and large ones of the target on four pixels."""
    weights = np.random.default_rng(seed).normal(size=(*SHAPE[:2], NUM_CLASSES))
    weights[(*PATCH, TARGET)] += strength
    return weights.reshape(-1, NUM_CLASSES).astype(np.float32)


class Counted:
    """A linear classifier that counts how often it is traced."""

    def __init__(self):
        self.num_traces = 0

    def __call__(self, params, x):
        self.num_traces += 1
        return helpers.linear(params, x)


@pytest.fixture(scope="package")
def counted():
    return Counted()


@pytest.fixture(scope="package")
def planted(counted):
    """`planted(seed, strength) -> logits_fn`."""

    def make(seed, strength=20.0):
        weights = jnp.asarray(planted_weights(seed, strength))
        return Partial(counted, (weights, jnp.zeros(NUM_CLASSES)))

    return make


@pytest.fixture(scope="package")
def clean_images():
    """Images that are black where the trigger is."""
    x = helpers.images(0, 40, SHAPE)
    x[(slice(None), *PATCH)] = 0
    return x
