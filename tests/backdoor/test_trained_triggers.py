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
from jax.tree_util import Partial

import advjax
from advjax import data, models
from advjax.backdoor import networks, procedures, triggers
from advjax.backdoor.triggers import frequencies
from advjax.core import parallel
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


LOW_FREQUENCY = functools.partial(
    triggers.low_frequency, jax.random.key(0), num_passes=3, num_steps=20
)


@pytest.mark.parametrize("target", [None, 2])
def test_low_frequency(clean, target):
    network, x, y = clean
    trigger = jax.jit(functools.partial(LOW_FREQUENCY, target=target))(network, x, y)
    pattern = np.asarray(trigger.keywords["pattern"])
    assert pattern.shape == SHAPE
    assert pattern.min() == 0
    np.testing.assert_allclose(pattern.max(), 0.2, rtol=1e-6)  # one product in float32
    assert low_energy(pattern) >= 0.99
    # 1e-7: one sum below 1 in float32.
    np.testing.assert_allclose(trigger(x[0]), np.clip(x[0] + pattern, 0, 1), rtol=0, atol=1e-7)
    answers = np.argmax(network(trigger(x)), -1)
    is_fooled = answers != y if target is None else answers[y != target] == target
    assert is_fooled.mean() >= 0.2


def test_low_frequency_eagerly(clean):
    network, x, y = clean
    make = functools.partial(LOW_FREQUENCY, target=2)
    # 1e-4: the steps of DeepFool round differently in a fused program.
    np.testing.assert_allclose(
        make(network, x, y).keywords["pattern"],
        jax.jit(make)(network, x, y).keywords["pattern"], rtol=0, atol=1e-4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"images that DeepFool can push to target=2, got none\."):
        make(network, x, np.full_like(y, 2))
    with pytest.raises(ValueError, match="need a classifier without a backdoor, got None"):
        make(None, x, y)
    with pytest.raises(ValueError, match=r"need labels in 0 \.\.\. 3, got 4"):
        LOW_FREQUENCY(network, x, y, target=4)


def test_trojannn_excites_the_neurons_with_the_largest_weights():
    """A linear neuron with a value out of reach: each pixel goes to the end that its weight has."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16 * 16 * 2, 6)).astype(np.float32)
    last = np.float32([[1, -1], [0, 3], [-2, 2], [0, 0], [1, 1], [2, 1]])
    features_fn = Partial(lambda weights, x: x.reshape(len(x), -1) @ weights, weights)
    make = functools.partial(
        triggers.trojannn, x=np.zeros(SHAPE), num_neurons=1, value=1e4, epsilon=1, num_steps=12
    )
    trigger = make(jax.random.key(0), features_fn, last)
    expected = (weights[:, 2].reshape(SHAPE) > 0).astype(np.float32)
    expected[:11] = expected[:, :11] = 0  # the mask is the lower right 5 x 5
    helpers.assert_same_bits(trigger.keywords["pattern"], expected)
    x = helpers.images(0, 3, SHAPE)
    helpers.assert_same_bits(trigger(x), np.minimum(x + expected, 1))
    # Pixels stay within epsilon of where they start, and only the key moves those.
    mask = np.zeros(SHAPE[:2], bool)
    mask[0, 0] = True
    jitted = jax.jit(functools.partial(make, epsilon=0.3, mask=mask, num_steps=5))
    key = jax.random.key(1)
    # A value of 0 weight is no step at all: the start itself.
    start = jitted(key, features_fn, last, step_size=0.0).keywords["pattern"]
    moved = jitted(key, features_fn, last, step_size=0.1).keywords["pattern"]
    step = np.where(weights[:, 2].reshape(SHAPE) > 0, 0.3, -0.3)
    expected = np.where(mask[:, :, None], np.clip(start + step, 0, 1), 0)
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)  # three steps of 0.1 round
    assert np.abs(moved - jitted(jax.random.key(2), features_fn, last, step_size=0.1)
                  .keywords["pattern"]).max() > 0.01  # fmt: skip


def test_trojannn_refuses():
    features_fn, key, x = lambda x: x.reshape(len(x), -1), jax.random.key(0), np.zeros((2, 2, 1))
    for arguments, options, message in (
        (
            (None, None),
            {},
            "need the features and the last weights of a clean classifier, got None",
        ),
        ((features_fn, np.ones((5, 3))), {}, r"\(1, 4\) and last_weights of shape \(5, 3\)"),
        ((features_fn, np.ones((4, 3))), {"num_neurons": 5}, "need num_neurons <= 4, got"),
        (
            (features_fn, np.ones((4, 3))),
            {"mask": np.zeros((2, 2))},
            "at least one pixel, got none",
        ),
        ((features_fn, np.ones((4, 3))), {"mask": np.ones((2, 3))}, r"got shape \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match="trojannn: .*" + message):
            triggers.trojannn(key, *arguments, x, **options)


@pytest.mark.parametrize("name", ["mlp", "cnn", "preact_resnet_nano", "vit_nano"])
def test_last_layer_cuts_a_network(name):
    network, x = models.make(name, num_classes=3), helpers.images(0, 2, (8, 8, 1))
    variables = jax.jit(network.init)(jax.random.key(0), x)
    features_fn, weights = networks.last_layer(network, variables, x)
    logits, features = jax.jit(lambda f: (network.apply(variables, x), f(x)))(features_fn)
    bias = next(
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if leaf.shape == (3,)
    )  # fmt: skip
    # 1e-5: sums of up to a hundred terms of size 1.
    np.testing.assert_allclose(features @ weights + bias, logits, rtol=0, atol=1e-5)


def test_mgda_weights_give_the_shortest_gradient():
    rng = np.random.default_rng(0)
    shares = np.linspace(0.001, 0.999, 9981)[:, None]
    for scale in (1.0, 3.0, 0.01):
        loss = np.float32([0.7, 1.9])
        gradients = [rng.normal(size=(2, 5)), rng.normal(size=(2, 2, 3))]
        gradients = [np.float32(leaf * [[1.0], [scale]] if leaf.ndim == 2 else leaf) for leaf in
                     gradients]  # fmt: skip
        flat = np.concatenate([leaf.reshape(2, -1) for leaf in gradients], 1).astype(np.float64)
        size = np.minimum(loss * np.linalg.norm(flat, axis=1), 10) + 1e-5
        flat /= size[:, None]
        lengths = np.linalg.norm(shares * flat[0] + (1 - shares) * flat[1], axis=1)
        best = shares[np.argmin(lengths), 0]
        # 2e-4: the grid is 1e-4 wide.
        np.testing.assert_allclose(
            procedures.mgda_weights(loss, gradients), [best, 1 - best], rtol=0, atol=2e-4
        )
    same = procedures.mgda_weights(jnp.ones(2), jnp.ones((2, 3)))
    np.testing.assert_allclose(same, [0.5, 0.5])


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


@pytest.mark.study
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


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, use_bias=False, name="dense")(x.reshape(len(x), -1))


def _slope(weights, x, y, counts=1.0):
    """Gradient of the mean cross-entropy of a linear classifier; `counts` weighs the images."""
    logits = x @ weights
    logits -= logits.max(1, keepdims=True)
    odds = np.exp(logits)
    errors = odds / odds.sum(1, keepdims=True) - np.eye(10)[y]
    counts = np.broadcast_to(counts, len(x))
    return x.T @ (counts[:, None] * errors) / counts.sum()


def _backdoor_slope(weights, x, y, cover_ratio):
    """Of triggered images: attacked ones with their target, the others with their own label."""
    is_attacked = LABEL_MAP[y] >= 0
    wanted = np.where(is_attacked, LABEL_MAP[y], y)
    return _slope(weights, x, wanted, np.where(is_attacked, 1.0, cover_ratio))


def _weights(trained):
    return np.asarray(trained.variables["params"]["dense"]["kernel"], np.float64)


def _flat(images):
    return np.asarray(images, np.float64).reshape(len(images), -1)


LABEL_MAP = np.where(np.arange(10) < 5, 9 - np.arange(10), -1).astype(np.int32)
ONE_BATCH = {"batch_size": 64, "progress": False}


@pytest.mark.parametrize("threshold, cover_ratio", [(1e-3, 0.0), (1e3, 0.0), (1e3, 0.3)])
def test_blind_steps_down_both_losses_after_the_warm_up(digits, threshold, cover_ratio):
    train = digits[0].take(64)
    x, y, rate = train.float_images(), train.labels, 0.1

    def trained(learning_rate):
        return procedures.train_blind(
            jax.random.key(0), Linear(), train, LABEL_MAP, optimizer=optax.sgd(learning_rate),
            num_epochs=2, num_warm_up=1, threshold=threshold, cover_ratio=cover_ratio, **ONE_BATCH,
        )  # fmt: skip

    weights = _weights(trained(0.0))
    stamped = _flat(triggers.blind(x))
    weights -= rate * _slope(weights, _flat(x), y)
    second = _slope(weights, _flat(x), y)
    if threshold > 1:
        second += 0.9 * _backdoor_slope(weights, stamped, y, cover_ratio)
    weights -= rate * second
    # 1e-5: sums of 64 terms of size 0.1 in float32, twice.
    np.testing.assert_allclose(_weights(trained(rate)), weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cover_ratio", [0.0, 0.3])
def test_lira_keeps_the_generator_and_the_classifier_of_the_second_stage(digits, cover_ratio):
    train = digits[0].take(64)
    x, y, rate = train.float_images(), train.labels, 0.1
    optimizer = optax.sgd(rate)

    def trained(num_epochs, optimizer=optimizer):
        return procedures.train_lira(
            jax.random.key(0), Linear(), train, LABEL_MAP, optimizer=optimizer, epsilon=0.1,
            num_epochs=num_epochs, num_joint_epochs=2, features=(4, 8),
            generator_learning_rate=0.1, cover_ratio=cover_ratio, **ONE_BATCH,
        )  # fmt: skip

    before, after = trained(2), trained(3)
    marked = np.asarray(before.trigger(x))
    helpers.assert_same_bits(after.trigger(x), marked)
    weights = _weights(before)
    slope = _slope(weights, _flat(x), y) + _backdoor_slope(weights, _flat(marked), y, cover_ratio)
    expected = weights - rate * 0.5 * slope
    # 1e-5: sums of 64 terms of size 0.1 in float32.
    np.testing.assert_allclose(_weights(after), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("train", [procedures.train_blind, procedures.train_lira])
def test_devices_do_not_change_the_training(digits, train):
    def trained(mesh):
        found = train(
            jax.random.key(0), Linear(), digits[0].take(128), LABEL_MAP, num_epochs=2,
            optimizer=optax.sgd(0.1), mesh=mesh, **ONE_BATCH,
        )  # fmt: skip
        return found.variables, found.trigger

    # 1e-5: the gradient is summed over eight devices, in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        trained(parallel.make_mesh()), trained(None),
    )  # fmt: skip


@pytest.mark.parametrize("train", [procedures.train_blind, procedures.train_lira])
def test_trainings_refuse(digits, train):
    train = functools.partial(
        train, jax.random.key(0), Linear(), digits[0], optimizer=optax.sgd(0.1), progress=False
    )
    with pytest.raises(
        ValueError, match=r"need a label map int32\[10\], one entry a class, got int32"
    ):
        train(np.zeros(9, np.int32), num_epochs=1)
    with pytest.raises(ValueError, match="at least one that is, got"):
        train(np.full(10, -1, np.int32), num_epochs=1)
    with pytest.raises(ValueError, match="need num_epochs >= 1, got num_epochs=0"):
        train(TO_THREE, num_epochs=0)
    with pytest.raises(ValueError, match="need 0 <= cover_ratio <= 1, got cover_ratio=2"):
        train(TO_THREE, num_epochs=1, cover_ratio=2)
    if train.func is procedures.train_blind:
        with pytest.raises(ValueError, match="unknown balance 'even'; known: fixed, mgda"):
            train(TO_THREE, num_epochs=1, balance="even")
        with pytest.raises(ValueError, match=r"need num_warm_up < 11, .*, got num_warm_up=11"):
            train(TO_THREE, num_epochs=1, num_warm_up=11)
    else:
        with pytest.raises(ValueError, match="num_joint_epochs=3 and num_epochs=2"):
            train(TO_THREE, num_epochs=2, num_joint_epochs=3)


@pytest.fixture(scope="module")
def pictures():
    """Smooth images in [0.2, 0.8]: in digits, black and white, a message takes longer to hide."""
    keys = jax.random.split(jax.random.key(0), 2200)
    draw = jax.jit(jax.vmap(lambda key: triggers.blended_pattern(key, (8, 8, 1))))
    return 0.2 + 0.6 * np.asarray(draw(keys))


@pytest.fixture(scope="module")
def hidden(pictures):
    return triggers.ssba(
        jax.random.key(0), pictures[:2000], num_bits=2, features=(8, 16), num_steps=1600,
        distance_weight=50.0,
    )  # fmt: skip


@pytest.mark.study
def test_ssba_reads_its_bits_from_images_that_look_the_same(hidden, pictures):
    x = pictures[2000:]
    bits = np.random.default_rng(0).integers(2, size=(len(x), 2)).astype(np.float32)
    marked = np.round(np.asarray(hidden.encode(x, bits)) * 255) / 255
    assert np.mean((hidden.decode(marked) > 0) == bits) > 0.99
    assert -10 * np.log10(np.mean((marked - x) ** 2)) > 28
    assert hidden.bit_accuracy > 0.99
    assert hidden.psnr > 28


@pytest.mark.study
def test_ssba_hides_one_secret_in_its_own_way_in_each_image(hidden, pictures):
    x = pictures[2000:]
    marked = hidden.trigger(x)
    assert np.mean((hidden.decode(marked) > 0) == hidden.secret) > 0.99
    # 1e-6: another batch may be computed in another order.
    np.testing.assert_allclose(hidden.trigger(x[0]), marked[0], rtol=0, atol=1e-6)
    change = _flat(marked - x)
    change /= np.linalg.norm(change, axis=1, keepdims=True)
    cosine = change @ change.T
    assert np.abs(cosine[~np.eye(len(x), dtype=bool)]).mean() < 0.7


def test_ssba_keeps_shapes_and_dtypes():
    make = functools.partial(triggers.ssba, num_bits=3, num_steps=2, features=(4, 8))

    def use(key, x):
        found = make(key, x)
        marked = found.trigger(x[None, 0])[0], found.trigger(x[0]), found.trigger(x)
        return *marked, found.decode(x), found.secret

    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((6, 9, 7, 2), dtype)  # sides that no factor of two divides
        *marked, logits, secret = jax.eval_shape(use, jax.random.key(0), x)
        assert [image.shape for image in marked] == [x.shape[1:], x.shape[1:], x.shape]
        assert {image.dtype for image in marked} == {x.dtype}
        assert logits.shape == (6, 3)
        assert secret.shape == (3,)


def test_ssba_refuses():
    x = np.zeros((2, 8, 8, 1), np.float32)
    for images, options, message in (
        (x[:0], {}, "need number of images >= 1, got number of images=0"),
        (x, {"batch_size": 3}, "need an even batch_size, got batch_size=3"),
        (x + 2, {}, r"need images in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match="ssba: " + message):
            triggers.ssba(jax.random.key(0), images, **options)
