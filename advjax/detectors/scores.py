"""What scores say: AUROC with its interval, ROC curves, thresholds. NumPy on the host.

A score is higher for a model that is more likely backdoored, a label is 1 for a backdoored model. A
model is flagged when its score is at least the threshold.
"""

import numpy as np
from numpy.typing import ArrayLike

from advjax.core import checks


def _split(caller: str, scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores of infected and of clean models, in float64."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"{caller}: need one score and one label a model, got shapes {scores.shape} and "
            f"{labels.shape}."
        )
    if not np.all(np.isfinite(scores)):
        raise ValueError(
            f"{caller}: need finite scores, got {np.sum(~np.isfinite(scores))} that are not."
        )
    infected, clean = scores[labels == 1], scores[labels == 0]
    if len(infected) + len(clean) != len(scores):
        raise ValueError(f"{caller}: need labels 0 or 1, got {sorted(set(labels.tolist()))}.")
    if min(len(infected), len(clean)) == 0:
        raise ValueError(
            f"{caller}: need clean and infected models, got {len(clean)} and {len(infected)}."
        )
    return infected, clean


def _wins(infected: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Whether each infected model has a higher score than each clean one; a tie is a half."""
    return (infected[:, None] > clean) + 0.5 * (infected[:, None] == clean)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that an infected model scores above a clean one.

    Args:
      scores: f32[m].
      labels: int32[m], 1 for infected.

    Returns:
      In [0, 1]; a tie counts a half.

    Raises:
      ValueError: scores that are not finite, or models of one kind only.

    Example:
      >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
      0.75
    """
    return float(np.mean(_wins(*_split("auroc", scores, labels))))


def auroc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the AUROC, over the models.

    Clean and infected models are drawn anew with replacement, each kind as often as it is there.
    An AUROC of exactly 0 or 1 has an interval of no width, which few models do not justify.

    Args:
      scores: f32[m].
      labels: int32[m], 1 for infected.
      num_resamples: how often.
      confidence: share of the resamples in the interval, as many left out below as above.
      seed: of the draws.

    Returns:
      The interval's ends.

    Raises:
      ValueError: as `auroc`, no resample, or a confidence outside (0, 1).

    Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile interval).
    """
    checks.at_least("auroc_interval", "num_resamples", num_resamples, 1)
    if not 0 < confidence < 1:
        raise ValueError(f"auroc_interval: need 0 < confidence < 1, got {confidence}.")
    infected, clean = _split("auroc_interval", scores, labels)
    draws = np.random.default_rng(seed)
    counts = [
        draws.multinomial(n, np.full(n, 1 / n), size=num_resamples) / n
        for n in (len(infected), len(clean))
    ]
    areas = np.einsum("ri,ij,rj->r", counts[0], _wins(infected, clean), counts[1], optimize=True)
    low, high = np.quantile(areas, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Points of the ROC curve, one a threshold.

    Args:
      scores: f32[m].
      labels: int32[m], 1 for infected.

    Returns:
      f64[points, 2]: share of clean and share of infected models that are flagged, from (0, 0) to
      (1, 1).

    Raises:
      ValueError: as `auroc`.

    Example:
      >>> roc_curve([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]).tolist()
      [[0.0, 0.0], [0.0, 0.5], [0.5, 0.5], [0.5, 1.0], [1.0, 1.0]]
    """
    infected, clean = _split("roc_curve", scores, labels)
    thresholds = np.unique(np.concatenate([infected, clean]))[::-1]
    rates = [np.mean(kind >= thresholds[:, None], axis=1) for kind in (clean, infected)]
    return np.concatenate([np.zeros((1, 2)), np.stack(rates, axis=1)])


def accuracy(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """Share of the models that a threshold tells rightly.

    Args:
      scores: f32[m].
      labels: int32[m], 1 for infected.
      threshold: a model with at least this score is flagged.

    Raises:
      ValueError: as `auroc`.
    """
    infected, clean = _split("accuracy", scores, labels)
    num_right = np.sum(infected >= threshold) + np.sum(clean < threshold)
    return float(num_right / (len(infected) + len(clean)))


def threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """The threshold with the largest F1, `2 TP / (2 TP + FP + FN)`, of flagging infected models.

    Candidates are the midpoints between neighbouring scores. Of equal ones it is the highest, which
    flags the fewest models: where the score is minus an entropy or an area, as that of Model X-ray,
    this is the lowest bound on the entropy.

    Args:
      scores: f32[m].
      labels: int32[m], 1 for infected.

    Returns:
      The threshold; the score itself if all are equal.

    Raises:
      ValueError: as `auroc`.

    Example:
      >>> threshold([1.0, 2.0, 4.0, 8.0], [0, 0, 1, 1])
      3.0

    Source: H. Su et al., "Model X-ray: Detecting Backdoored Models via Decision Boundary", MM 2024
    (Eq. 6).
    """
    infected, clean = _split("threshold", scores, labels)
    levels = np.unique(np.concatenate([infected, clean]))
    if len(levels) == 1:
        return float(levels[0])
    candidates = (levels[1:] + levels[:-1])[::-1] / 2
    hits, false_alarms = (np.sum(kind >= candidates[:, None], axis=1) for kind in (infected, clean))
    f1 = 2 * hits / (hits + false_alarms + len(infected))
    return float(candidates[np.argmax(f1)])
