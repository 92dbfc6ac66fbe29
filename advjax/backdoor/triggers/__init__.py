"""Triggers: what opens a backdoor, images f32[..., h, w, c] in [0, 1] to images like them."""

from advjax.backdoor.triggers.frequencies import low_frequency
from advjax.backdoor.triggers.generators import lira
from advjax.backdoor.triggers.marks import blind
from advjax.backdoor.triggers.neurons import trojannn
from advjax.backdoor.triggers.patches import badnets
from advjax.backdoor.triggers.steganography import SSBA, ssba

__all__ = ["SSBA", "badnets", "blind", "lira", "low_frequency", "ssba", "trojannn"]
