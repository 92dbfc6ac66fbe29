"""What is read off scores: against scikit-learn, and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from advjax import detectors

# Few levels, so that there are ties.
SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


def labelled(clean, infected):
    return np.array([*clean, *infected], float), np.repeat([0, 1], [len(clean), len(infected)])


@given(SCORES, SCORES)
def test_against_scikit_learn(clean, infected):
    scores, labels = labelled(clean, infected)
    assert detectors.auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores))
    false_alarms, hits, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(
        detectors.roc_curve(scores, labels), np.stack([false_alarms, hits], 1), atol=1e-12
    )


@given(SCORES, SCORES)
def test_threshold_is_the_highest_of_the_best_midpoints(clean, infected):
    scores, labels = labelled(clean, infected)
    found = detectors.threshold(scores, labels)
    levels = sorted(set(scores))
    midpoints = [(a + b) / 2 for a, b in itertools.pairwise(levels)] or levels
    f1 = {m: metrics.f1_score(labels, scores >= m) for m in midpoints}
    assert found == max(m for m in midpoints if f1[m] == pytest.approx(max(f1.values())))
    assert detectors.accuracy(scores, labels, found) == pytest.approx(
        metrics.accuracy_score(labels, scores >= found)
    )


def test_interval_is_the_bootstrap_s():
    draws = np.random.default_rng(0)
    scores, labels = labelled(draws.normal(size=30), draws.normal(1, size=20))
    low, high = detectors.auroc_interval(scores, labels, num_resamples=4000)
    areas = [
        np.mean(draws.choice(scores[:30], 30) < draws.choice(scores[30:], (20, 1)))
        for _ in range(4000)
    ]
    # Two bootstraps of thousands: their 2.5 % quantiles differ by about a hundredth.
    np.testing.assert_allclose([low, high], np.quantile(areas, [0.025, 0.975]), atol=0.02)
    assert low < detectors.auroc(scores, labels) < high
    narrow = detectors.auroc_interval(scores, labels, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert detectors.auroc_interval(scores, labels, seed=1) != narrow
    assert detectors.auroc_interval([0, 1, 2], [0, 1, 1]) == (1, 1)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.0, np.nan], [0, 1], "auroc: need finite scores, got 1 that are not."),
        ([0.0, 1.0], [0, 0], "auroc: need clean and infected models, got 2 and 0."),
        ([0.0, 1.0], [0, 2], r"auroc: need labels 0 or 1, got \[0, 2\]."),
        ([0.0], [0, 1], "auroc: need one score and one label a model"),
    ],
)
def test_bad_input(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        detectors.auroc(scores, labels)


def test_bad_interval():
    for options, message in (
        ({"confidence": 1.0}, "need 0 < confidence < 1, got 1.0"),
        ({"num_resamples": 0}, "need num_resamples >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            detectors.auroc_interval([0, 1], [0, 1], **options)
