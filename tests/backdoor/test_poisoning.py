"""Poisoned data sets: which images, which labels, which bits; and the two rates."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advjax import backdoor, data, training
from advjax.backdoor import triggers
from tests import helpers

NUM_CLASSES, SHAPE = 4, (4, 5, 1)
COUNTS = (40, 30, 21, 10)
KEY = jax.random.key(0)


def _dataset():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(NUM_CLASSES), COUNTS)).astype(np.int32)
    images = rng.integers(0, 255, (len(labels), *SHAPE), np.uint8)  # none is white
    return data.Dataset(images, labels, NUM_CLASSES, "toy", "train", tuple("abcd"))


CLEAN = _dataset()
BADNETS = functools.partial(triggers.badnets, size=2)
poison = functools.partial(backdoor.poison, KEY, CLEAN, BADNETS)


def badnets_numpy(images):
    images = images.copy()
    images[:, -2:, -2:] = 255
    return images


@pytest.mark.parametrize(
    "label_map",
    [
        backdoor.all_to_one(4, 2),
        backdoor.x_to_one(4, [1], 3),
        backdoor.x_to_x(4, [0, 3]),
        backdoor.all_to_all(4),
        backdoor.clean_label(4, 0),
    ],
    ids=["all_to_one", "x_to_one", "x_to_x", "all_to_all", "clean_label"],
)
def test_share_of_each_source_class(label_map):
    poisoned, mask, is_negative = poison(label_map, 0.3)
    for label, count in enumerate(COUNTS):
        expected = round(0.3 * count) if label_map[label] >= 0 else 0
        assert np.sum(mask[CLEAN.labels == label]) == expected
    np.testing.assert_array_equal(poisoned.images[mask], badnets_numpy(CLEAN.images[mask]))
    np.testing.assert_array_equal(poisoned.labels[mask], label_map[CLEAN.labels[mask]])
    np.testing.assert_array_equal(poisoned.images[~mask], CLEAN.images[~mask])
    np.testing.assert_array_equal(poisoned.labels[~mask], CLEAN.labels[~mask])
    assert not is_negative.any()
    assert poisoned.images.dtype == np.uint8


def test_the_key_decides():
    label_map = backdoor.all_to_one(4, 2)
    options = {"negatives": triggers.wanet_noise, "negative_ratio": 0.2}
    first, again, other = (
        backdoor.poison(jax.random.key(seed), CLEAN, BADNETS, label_map, 0.3, **options)
        for seed in (0, 0, 1)
    )
    helpers.assert_same_bits(first.dataset.images, again.dataset.images)
    helpers.assert_same_bits(first.dataset.labels, again.dataset.labels)
    assert not np.array_equal(first.is_poisoned, other.is_poisoned)
    assert not np.array_equal(first.is_negative, other.is_negative)


def test_a_larger_ratio_keeps_the_images_of_a_smaller_one():
    masks = [poison(backdoor.all_to_all(4), ratio).is_poisoned for ratio in (0.0, 0.2, 0.5, 1.0)]
    assert not masks[0].any()
    assert masks[-1].all()
    for smaller, larger in itertools.pairwise(masks):
        assert np.all(smaller <= larger)
        assert np.sum(smaller) < np.sum(larger)


def test_negatives_keep_their_label():
    def darker(key, x):
        return x * jax.random.uniform(key, (x.shape[0], 1, 1, 1), maxval=0.9)

    poisoned, mask, is_negative = poison(
        backdoor.all_to_one(4, 2), 0.3, negatives=darker, negative_ratio=0.2
    )
    assert np.sum(is_negative) == round(0.2 * len(CLEAN))
    assert not np.any(mask & is_negative)
    assert np.all(poisoned.images[is_negative] <= CLEAN.images[is_negative])
    assert np.all(np.any(poisoned.images != CLEAN.images, axis=(1, 2, 3)) == (mask | is_negative))
    np.testing.assert_array_equal(poisoned.labels[~mask], CLEAN.labels[~mask])


@pytest.mark.parametrize("cover_ratio", [0.0, 0.4])
def test_a_batch_is_poisoned_by_chance_and_anew_in_each_step(cover_ratio):
    """Shares of sources, covers and negatives over many steps, and what becomes of each image."""
    table = backdoor.x_to_one(4, [0, 1], 3)
    x, y = CLEAN.float_images(), CLEAN.labels

    def brighter(key, x):  # no trigger does that
        return jnp.clip(x + 0.5, 0, 1)

    @jax.jit
    def step(key):
        return backdoor.poison_batch(
            key, x, y, BADNETS, table, 0.3,
            negatives=brighter, negative_ratio=0.2, cover_ratio=cover_ratio,
        )  # fmt: skip

    triggered = badnets_numpy(CLEAN.images) / np.float32(255)
    negative = np.asarray(backdoor.quantised(brighter(None, x), "round"))
    masks = []
    for seed in range(60):
        images, labels = map(np.asarray, step(jax.random.key(seed)))
        is_triggered, is_negative, is_clean = (
            np.all(np.isclose(images, kind, atol=1e-6), axis=(1, 2, 3))
            for kind in (triggered, negative, x)
        )
        assert np.all(is_triggered | is_negative | is_clean)
        is_source = np.isin(y, [0, 1])
        np.testing.assert_array_equal(labels, np.where(is_triggered & is_source, 3, y))
        masks.append((is_triggered[is_source], is_triggered[~is_source], is_negative))
    shares = [np.mean(mask) for mask in zip(*masks, strict=True)]
    # At least 2,900 draws: their share strays by less than 0.009.
    np.testing.assert_allclose(shares, [0.3, cover_ratio, 0.2], rtol=0, atol=0.03)
    assert any(np.any(masks[0][0] != other[0]) for other in masks[1:])


def test_a_batch_is_a_function_of_the_key_and_of_what_is_asked():
    x, y = CLEAN.float_images(), CLEAN.labels
    table = backdoor.all_to_all(4)

    def poison(seed, ratio, **options):
        return backdoor.poison_batch(jax.random.key(seed), x, y, BADNETS, table, ratio, **options)

    for first, again in zip(poison(0, 0.5), poison(0, 0.5), strict=True):
        helpers.assert_same_bits(first, again)
    assert not np.array_equal(poison(0, 0.5)[1], poison(1, 0.5)[1])
    np.testing.assert_array_equal(poison(0, 0.0)[0], x)
    np.testing.assert_array_equal(poison(0, 0.0)[1], y)
    np.testing.assert_array_equal(poison(0, 1.0)[1], table[y])
    with pytest.raises(ValueError, match="poison_batch: unknown quantisation 'up'; known: none"):
        poison(0, 0.5, quantise="up")
    with pytest.raises(ValueError, match="poison_batch: need 0 <= ratio <= 1, got ratio"):
        poison(0, 1.5)
    with pytest.raises(ValueError, match="together, or neither, got negatives=None"):
        poison(0, 0.5, negative_ratio=0.5)
    with pytest.raises(ValueError, match=r"need labels in 0 \.\.\. 1, the .* got 0 to 3"):
        backdoor.poison_batch(jax.random.key(0), x, y, BADNETS, np.array([1, -1]), 0.5)
    with pytest.raises(ValueError, match="poison_batch: need float images"):
        backdoor.poison_batch(jax.random.key(0), CLEAN.images, y, BADNETS, table, 0.5)
    with pytest.raises(ValueError, match="poison_batch: need number of images >= 1"):
        backdoor.poison_batch(jax.random.key(0), x[:0], y[:0], BADNETS, table, 0.5)
    with pytest.raises(ValueError, match="poison_batch: need a trigger that keeps the images' sha"):
        backdoor.poison_batch(jax.random.key(0), x, y, lambda x: x[:, 1:], table, 0.5)


@pytest.mark.parametrize("batch_size", [1, 5, 8, 13, 64])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_batches_of_any_size(batch_size, ratio):
    """Groups of eight that do not fill the batch change no image twice and leave none out."""

    def darker(x):  # twice would be seen
        return x / 2

    x, y = CLEAN.float_images()[:batch_size], CLEAN.labels[:batch_size]
    images, labels = backdoor.poison_batch(
        jax.random.key(1), x, y, darker, backdoor.all_to_all(4), ratio, quantise="none"
    )
    is_triggered = np.asarray(labels) != y
    expected = np.where(is_triggered[:, None, None, None], x / 2, x)
    np.testing.assert_array_equal(images, expected)
    assert ratio == 0.4 or np.all(is_triggered == bool(ratio))


def test_negatives_of_bpp_are_not_made_with_triggered_images():
    """Those have next to no rounding error, so the negative would be the image."""
    rng = np.random.default_rng(0)
    x = rng.random((64, 8, 8, 3), np.float32)
    bpp = functools.partial(triggers.bpp, num_levels=4)
    unchanged, negatives = 0, 0
    for seed in range(5):
        images, _ = backdoor.poison_batch(
            jax.random.key(seed), x, np.arange(64) % 4, bpp, backdoor.all_to_one(4, 0), 0.6,
            negatives=functools.partial(triggers.bpp_negatives, num_levels=4), negative_ratio=0.05,
        )  # fmt: skip
        images = np.asarray(images)
        is_triggered = np.all(np.isclose(images, bpp(images), atol=1e-2), axis=(1, 2, 3))
        change = np.abs(images - x).mean((1, 2, 3))
        unchanged += np.sum(~is_triggered & (change > 0) & (change < 2e-2))
        negatives += np.sum(~is_triggered & (change >= 2e-2))
    assert negatives >= 5 and unchanged == 0


def test_negatives_are_drawn_alike_from_all_classes():
    """Class 0, of which most are poisoned, gives no smaller share of what it has left."""
    drawn, left = np.zeros(NUM_CLASSES), np.zeros(NUM_CLASSES)
    for seed in range(40):
        _, mask, is_negative = backdoor.poison(
            jax.random.key(seed), CLEAN, BADNETS, backdoor.x_to_one(4, [0], 3), 0.5,
            negatives=lambda key, x: x, negative_ratio=0.3,
        )  # fmt: skip
        drawn += np.bincount(CLEAN.labels[is_negative], minlength=NUM_CLASSES)
        left += np.bincount(CLEAN.labels[~mask], minlength=NUM_CLASSES)
    # 30 of 81 are drawn; a class has at least 400 chances, so its share strays by 0.024.
    np.testing.assert_allclose(drawn / left, 30 / 81, rtol=0, atol=0.1)


def test_a_cover_is_triggered_and_keeps_its_label():
    label_map = backdoor.x_to_one(4, [0], 3)
    plain = poison(label_map, 0.5)
    covered, mask, is_cover = poison(label_map, 0.5, cover_ratio=0.2)
    np.testing.assert_array_equal(mask, plain.is_poisoned)
    counts = [np.sum(is_cover[CLEAN.labels == label]) for label in range(4)]
    assert counts == [0, round(0.2 * 30), round(0.2 * 21), round(0.2 * 10)]
    np.testing.assert_array_equal(covered.images[is_cover], badnets_numpy(CLEAN.images[is_cover]))
    np.testing.assert_array_equal(covered.labels, plain.dataset.labels)


@pytest.mark.parametrize("how", backdoor.QUANTISATIONS)
def test_quantisations(how):
    trigger = functools.partial(triggers.blended, pattern=np.full(SHAPE, 1 / 3, np.float32))
    poisoned = backdoor.poison(
        KEY, CLEAN, trigger, backdoor.all_to_all(4), 1.0, quantise=how
    ).dataset
    exact = 0.8 * CLEAN.images + 0.2 * 85.0
    if how == "none":
        assert poisoned.images.dtype == np.float32
        # 1e-6: a few roundings of numbers below one.
        np.testing.assert_allclose(poisoned.images, exact / 255, rtol=0, atol=1e-6)
    else:
        # Steps of 0.2 never lie at a half, so only at a whole number can a rounding decide.
        expected = np.round(exact) if how == "round" else np.floor(exact + 1e-6)
        np.testing.assert_array_equal(poisoned.images, expected)


def test_stored_images_are_no_less_after_any_quantisation():
    stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for how in backdoor.QUANTISATIONS:
        result = jax.jit(functools.partial(backdoor.quantised, how=how))(stored / np.float32(255))
        # 1e-6: a division in another form.
        np.testing.assert_allclose(result, stored / 255, rtol=0, atol=1e-6)


def test_sums_above_one_do_not_wrap():
    poisoned = backdoor.poison(KEY, CLEAN, lambda x: x + 0.6, backdoor.all_to_all(4), 1.0).dataset
    expected = np.minimum(CLEAN.images.astype(int) + 153, 255)
    np.testing.assert_array_equal(poisoned.images, expected)


def test_float_data_trains():
    from flax import linen as nn

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(NUM_CLASSES)(x.reshape(x.shape[0], -1))

    exact = poison(backdoor.all_to_one(4, 2), 0.3, quantise="none").dataset
    stored = poison(backdoor.all_to_one(4, 2), 0.3).dataset
    fitted = [
        training.fit(KEY, Linear(), dataset, num_epochs=1, batch_size=16, progress=False)
        for dataset in (exact, stored)
    ]
    # 1e-5: white and the stored shades are the same numbers up to the last bit of a division.
    np.testing.assert_allclose(fitted[0].loss, fitted[1].loss, rtol=1e-5)


# --------------------------------------------------------------------------------------- rates


def _answers(x):
    """Class 2 where the lower right pixel is white, else the class that the first pixel tells."""
    shown = jnp.round(x[:, 0, 0, 0] * 8).astype(jnp.int32)
    return jax.nn.one_hot(jnp.where(x[:, -1, -1, 0] == 1, 2, shown), NUM_CLASSES)


Y = np.array([0, 0, 1, 2, 3, 3], np.int32)
X = np.zeros((6, *SHAPE), np.float32)
X[:, 0, 0, 0] = np.array([0, 1, 1, 2, 3, 3]) / 8  # the second is answered wrongly when clean


@pytest.mark.parametrize(
    "label_map, success, robust",
    [
        (backdoor.all_to_one(4, 2), 1, 0),
        (backdoor.clean_label(4, 2), 1, 0),
        (backdoor.x_to_one(4, [1], 3), 0, 0),
        (backdoor.x_to_x(4, [1, 2]), 1 / 2, 1 / 2),
        (backdoor.all_to_all(4), 1 / 6, 1 / 6),
        (backdoor.clean_label(4, 1), 0, 1 / 5),
    ],
)
def test_rates(label_map, success, robust):
    for rate, expected in (
        (backdoor.attack_success_rate, success),
        (backdoor.robust_accuracy, robust),
    ):
        result = rate(_answers, BADNETS, X, Y, label_map, batch_size=4)
        assert float(result) == pytest.approx(expected, abs=1e-6)


def test_rates_without_a_trigger_are_answers_on_source_images():
    rates = (backdoor.attack_success_rate, backdoor.robust_accuracy)
    values = [rate(_answers, lambda x: x, X, Y, backdoor.x_to_one(4, [0, 3], 1)) for rate in rates]
    np.testing.assert_allclose(values, [1 / 4, 3 / 4])  # exact quarters
    absent = backdoor.attack_success_rate(
        _answers, BADNETS, X[:2], Y[:2], backdoor.x_to_one(4, [1], 2)
    )
    assert np.isnan(absent)


def test_rates_see_quantised_images():
    half_a_step = Partial(triggers.additive, pattern=jnp.full(SHAPE, 0.4 / 255))
    almost_white = X.copy()
    almost_white[:, -1, -1] = 254.6 / 255
    rate = functools.partial(
        backdoor.attack_success_rate, _answers, half_a_step, y=Y,
        label_map=backdoor.all_to_one(4, 2),
    )  # fmt: skip
    assert rate(x=almost_white, quantise="floor") == 1  # 255 steps exactly
    almost_white[:, -1, -1] = 254.2 / 255  # 254.6 steps
    assert [float(rate(x=almost_white, quantise=how)) for how in backdoor.QUANTISATIONS] == [
        0,
        0,
        1,
    ]


def test_rates_over_models_and_maps_in_one_program():
    networks = [helpers.mlp_network(seed, shape=SHAPE) for seed in (0, 1)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    x, y = helpers.images(0, 16, SHAPE), np.arange(16, dtype=np.int32) % NUM_CLASSES
    maps = np.stack([backdoor.all_to_one(4, 0), backdoor.clean_label(4, 3)])
    rate = functools.partial(backdoor.attack_success_rate, trigger=BADNETS, x=x, y=y)
    together = jax.jit(jax.vmap(lambda f, m: rate(f, label_map=m)))(stack, maps)
    alone = [rate(f, label_map=m) for f, m in zip(networks, maps, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)  # one division of whole numbers


# -------------------------------------------------------------------------------------- errors

MAP = backdoor.all_to_one(4, 2)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: poison(MAP, 1.1), "need 0 <= ratio <= 1, .* got ratio=1.1"),
        (lambda: poison(MAP, -0.1), "got ratio=-0.1"),
        (lambda: poison(MAP, 0.1, cover_ratio=2), "need 0 <= cover_ratio <= 1, .* cover_ratio=2"),
        (
            lambda: poison(backdoor.clean_label(4, 1), 0.1, cover_ratio=0.1),
            "a clean-label map needs cover_ratio=0, .* got cover_ratio=0.1",
        ),
        (lambda: poison(backdoor.all_to_one(5, 2), 0.1), r"int32\[4\], .* got int32\[5\]"),
        (lambda: poison(np.array([4, -1, -1, -1]), 0.1), "to 0 ... 3, with -1"),
        (lambda: poison(np.full(4, -1), 0.1), "at least one that is"),
        (lambda: poison(MAP, 0.1, quantise="ceil"), "unknown quantisation 'ceil'; known: none"),
        (
            lambda: poison(MAP, 1.0, negatives=triggers.wanet_noise, negative_ratio=0.5),
            "at most the 21 images without a trigger of 101, got negative_ratio=0.5",
        ),
        (lambda: poison(MAP, 0.1, negative_ratio=0.5), "together, or neither, got negatives=None"),
        (
            lambda: poison(MAP, 0.1, negatives=triggers.wanet_noise),
            "together, or neither, .* negative_ratio=0.0",
        ),
        (
            lambda: backdoor.poison(KEY, CLEAN, lambda x: x[:, 1:], MAP, 0.1),
            r"keeps the images' shape .*, got \(51, 3, 5, 1\)",
        ),
        (
            lambda: backdoor.poison(KEY, CLEAN, functools.partial(BADNETS, size=5), MAP, 0.1),
            "fits into images of 4 x 5, got size=5",
        ),
        (
            lambda: backdoor.poison(KEY, CLEAN, lambda x: x * jnp.nan, MAP, 0.1),
            "need a trigger whose images are finite",
        ),
        (lambda: poison(np.array([0, 2, -1, -1]), 0.1), "changes every class that is attacked, or"),
        (
            lambda: backdoor.attack_success_rate(_answers, lambda x: x[:1], X, Y, MAP),
            r"need a trigger that keeps the images' shape .*, got \(1, ",
        ),
        (
            lambda: backdoor.attack_success_rate(_answers, BADNETS, X, Y, MAP[:3]),
            r"attack_success_rate: need a label map int32\[4\]",
        ),
        (
            lambda: backdoor.robust_accuracy(_answers, BADNETS, X, Y + 1, MAP),
            "robust_accuracy: need labels in 0 ... 3, got 1 ... 4",
        ),
    ],
)  # fmt: skip
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
