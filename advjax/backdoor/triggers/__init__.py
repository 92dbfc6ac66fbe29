"""Triggers: what opens a backdoor, images f32[..., h, w, c] in [0, 1] to images like them.

Configure one with `functools.partial`, or with `jax.tree_util.Partial` where arrays such as a
pattern or a field shall not be compiled into the program.
"""

from advjax.backdoor.triggers.frequencies import low_frequency
from advjax.backdoor.triggers.generators import lira
from advjax.backdoor.triggers.levels import bpp, bpp_negatives
from advjax.backdoor.triggers.marks import blind
from advjax.backdoor.triggers.neurons import trojannn
from advjax.backdoor.triggers.overlays import additive, blended, blended_pattern, sig
from advjax.backdoor.triggers.patches import badnets
from advjax.backdoor.triggers.steganography import SSBA, ssba
from advjax.backdoor.triggers.warps import wanet, wanet_field, wanet_noise

__all__ = [
    "SSBA",
    "additive",
    "badnets",
    "blended",
    "blended_pattern",
    "blind",
    "bpp",
    "bpp_negatives",
    "lira",
    "low_frequency",
    "sig",
    "ssba",
    "trojannn",
    "wanet",
    "wanet_field",
    "wanet_noise",
]
