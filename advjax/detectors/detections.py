"""What a detector says of one model."""

from collections.abc import Mapping
from typing import NamedTuple

from advjax.core.typing import Array


class Detection(NamedTuple):
    """What a detector says of one model.

    Attributes:
      score: f32[]; the higher, the more likely the model carries a backdoor.
      target_label: the class that a backdoor would lead to, int32[].
      details: what the score was computed from, by name; each detector names its own.
    """

    score: Array
    target_label: Array
    details: Mapping[str, Array]
