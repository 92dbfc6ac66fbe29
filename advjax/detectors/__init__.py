"""Detectors of backdoors in trained classifiers.

Each is `detector(key, logits_fn, x, y, *, num_classes, ...) -> Detection`, with a few clean images
`x, y`; a higher score means more likely backdoored. These are procedures of minutes, so unlike the
rest of the library they compile themselves, with the classifier's weights as arguments: many models
of one architecture, one after the other, compile once. `details["num_images"]` is how many clean
images a detector used.
"""

from advjax.detectors.comparisons import (
    Evaluation,
    Separation,
    Summary,
    Verdict,
    evaluate,
    judge,
    summarise,
)
from advjax.detectors.detections import Detection
from advjax.detectors.margins import NULLS, log_p_value, maximum_margins, mm_bd
from advjax.detectors.masks import neural_cleanse
from advjax.detectors.meta_classifiers import MetaClassifier, mntd, train_meta, train_mntd
from advjax.detectors.outliers import anomaly_indices
from advjax.detectors.planes import model_xray, read_survey
from advjax.detectors.scores import accuracy, auroc, auroc_interval, roc_curve, threshold
from advjax.detectors.shadows import Jumbo, Shadows, jumbo, train_shadows

__all__ = [
    "Detection",
    "Evaluation",
    "Jumbo",
    "MetaClassifier",
    "NULLS",
    "Separation",
    "Shadows",
    "Summary",
    "Verdict",
    "accuracy",
    "anomaly_indices",
    "auroc",
    "auroc_interval",
    "evaluate",
    "judge",
    "jumbo",
    "log_p_value",
    "maximum_margins",
    "mm_bd",
    "mntd",
    "model_xray",
    "neural_cleanse",
    "read_survey",
    "roc_curve",
    "summarise",
    "threshold",
    "train_meta",
    "train_mntd",
    "train_shadows",
]
