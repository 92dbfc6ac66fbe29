"""Detectors of backdoors in trained classifiers.

Each is `detector(key, logits_fn, x, y, *, num_classes, ...) -> Detection`, with a few clean images
`x, y`; a higher score means more likely backdoored.
"""

from advjax.detectors.detections import Detection
from advjax.detectors.planes import model_xray, read_survey

__all__ = ["Detection", "model_xray", "read_survey"]
