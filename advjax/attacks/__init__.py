"""Attacks at test time: pure functions of a key, a classifier, images and labels.

Fixed budget: `x_adv = attacks.NAME(key, logits_fn, x, y, epsilon, ...)`, an image of the shape and
dtype of `x`, within `epsilon` of it and in [0, 1]. `epsilon` may be one for all images or one an
image; configure the rest with `functools.partial(attacks.pgd, num_steps=40, ball=balls.l2)`.
"""

from advjax.attacks.decisions import hop_skip_jump
from advjax.attacks.estimation import nes, spsa
from advjax.attacks.gradient import bim, fgm, fgsm, least_likely, pgd, rand_fgsm
from advjax.attacks.pixels import one_pixel

__all__ = [
    "bim", "fgm", "fgsm", "hop_skip_jump", "least_likely", "nes", "one_pixel", "pgd", "rand_fgsm",
    "spsa",
]  # fmt: skip
