"""Detectors on a zoo: made of plain functions, whose scores are known."""

import json

import jax
import numpy as np
import pytest
from sklearn import metrics

from advjax import detectors
from advjax.detectors import Detection

ATTACKS = ["clean"] * 4 + ["badnets"] * 3 + ["wanet"] * 2
SCORES = [0.0, 1.0, 2.0, 3.0, 2.5, 4.0, 5.0, 0.5, 6.0]
TARGETS = [-1] * 4 + [1, 2, 0, 1, -1]


class Zoo:
    """Its classifiers are their own numbers."""

    names = [f"model_{i}" for i in range(9)]
    attacks = ATTACKS
    labels = np.array([attack != "clean" for attack in ATTACKS], np.int32)
    targets = np.array(TARGETS, np.int32)

    def __len__(self):
        return len(self.names)

    def classifier(self, index):
        return index


def known(key, index, x=None, y=None):
    """Names the right target, but for model 5."""
    return Detection(SCORES[index], TARGETS[index] if index != 5 else 0, {})


def failing(key, index, x=None, y=None):
    if index == 4:
        raise RuntimeError("no luck")
    score = float("nan") if index == 0 else SCORES[index]
    return Detection(score, -1, {"num_images": np.asarray(7)})


def test_evaluate_agrees_with_scikit_learn():
    verdicts, summaries = detectors.evaluate(Zoo(), {"known": known}, num_resamples=200)
    summary = summaries["known"]
    thresholds = []
    for attack, separation in summary.attacks.items():
        rows = [i for i in range(9) if ATTACKS[i] in ("clean", attack)]
        scores, labels = np.array(SCORES)[rows], Zoo.labels[rows]
        assert separation.auroc == pytest.approx(metrics.roc_auc_score(labels, scores))
        assert separation.interval[0] <= separation.auroc <= separation.interval[1]
        np.testing.assert_array_equal(separation.roc, detectors.roc_curve(scores, labels))
        assert separation.threshold == detectors.threshold(scores, labels)
        assert separation.accuracy == np.mean((scores >= separation.threshold) == labels)
        assert separation.shared_accuracy == np.mean((scores >= summary.threshold) == labels)
        assert (separation.num_clean, separation.num_infected) == (4, ATTACKS.count(attack))
        thresholds.append(separation.threshold)
    assert summary.threshold == pytest.approx(np.mean(thresholds))
    areas = [separation.auroc for separation in summary.attacks.values()]
    assert summary.worst == min(areas) < summary.average == pytest.approx(np.mean(areas))
    badnets, wanet = summary.attacks["badnets"], summary.attacks["wanet"]
    # Two of three targets are named rightly; wanet's only model with one is below the threshold.
    assert badnets.hit_rate == pytest.approx(2 / 3)
    assert (wanet.hit_rate, wanet.flagged_hit_rate, wanet.threshold) == (1, None, 4.5)
    assert summary.seconds == pytest.approx(np.mean([v.seconds for v in verdicts[1:]]))
    assert (summary.num_images, summary.num_failed) == (0, 0)


def test_failures_are_noted_and_the_others_kept():
    x = np.zeros((5, 4, 4, 1), np.float32)
    both = {"failing": failing, "known": known}
    verdicts, summaries = detectors.evaluate(
        Zoo(), both, x, np.zeros(5, np.int32), num_resamples=10
    )
    errors = {v.model: v.error for v in verdicts if v.error}
    assert errors == {"model_0": "the score is nan", "model_4": "RuntimeError: no luck"}
    summary = summaries["failing"]
    assert (summary.num_failed, summary.num_images) == (2, 7)
    assert summaries["known"].num_images == 5
    assert summary.attacks["badnets"].num_infected == 2
    assert summary.attacks["badnets"].num_clean == 3
    assert summary.attacks["badnets"].hit_rate is None  # it names no target
    # Stored and read again, they say the same.
    stored = [json.loads(json.dumps(v._asdict())) for v in verdicts]
    again = detectors.summarise([detectors.Verdict(**row) for row in stored], num_resamples=10)
    for name in both:
        assert again[name].average == summaries[name].average
        assert again[name].attacks["wanet"].interval == summaries[name].attacks["wanet"].interval


def test_every_model_is_looked_at_with_the_same_key():
    seen = []
    record = lambda key, index: seen.append(jax.random.key_data(key).tolist()) or known(key, index)
    detectors.evaluate(Zoo(), {"a": record}, num_resamples=1)
    detectors.evaluate(Zoo(), {"b": known, "a": record}, num_resamples=1)
    assert len(seen) == 18
    assert all(key == seen[0] for key in seen)
    detectors.evaluate(Zoo(), {"a": record}, key=jax.random.key(1), num_resamples=1)
    assert seen[-1] != seen[0]


def test_without_clean_models_there_is_nothing_to_tell():
    rows = [detectors.judge(jax.random.key(0), Zoo(), 5, "known", known)]
    summary = detectors.summarise(rows)["known"]
    assert (summary.attacks, summary.average, summary.worst, summary.threshold) == ({}, *[None] * 3)
    assert detectors.summarise([]) == {}


def test_bad_input():
    with pytest.raises(ValueError, match="evaluate: need models and detectors, got 9 and 0"):
        detectors.evaluate(Zoo(), {})
    with pytest.raises(ValueError, match="evaluate: need float images in"):
        detectors.evaluate(Zoo(), {"a": known}, np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="evaluate: need one label an image"):
        x = np.zeros((2, 4, 4, 1), np.float32)
        detectors.evaluate(Zoo(), {"a": known}, x, np.zeros(3, np.int32))
