"""Detectors side by side on a zoo of clean and infected models."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import logging

from advjax.core import checks, random
from advjax.core.typing import Array, Key, LogitsFn
from advjax.detectors import scores
from advjax.detectors.detections import Detection

Detector = Callable[..., Detection]


class Models(Protocol):
    """Models to judge, such as a `backdoor.Zoo`.

    `labels` is 1 for infected models and 0 for clean ones, `attacks` the attack of each, `targets`
    its target, -1 for none or several.
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def attacks(self) -> Sequence[str]: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def targets(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def classifier(self, index: int) -> LogitsFn: ...


class Verdict(NamedTuple):
    """What one detector says of one model: a row to store.

    Attributes:
      detector: its name.
      model: its name.
      attack: the model's.
      is_infected: whether the model carries a backdoor.
      target: the class that its backdoor leads to, -1 for none or several.
      score: None if the detector failed.
      target_label: the class that the detector names, -1 for none.
      seconds: what it took, the compilation of a first model included.
      num_images: clean images that it used.
      error: why it failed; "" if it did not.
    """

    detector: str
    model: str
    attack: str
    is_infected: bool
    target: int
    score: float | None
    target_label: int
    seconds: float
    num_images: int
    error: str


@dataclasses.dataclass(frozen=True)
class Separation:
    """How well a detector tells the models of one attack from the clean ones.

    Attributes:
      auroc: area under the ROC curve.
      interval: of the AUROC, by bootstrap over the models.
      roc: f64[points, 2], shares of clean and of infected models that are flagged.
      threshold: the score with the best F1.
      accuracy: share of the models told rightly at this threshold.
      shared_accuracy: at the detector's shared threshold.
      hit_rate: share of the models with one target whose target was named; None if the detector
        names none, or no model has one.
      flagged_hit_rate: the same among the models that are flagged at `threshold`.
      num_clean: models that were judged.
      num_infected: models that were judged.
    """

    auroc: float
    interval: tuple[float, float]
    roc: np.ndarray
    threshold: float
    accuracy: float
    shared_accuracy: float
    hit_rate: float | None
    flagged_hit_rate: float | None
    num_clean: int
    num_infected: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a detector did on a zoo.

    Attributes:
      attacks: a `Separation` for each attack.
      average: mean AUROC over the attacks; None without any.
      worst: least AUROC over the attacks.
      threshold: mean of the attacks' thresholds, the paper's gamma-bar; None without any.
      seconds: mean time a model, without the first one, which compiles, if there are others.
      num_images: clean images that it used for a model, at most.
      num_failed: models that it failed on; they are left out.
    """

    attacks: Mapping[str, Separation]
    average: float | None
    worst: float | None
    threshold: float | None
    seconds: float | None
    num_images: int
    num_failed: int


class Evaluation(NamedTuple):
    """What `evaluate` returns.

    Attributes:
      verdicts: one a detector and model.
      summaries: one a detector, by name.
    """

    verdicts: tuple[Verdict, ...]
    summaries: Mapping[str, Summary]


def judge(
    key: Key,
    zoo: Models,
    index: int,
    name: str,
    detector: Detector,
    x: Array | None = None,
    y: Array | None = None,
) -> Verdict:
    """Asks one detector about one model of a zoo: a cell of a study.

    A detector that raises, or whose score is not finite, is noted in the verdict.

    Args:
      key: a key; the detector's is derived from its name alone, so that all models are looked at
        with the same planes, starts and orders.
      zoo: the models.
      index: which one.
      name: of the detector.
      detector: `(key, logits_fn, x, y) -> Detection`, such as a `functools.partial` of one here; or
        `(key, logits_fn) -> Detection` without x.
      x: clean images, f32[n, h, w, c] in [0, 1].
      y: their labels, int32[n].

    Returns:
      A `Verdict`. `num_images` is what the detector says in its details, else n.
    """
    given = () if x is None else (x, y)
    score, target_label, error = None, -1, ""
    num_images = 0 if x is None else len(x)
    logits_fn = zoo.classifier(index)
    started = time.monotonic()
    try:
        found = jax.block_until_ready(detector(random.named(key, name), logits_fn, *given))
        score, target_label = float(found.score), int(found.target_label)
        num_images = int(found.details.get("num_images", num_images))
        if not np.isfinite(score):
            score, error = None, f"the score is {score}"
    except Exception as raised:  # whatever a detector does, the others go on
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.monotonic() - started
    if error:
        logging.warning("%s failed on %s: %s", name, zoo.names[index], error)
    return Verdict(
        name, zoo.names[index], zoo.attacks[index], bool(zoo.labels[index]),
        int(zoo.targets[index]), score, target_label, seconds, num_images, error,
    )  # fmt: skip


def _scores(verdicts: Sequence[Verdict]) -> np.ndarray:
    return np.array([verdict.score for verdict in verdicts], np.float64)


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _separate(
    clean: Sequence[Verdict],
    infected: Sequence[Verdict],
    own: float,
    shared: float,
    **bootstrap: Any,
) -> Separation:
    """The models of an attack against the clean ones, at their own and at the shared threshold."""
    pair = _pair(clean, infected)
    has_target = np.array([verdict.target >= 0 for verdict in infected])
    is_hit = np.array([verdict.target_label == verdict.target for verdict in infected])
    names_targets = any(verdict.target_label >= 0 for verdict in infected)
    hit_rates = [
        _mean(is_hit[has_target & among]) if names_targets else None
        for among in (np.full(len(infected), True), _scores(infected) >= own)
    ]
    return Separation(
        auroc=scores.auroc(*pair),
        interval=scores.auroc_interval(*pair, **bootstrap),
        roc=scores.roc_curve(*pair),
        threshold=own,
        accuracy=scores.accuracy(*pair, own),
        shared_accuracy=scores.accuracy(*pair, shared),
        hit_rate=hit_rates[0],
        flagged_hit_rate=hit_rates[1],
        num_clean=len(clean),
        num_infected=len(infected),
    )


def _pair(clean: Sequence[Verdict], infected: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels."""
    return _scores([*clean, *infected]), np.repeat([0, 1], [len(clean), len(infected)])


def _summarise(verdicts: Sequence[Verdict], **bootstrap: Any) -> Summary:
    judged = [verdict for verdict in verdicts if verdict.score is not None]
    clean = [verdict for verdict in judged if not verdict.is_infected]
    attacks = dict.fromkeys(verdict.attack for verdict in judged if verdict.is_infected)
    groups = {
        attack: [v for v in judged if v.is_infected and v.attack == attack]
        for attack in (attacks if clean else ())
    }
    own = {attack: scores.threshold(*_pair(clean, group)) for attack, group in groups.items()}
    thresholds = list(own.values())
    separations = {
        attack: _separate(clean, group, own[attack], float(np.mean(thresholds)), **bootstrap)
        for attack, group in groups.items()
    }
    areas = [separation.auroc for separation in separations.values()]
    times = [verdict.seconds for verdict in judged]
    return Summary(
        attacks=separations,
        average=_mean(areas),
        worst=min(areas, default=None),
        threshold=_mean(thresholds),
        seconds=_mean(times[1:] or times),
        num_images=max((verdict.num_images for verdict in judged), default=0),
        num_failed=len(verdicts) - len(judged),
    )


def summarise(
    verdicts: Iterable[Verdict], *, num_resamples: int = 1000, confidence: float = 0.95
) -> dict[str, Summary]:
    """Reads verdicts, fresh or stored ones: `Verdict(**row)`.

    Args:
      verdicts: of any detectors and models.
      num_resamples: of the bootstrap intervals.
      confidence: of the bootstrap intervals.

    Returns:
      A `Summary` for each detector, by name. An attack whose models all failed is left out; without
      a clean model there is no attack.

    Raises:
      ValueError: no resample, or a confidence outside (0, 1).
    """
    verdicts = list(verdicts)
    return {
        name: _summarise(
            [verdict for verdict in verdicts if verdict.detector == name],
            num_resamples=num_resamples,
            confidence=confidence,
        )
        for name in dict.fromkeys(verdict.detector for verdict in verdicts)
    }


def evaluate(
    zoo: Models,
    detectors: Mapping[str, Detector],
    x: Array | None = None,
    y: Array | None = None,
    *,
    key: Key | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> Evaluation:
    """Runs detectors on all models of a zoo and says how well they tell the infected ones.

    Each infected model of an attack is set against all clean models. Models of one architecture
    compile a detector once; all detectors of this package compile themselves.

    Args:
      zoo: models, such as a `backdoor.Zoo`.
      detectors: by name, `(key, logits_fn, x, y) -> Detection`, or `(key, logits_fn) -> Detection`
        without x.
      x: clean images for the detectors, f32[n, h, w, c] in [0, 1].
      y: their labels, int32[n].
      key: a key; `jax.random.key(0)` if None.
      num_resamples: of the bootstrap intervals.
      confidence: of the bootstrap intervals.

    Returns:
      `Evaluation(verdicts, summaries)`. A detector that fails on a model is noted there, and the
      others go on.

    Raises:
      ValueError: an empty zoo, no detector, labels that do not fit the images.

    Source: H. Su et al., "Model X-ray: Detecting Backdoored Models via Decision Boundary", MM 2024
    (the protocol of Tables 2 and 5).
    """
    if len(zoo) == 0 or not detectors:
        raise ValueError(
            f"evaluate: need models and detectors, got {len(zoo)} and {len(detectors)}."
        )
    if x is not None:
        checks.images("evaluate", x)
        if y is not None:
            checks.labels("evaluate", y, x)
    key = jax.random.key(0) if key is None else random.as_typed(key)
    verdicts = tuple(
        judge(key, zoo, index, name, detector, x, y)
        for name, detector in detectors.items()
        for index in range(len(zoo))
    )
    return Evaluation(
        verdicts, summarise(verdicts, num_resamples=num_resamples, confidence=confidence)
    )
