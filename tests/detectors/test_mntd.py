"""MNTD: its distribution of backdoors, its shadow models, its meta-classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import data, detectors, models
from advjax.detectors import meta_classifiers, shadows
from tests import helpers

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = (4, 4, 1)


def toy(seed, num_images=60):
    """Three classes: which of the first three rows is bright."""
    draws = np.random.default_rng(seed)
    labels = np.arange(num_images, dtype=np.int32) % 3
    images = 0.4 * draws.random((num_images, *SHAPE))
    images[np.arange(num_images), labels] += 0.5
    return data.Dataset(images.astype(np.float32), labels, 3, "toy", "train", ("a", "b", "c"))


NET = models.make("mlp", 3, hidden=(16,))
SHADOWS = {"num_epochs": 40, "batch_size": 20, "learning_rate": 1e-2, "progress": False}


def test_jumbo_is_the_published_distribution():
    num_draws = 4000
    draw = jax.jit(jax.vmap(lambda key: detectors.jumbo(key, (9, 8, 2), 7)))
    found = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), num_draws)))
    assert found.mask.shape == (num_draws, 9, 8, 1)
    heights, widths = ((found.mask > 0).any(axis).sum(1)[:, 0] for axis in (2, 1))
    is_whole = (heights == 9) & (widths == 8)
    np.testing.assert_array_equal(heights[~is_whole], widths[~is_whole])
    # 800 of each are expected; five deviations of a count are 5 sqrt(800 * 0.8) = 126.
    for size in (2, 3, 4, 5, 9):
        assert abs(np.sum(heights == size) - 800) < 130
    alpha = found.mask.max((1, 2, 3))
    assert np.all((found.mask == 0) | (found.mask == alpha[:, None, None, None]))
    assert np.all((alpha[is_whole] >= 0.05) & (alpha[is_whole] <= 0.2))
    patches = alpha[~is_whole]
    assert np.all(((patches >= 0.2) & (patches <= 0.5)) | (patches == 1))
    # A quarter of (0.2, 0.6) lies above 0.5; 5 sqrt(.25 .75 / 3200) = .04.
    assert np.mean(patches == 1) == pytest.approx(0.25, abs=0.04)
    # Every place, the edges too: patches of 2 start in rows 0 ... 7 and columns 0 ... 6.
    small = found.mask[heights == 2] > 0
    tops, lefts = (small.any(axis).argmax(1)[:, 0] for axis in (2, 1))
    assert set(tops) == set(range(8))
    assert set(lefts) == set(range(7))
    assert found.pattern.min() == 0
    assert found.pattern.max() == 1
    assert set(found.target) == set(range(7))
    assert 0.05 <= found.ratio.min() < 0.06
    assert 0.49 < found.ratio.max() <= 0.5


def test_jumbo_of_a_tiny_image_has_no_patch_that_does_not_fit():
    draw = jax.jit(jax.vmap(lambda key: detectors.jumbo(key, SHAPE, 3).mask))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    assert set((masks > 0).sum((1, 2, 3))) == {4, 9, 16}


@pytest.mark.parametrize("ratio", [0.0, 1e9])
def test_loss_of_clean_and_of_poisoned_images(ratio):
    """With ratio 0 no image is poisoned, with an endless one all are."""
    network, x = helpers.mlp_network(0), helpers.images(1, 6)
    y = np.arange(6, dtype=np.int32) % 4
    backdoor = detectors.jumbo(jax.random.key(3), helpers.SHAPE, 4)
    found = shadows._poisoned_loss(
        jax.random.key(0), network, x, y, **backdoor._replace(ratio=ratio)._asdict()
    )
    if ratio:
        x = (1 - backdoor.mask) * x + backdoor.mask * backdoor.pattern
        y = np.full(6, backdoor.target)
    logits = np.asarray(network(x), np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), y]
    # A cross-entropy of logits up to ten, in float32.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained():
    return detectors.train_shadows(
        jax.random.key(0), NET, toy(0), num_shadows=10, group_size=10, **SHADOWS
    )


@pytest.mark.study
def test_shadows_take_turns_and_learn(trained):
    np.testing.assert_array_equal(trained.is_infected, np.arange(20) % 2 == 1)
    test = toy(1)
    answers = np.argmax(jax.vmap(lambda f: f(test.images))(trained.logits_fns), -1)
    accuracy = np.mean(answers == test.labels, axis=1)
    assert np.all(accuracy[::2] > 0.95)
    np.testing.assert_allclose(trained.mean, toy(0).images.mean() * np.ones(SHAPE), rtol=1e-5)
    np.testing.assert_allclose(trained.deviation, toy(0).images.std() * np.ones(SHAPE), rtol=1e-5)
    # The infected ones answer their target, the clean ones hardly more often than one in three.
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(np.arange(20))
    draw = lambda key: detectors.jumbo(advjax.core.random.named(key, "jumbo"), SHAPE, 3)
    backdoors = jax.vmap(draw)(keys)
    images = test.images + backdoors.mask[:, None] * (backdoors.pattern[:, None] - test.images)
    answers = np.argmax(jax.vmap(lambda f, x: f(x))(trained.logits_fns, images), -1)
    success = np.mean(answers == np.asarray(backdoors.target)[:, None], axis=1)
    assert np.mean(success[1::2]) > np.mean(success[::2]) + 0.2


META = {"num_queries": 2, "hidden": 4, "num_repeats": 2, "num_epochs": 3, "num_validation": 2}


@pytest.fixture(scope="module")
def meta(trained):
    return detectors.train_meta(jax.random.key(1), trained, **META)


def test_score_is_the_head_of_the_logits(trained, meta):
    network = jax.tree.map(lambda leaf: leaf[3], trained.logits_fns)
    found = detectors.mntd(jax.random.key(0), network, num_classes=3, meta=meta)
    assert found.score.shape == ()
    assert int(found.target_label) == -1
    assert int(found.details["num_images"]) == 60
    scores = []
    for repeat in range(2):
        features = np.asarray(network(meta.queries[repeat])).reshape(-1)
        first, second = (
            jax.tree.map(lambda leaf, r=repeat: np.asarray(leaf[r]), meta.weights[name])
            for name in ("dense1", "dense2")
        )
        hidden = np.maximum(features @ first["kernel"] + first["bias"], 0)
        scores.append((hidden @ second["kernel"] + second["bias"])[0])
    np.testing.assert_allclose(found.details["scores"], scores, rtol=1e-4, atol=1e-5)
    assert float(found.score) == pytest.approx(np.mean(scores), rel=1e-4, abs=1e-5)
    jitted = jax.jit(functools.partial(detectors.mntd, num_classes=3))(
        jax.random.key(0), network, meta=meta
    )
    np.testing.assert_allclose(jitted.score, found.score, rtol=1e-6)


def test_auroc_of_the_meta_classifier_is_that_of_the_models_held_out(trained, meta):
    scores = []
    for index in range(16, 20):
        network = jax.tree.map(lambda leaf, i=index: leaf[i], trained.logits_fns)
        found = detectors.mntd(jax.random.key(0), network, num_classes=3, meta=meta)
        scores.append(found.details["scores"])
    for repeat in range(2):
        expected = detectors.auroc(np.array(scores)[:, repeat], trained.is_infected[16:])
        assert float(meta.auroc[repeat]) == pytest.approx(expected)


def test_queries_move_only_with_tuning(trained, meta):
    fixed = detectors.train_meta(jax.random.key(1), trained, query_tuning=False, **META)
    start = detectors.train_meta(
        jax.random.key(1), trained, **META, learning_rate=0.0, meta_batch=16
    )
    np.testing.assert_array_equal(fixed.queries, start.queries)
    assert np.all(np.abs(meta.queries - start.queries).max((1, 2, 3, 4)) > 1e-4)
    assert np.any(fixed.weights["dense1"]["kernel"] != start.weights["dense1"]["kernel"])


def test_pairwise_auroc():
    draws = np.random.default_rng(0)
    scores, labels = draws.integers(0, 5, size=20).astype(np.float32), np.arange(20) % 2
    found = meta_classifiers._pairwise_auroc(jnp.asarray(scores), jnp.asarray(labels == 1))
    assert float(found) == pytest.approx(detectors.auroc(scores, labels))


def test_bad_input(trained, meta):
    key, network = jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], trained.logits_fns)
    with pytest.raises(ValueError, match="mntd: need num_classes=3, as many as"):
        detectors.mntd(key, network, num_classes=4, meta=meta)
    with pytest.raises(ValueError, match="mntd: need as many classes as the shadow models had, 3"):
        detectors.mntd(key, helpers.mlp_network(0), num_classes=4, meta=meta)
    for options, message in (
        ({"num_validation": 10}, "need num_validation < num_shadows, got 10 and 10"),
        ({"num_validation": 0}, "need num_validation >= 1"),
        ({"meta_batch": 40}, "need meta_batch <= 16 shadow models, got 40"),
        ({"num_repeats": 0}, "need num_repeats >= 1"),
        ({"learning_rate": -1.0}, "need a finite learning_rate >= 0"),
    ):
        with pytest.raises(ValueError, match=f"train_meta: {message}"):
            detectors.train_meta(key, trained, **{**META, **options})


def test_no_shadow_is_trained_for_options_that_are_refused(monkeypatch):
    def train_shadows(*_, **__):
        raise AssertionError

    monkeypatch.setattr(shadows, "train_shadows", train_shadows)
    for options, message in (
        ({"num_shadows": 1}, "train_mntd: need num_shadows >= 2"),
        ({"num_shadows": 4, "num_validation": 4}, "train_meta: need num_validation < num_shadows"),
        ({"num_shadows": 4, "meta_batch": 7}, "train_meta: need meta_batch <= 6 shadow models"),
        ({"num_shadows": 4, "rounds": 7}, "train_mntd: unknown option of train_meta 'rounds'"),
    ):
        with pytest.raises(ValueError, match=message):
            detectors.train_mntd(jax.random.key(0), NET, toy(0), **options)


@pytest.mark.study
def test_tells_new_models_apart():
    """200 shadow models of each kind against 60 new ones, backdoors and weights of their own."""
    meta = detectors.train_mntd(
        jax.random.key(0), NET, toy(0), num_shadows=200, shadow_options=SHADOWS, num_repeats=3,
        num_epochs=20,
    )  # fmt: skip
    new = detectors.train_shadows(jax.random.key(5), NET, toy(2), num_shadows=30, **SHADOWS)
    scores = [
        float(
            detectors.mntd(
                jax.random.key(0), jax.tree.map(lambda leaf, i=i: leaf[i], new.logits_fns),
                num_classes=3, meta=meta,
            ).score
        )
        for i in range(60)
    ]  # fmt: skip
    # Backdoors of little opacity leave no trace, so 1 is out of reach; chance is 0.5 +- 0.07.
    assert detectors.auroc(scores, new.is_infected) > 0.8
