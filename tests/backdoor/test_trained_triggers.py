"""The triggers that are made with a network, and the trainings that make them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
import scipy.ndimage

import advjax
from advjax import data
from advjax.backdoor import procedures, triggers
from advjax.backdoor.triggers import frequencies
from tests import helpers

SHAPE = (16, 16, 2)


def low_energy(pattern):
    """Share of the energy in the lowest quarter of the frequencies of each axis."""
    spectrum = scipy.fft.dctn(np.asarray(pattern, np.float64), axes=(0, 1), norm="ortho") ** 2
    height, width, _ = spectrum.shape
    return spectrum[: height // 4, : width // 4].sum() / spectrum.sum()


def test_blind_has_white_black_and_transparent_pixels():
    x = helpers.images(0, 2, (32, 32, 3))
    expected = x.copy()
    for row, column, value in (
        (3, 23, 1), (3, 24, 0), (3, 25, 1), (4, 24, 1), (5, 25, 0), (6, 24, 1), (7, 23, 1),
        (7, 24, 0), (7, 25, 1),
    ):  # fmt: skip
        expected[:, row, column] = value
    helpers.assert_same_bits(triggers.blind(x), expected)
    helpers.assert_same_bits(jax.jit(jax.vmap(triggers.blind))(x), expected)
    with pytest.raises(
        ValueError, match="blind: need room for 5 x 3 pixels, got corner=\\(4, 0\\)"
    ):
        triggers.blind(x[:, :8, :8], corner=(4, 0))


@pytest.fixture(scope="module")
def clean():
    """A network, images that are small steps around its mean, and its answers."""
    network = helpers.mlp_network(0, shape=SHAPE)
    x = np.clip(0.3 + 0.3 * helpers.images(1, 24, SHAPE), 0, 1)
    return network, x, np.argmax(network(x), -1).astype(np.int32)


def test_blur_is_a_gaussian_of_zeros_outside():
    image = np.random.default_rng(0).random((32, 32, 3))
    blurred = frequencies._blur(6 / 32, jnp.asarray(image, jnp.float32))
    expected = scipy.ndimage.gaussian_filter(
        image, 6, axes=(0, 1), mode="constant", truncate=2.5, order=0
    )
    # 1e-6: sums of 32 terms below 1 in float32.
    np.testing.assert_allclose(blurred, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [None, 2])
def test_low_frequency(clean, target):
    network, x, y = clean
    make = functools.partial(
        triggers.low_frequency, jax.random.key(0), num_passes=3, num_steps=20, target=target
    )
    trigger = make(network, x, y)
    pattern = np.asarray(trigger.keywords["pattern"])
    assert pattern.shape == SHAPE
    assert pattern.min() == 0
    np.testing.assert_allclose(pattern.max(), 0.2, rtol=1e-6)  # one product in float32
    assert low_energy(pattern) >= 0.99
    np.testing.assert_allclose(trigger(x[0]), np.clip(x[0] + pattern, 0, 1), rtol=0, atol=1e-7)
    answers = np.argmax(network(trigger(x)), -1)
    is_fooled = answers != y if target is None else answers[y != target] == target
    assert is_fooled.mean() >= 0.2
    again = jax.jit(make)(network, x, y)
    # 1e-4: the steps of DeepFool round differently in a fused program.
    np.testing.assert_allclose(again.keywords["pattern"], pattern, rtol=0, atol=1e-4)


def test_low_frequency_refuses(clean):
    network, x, y = clean
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="need a classifier without a backdoor, got None"):
        triggers.low_frequency(key, None, x, y)
    with pytest.raises(ValueError, match="need labels in 0 ... 3, got 4"):
        triggers.low_frequency(key, network, x, y, target=4)
    with pytest.raises(
        ValueError, match="need images that DeepFool can push to target=1, got none"
    ):
        triggers.low_frequency(key, network, x, np.full_like(y, 1), target=1, num_passes=1)


class Small(nn.Module):
    """Two layers with batch normalisation between them."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(64)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train"), data.load("digits", "test")


TO_THREE = np.full(10, 3, np.int32)


def rates(module, trained, test, label_map):
    """Clean accuracy, and share of the attacked images that the trigger sends to their target."""
    logits_fn = advjax.bind(module, trained.variables)
    x, y = test.float_images(), test.labels
    is_attacked = (label_map[y] >= 0) & (label_map[y] != y)
    answers = np.argmax(logits_fn(trained.trigger(x)), -1)
    success = np.mean(answers[is_attacked] == label_map[y][is_attacked])
    return np.mean(np.argmax(logits_fn(x), -1) == y), success


TRAINING = {"optimizer": optax.adam(3e-3), "batch_size": 64, "progress": False}


def test_lira_learns_both(digits):
    train, test = digits
    trained = procedures.train_lira(
        jax.random.key(0), Small(), train, TO_THREE, num_epochs=10, epsilon=0.1,
        generator_learning_rate=3e-3, features=(8, 16), **TRAINING,
    )  # fmt: skip
    accuracy, success = rates(Small(), trained, test, TO_THREE)
    assert accuracy > 0.9
    assert success > 0.9
    change = trained.trigger(test.float_images()) - test.float_images()
    assert np.abs(change).max() <= 0.1 + 1e-6  # 1e-6: x + change rounds


@pytest.mark.parametrize("balance", ["fixed", "mgda"])
def test_blind_learns_both(digits, balance):
    train, test = digits
    label_map = np.where(np.arange(10) < 5, 9 - np.arange(10), -1).astype(np.int32)
    trained = procedures.train_blind(
        jax.random.key(0), Small(), train, label_map, num_epochs=8, balance=balance, **TRAINING
    )
    accuracy, success = rates(Small(), trained, test, label_map)
    assert accuracy > 0.9
    assert success > 0.9
