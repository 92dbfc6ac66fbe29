"""Triggers: `x -> x`, images f32[..., h, w, c] in [0, 1] to images of the same shape."""

from advjax.backdoor.triggers.frequencies import low_frequency
from advjax.backdoor.triggers.marks import blind

__all__ = ["blind", "low_frequency"]
