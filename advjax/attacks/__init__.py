"""Attacks at test time: pure functions of a key, a classifier, images and labels.

Fixed budget: `x_adv = attacks.NAME(key, logits_fn, x, y, epsilon, ...)`, an image of the shape and
dtype of `x`, within `epsilon` of it and in [0, 1]. `epsilon` may be one for all images or one an
image; configure the rest with `functools.partial(attacks.pgd, num_steps=40, ball=balls.l2)`.

Minimum norm: `attacks.NAME(key, logits_fn, x, y, ...) -> MinNorm(x_adv, distance, success)`;
`evaluation.minimal_curve` makes a robustness curve of the distances.

Over a set: `attacks.universal(...) -> delta`, one perturbation for all images, and
`attacks.transfer(...)`, how often images made against one classifier fool another.
"""

from advjax.attacks.adaptive_boundary import fab
from advjax.attacks.auto_pgd import apgd, apgd_targeted
from advjax.attacks.carlini_wagner import (
    carlini_wagner_l0,
    carlini_wagner_l2,
    carlini_wagner_linf,
)
from advjax.attacks.cascades import Cascade, auto_attack, auto_attack_parts, cascade
from advjax.attacks.decisions import hop_skip_jump
from advjax.attacks.decoupled import ddn
from advjax.attacks.estimation import nes, spsa
from advjax.attacks.gradient import bim, fgm, fgsm, least_likely, pgd, rand_fgsm
from advjax.attacks.linearisation import deepfool
from advjax.attacks.masking import GradientMaskingWarning, MaskingSigns, masking_signs
from advjax.attacks.physical import photo, photograph
from advjax.attacks.pixels import one_pixel
from advjax.attacks.squares import square
from advjax.attacks.transfers import transfer
from advjax.attacks.universals import universal
from advjax.core.typing import MinNorm

__all__ = [
    "Cascade",
    "GradientMaskingWarning",
    "MaskingSigns",
    "MinNorm",
    "apgd",
    "apgd_targeted",
    "auto_attack",
    "auto_attack_parts",
    "bim",
    "carlini_wagner_l0",
    "carlini_wagner_l2",
    "carlini_wagner_linf",
    "cascade",
    "ddn",
    "deepfool",
    "fab",
    "fgm",
    "fgsm",
    "hop_skip_jump",
    "least_likely",
    "masking_signs",
    "nes",
    "one_pixel",
    "pgd",
    "photo",
    "photograph",
    "rand_fgsm",
    "spsa",
    "square",
    "transfer",
    "universal",
]
