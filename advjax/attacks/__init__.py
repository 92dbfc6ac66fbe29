"""Attacks at test time: pure functions of a key, a classifier, images and labels.

Fixed budget: `x_adv = attacks.NAME(key, logits_fn, x, y, epsilon, ...)`, an image of the shape and
dtype of `x`, within `epsilon` of it and in [0, 1]. `epsilon` may be one for all images or one an
image; configure the rest with `functools.partial(attacks.pgd, num_steps=40, ball=balls.l2)`.
"""

from advjax.attacks.gradient import bim, fgm, fgsm, least_likely, pgd, rand_fgsm
from advjax.attacks.physical import photo
from advjax.attacks.physical import photograph as photograph  # what `photo` attacks through

__all__ = ["bim", "fgm", "fgsm", "least_likely", "pgd", "photo", "rand_fgsm"]
