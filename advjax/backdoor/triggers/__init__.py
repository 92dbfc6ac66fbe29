"""Triggers: what opens a backdoor, images f32[..., h, w, c] in [0, 1] to images like them."""

from advjax.backdoor.triggers.patches import badnets

__all__ = ["badnets"]
