"""Neural Cleanse: a planted trigger, its controller round by round, its errors."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

import advjax
from advjax import detectors
from advjax.detectors import masks
from tests import helpers
from tests.detectors.conftest import NUM_CLASSES, PATCH, SHAPE, TARGET

run = functools.partial(
    detectors.neural_cleanse, num_classes=NUM_CLASSES, num_steps=60, batch_size=20
)


@pytest.fixture(scope="module")
def found(planted, clean_images):
    return run(jax.random.key(0), planted(0), clean_images)


def test_finds_the_planted_trigger(found, planted, clean_images):
    details = jax.tree.map(np.asarray, found.details)
    assert int(found.target_label) == TARGET
    assert float(found.score) > 2  # the paper's bound
    assert details["is_found"].all()
    mask = details["masks"][TARGET]
    # A mask on one pixel of the patch is enough; a descent leaves a little elsewhere.
    assert mask[PATCH].sum() > 0.9 * mask.sum()
    np.testing.assert_allclose(details["norms"], details["masks"].sum((1, 2)), rtol=1e-5)
    for label in range(NUM_CLASSES):
        m, p = details["masks"][label][..., None], details["patterns"][label]
        answers = np.argmax(planted(0)(clean_images * (1 - m) + m * p), -1)
        assert details["success"][label] == pytest.approx(np.mean(answers == label))
    assert details["num_rounds"].max() <= 60
    assert details["num_images"] == 40


def test_anomaly_indices_against_numpy(found):
    norms = np.asarray(found.details["norms"], np.float64)
    median = np.median(norms)
    expected = (median - norms) / (1.4826 * np.median(np.abs(norms - median)))
    # float32: a difference of norms, over one of differences.
    np.testing.assert_allclose(found.details["anomaly_indices"], expected, rtol=1e-4, atol=1e-5)
    assert float(found.score) == pytest.approx(expected[norms.argmin()], rel=1e-4)
    assert norms.argmin() == found.target_label


@pytest.mark.parametrize("values", [[2.0, 2, 2, 2, 1], [0.0, 0, 0], [36.0, 36, 36, 36, 36, 1e-9]])
def test_no_deviation_is_no_nan(values):
    indices = np.asarray(detectors.anomaly_indices(jnp.array(values)))
    assert np.all(np.isfinite(indices))
    assert np.all(indices[np.array(values) == values[0]] == 0)
    if len(set(values)) > 1:
        assert indices[-1] > 1e3


def test_many_models_compile_once_and_side_by_side(found, planted, clean_images, counted):
    before = counted.num_traces
    other = run(jax.random.key(0), planted(1), clean_images)
    # The check of the number of classes looks at the shape of the logits: that is one trace.
    assert counted.num_traces == before + 1
    assert int(other.target_label) == TARGET
    program = jax.jit(jax.vmap(lambda logits_fn: run(jax.random.key(0), logits_fn, clean_images)))
    both = program(advjax.stack([planted(0), planted(1)]))
    np.testing.assert_array_equal(both.target_label, [TARGET, TARGET])
    # Batched and single matrix products round differently, and Adam's first steps are of full size
    # whatever the gradient.
    np.testing.assert_allclose(both.details["norms"][0], found.details["norms"], rtol=0.05)
    np.testing.assert_allclose(both.details["norms"][1], other.details["norms"], rtol=0.05)


def test_classes_one_after_the_other(found, planted, clean_images):
    alone = run(jax.random.key(0), planted(0), clean_images, class_batch=1)
    assert int(alone.target_label) == TARGET
    np.testing.assert_allclose(alone.details["norms"], found.details["norms"], rtol=0.05)


def test_a_class_that_is_never_reached_is_never_the_outlier(clean_images):
    """Class 0 has no way: its logit is the least whatever the image."""
    weights = jnp.asarray(np.concatenate([np.zeros((36, 1)), np.eye(36, 3)], 1), jnp.float32)
    search = functools.partial(detectors.neural_cleanse, num_classes=4, num_steps=40)
    given = lambda bias: Partial(helpers.linear, (weights, jnp.array(bias)))
    found = search(jax.random.key(0), given([-1.0, 0.0, 0.0, 0.0]), clean_images)
    assert not found.details["is_found"][0]
    assert found.details["norms"][0] == 36
    assert found.details["success"][0] == 0
    assert found.details["is_found"][1:].all()
    assert found.details["anomaly_indices"][0] == 0
    others = detectors.anomaly_indices(found.details["norms"][1:])
    np.testing.assert_allclose(found.details["anomaly_indices"][1:], others, rtol=1e-5)
    assert float(found.score) == pytest.approx(float(jnp.max(others)), rel=1e-5)
    assert int(found.target_label) == 1 + int(jnp.argmax(others))
    few = search(jax.random.key(0), given([-99.0, -99.0, 0.0, 0.0]), clean_images)
    assert few.details["is_found"].tolist() == [False, False, True, True]
    assert (int(few.target_label), float(few.score)) == (-1, 0)


def test_most_classes_not_found_make_no_outlier_of_the_others():
    """With six of ten norms at 1024 the deviation of all would be 0, and an index near 8e6."""
    norms = jnp.array([1024.0, 30, 1024, 40, 1024, 50, 1024, 60, 1024, 1024])
    is_found = norms < 1024
    indices = jax.jit(detectors.anomaly_indices)(norms, is_found)
    np.testing.assert_array_equal(indices[is_found], detectors.anomaly_indices(norms[is_found]))
    assert float(jnp.max(indices)) < 2
    np.testing.assert_array_equal(indices[~is_found], 0)
    np.testing.assert_array_equal(detectors.anomaly_indices(norms, norms < 50), 0)
    everywhere = detectors.anomaly_indices(norms, jnp.ones(10, bool))
    np.testing.assert_array_equal(everywhere, detectors.anomaly_indices(norms))


@pytest.mark.parametrize("num_lost", [1, 4])
def test_a_model_without_answers_is_an_error(num_lost, clean_images):
    bias = jnp.array([jnp.nan] * num_lost + [0.0] * (4 - num_lost))
    zoo = types.SimpleNamespace(
        names=["lost"], attacks=["clean"], labels=[0], targets=[-1],
        classifier=lambda _: lambda x: jnp.zeros((len(x), 4)) + bias,
    )  # fmt: skip
    cleanse = functools.partial(detectors.neural_cleanse, num_classes=4, num_steps=2)
    found = cleanse(jax.random.key(0), zoo.classifier(0), clean_images)
    assert np.isnan(found.score)
    assert int(found.target_label) == -1
    verdict = detectors.judge(jax.random.key(0), zoo, 0, "cleanse", cleanse, clean_images)
    assert (verdict.score, verdict.error) == (None, "the score is nan")


def controller(rounds, *, initial, multiplier, patience, threshold, ratio, stall_patience):
    """The authors' rules, with their two counters of success; yields the state of each round."""
    weight, best, previous_best = 0.0, np.inf, np.inf
    set_counter = up_counter = down_counter = stalled = 0
    up = down = False
    for success, norm in rounds:
        if success >= threshold and norm < best:
            best = norm
        if best < np.inf:
            stalled = stalled + 1 if best >= ratio * previous_best else 0
        previous_best = min(best, previous_best)
        is_done = up and down and stalled >= stall_patience
        if weight == 0 and success >= threshold:
            set_counter += 1
            if set_counter >= patience:
                weight, up_counter, down_counter, up, down = initial, 0, 0, False, False
        else:
            set_counter = 0
        up_counter, down_counter = (
            (up_counter + 1, 0) if success >= threshold else (0, down_counter + 1)
        )
        if up_counter >= patience:
            up_counter, weight, up = 0, weight * multiplier, True
        elif down_counter >= patience:
            down_counter, weight, down = 0, weight / multiplier**1.5, True
        yield weight, up, down, best, is_done


def test_too_few_values():
    with pytest.raises(ValueError, match="anomaly_indices: need at least 3 values, got shape"):
        detectors.anomaly_indices(jnp.ones(2))
    assert np.all(np.isfinite(detectors.anomaly_indices(np.array([1, 2, 3]))))


ROUNDS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.2, 0.4, 0.5, 0.6])),
    min_size=30, max_size=30,
)  # fmt: skip


@jax.jit
def follow(successes, norms, controls):
    """The module's own controller, on masks of one pixel."""

    def step(search, given):
        success, norm = given
        raw = masks._Trigger(jnp.arctanh(2 * norm - 1).reshape(1, 1), jnp.zeros((1, 1, 1)))
        search = masks._keep_best(search._replace(raw=raw), success, controls)
        search = masks._next_weight(search, success, controls)
        return search, (
            search.weight, search.was_raised, search.was_lowered, search.best_norm, search.is_done,
        )  # fmt: skip

    raw = masks._Trigger(jnp.zeros((1, 1)), jnp.zeros((1, 1, 1)))
    none, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    start = masks._Search(
        none, raw, optax.EmptyState(), jnp.zeros(()), none, none, no, no, raw, jnp.asarray(jnp.inf),
        none, no,
    )  # fmt: skip
    return jax.lax.scan(step, start, (successes, norms))[1]


@given(ROUNDS, st.integers(1, 3), st.sampled_from([0.9, 1.0]))
def test_the_controller_is_the_authors(rounds, patience, ratio):
    options = dict(initial=1e-3, multiplier=2.0, patience=patience, threshold=0.99)
    expected = list(controller(rounds, **options, ratio=ratio, stall_patience=4))
    successes, norms = (jnp.array(column) for column in zip(*rounds, strict=True))
    controls = masks._Controls(0.1, 1e-3, 2.0, patience, 0.99, ratio, 4)
    actual = follow(successes, norms, controls)
    for got, want in zip(actual, zip(*expected, strict=True), strict=True):
        # The norm goes through arctanh and tanh in float32.
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-5)


def test_bad_input(planted, clean_images):
    logits_fn, key = planted(0), jax.random.key(0)
    for x, options, message in (
        (clean_images, {"num_classes": 7}, "neural_cleanse: need num_classes=5, as many as"),
        (clean_images, {"num_classes": 2}, "neural_cleanse: need num_classes >= 3, got"),
        (np.zeros((2, *SHAPE), np.uint8), {}, "need float images in"),
        (clean_images[:0], {}, "need at least one clean image, got none"),
        (clean_images[..., 0], {}, "need images of shape"),
        (clean_images, {"multiplier": 1.0}, "need multiplier > 1, got multiplier=1.0"),
        (clean_images, {"num_steps": 0}, "need num_steps >= 1"),
        (clean_images, {"class_batch": 0}, "need class_batch >= 1"),
        (clean_images, {"learning_rate": -1.0}, "need a finite learning_rate >= 0"),
        (clean_images, {"y": np.full(40, 9, np.int32)}, "need labels in 0 ... 4, got 9 ... 9"),
    ):
        with pytest.raises(ValueError, match=message):
            run(key, logits_fn, x, **options)
