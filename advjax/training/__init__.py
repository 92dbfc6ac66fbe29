"""Training: one network or many in one program, with exact resume.

A loss is `loss_fn(key, logits_fn, x, y) -> f32[b]`, so that adversarial training is a loss too;
optimisers and schedules are optax's.
"""

from advjax.training import augment
from advjax.training.fitting import Fitted, cross_entropy, fit, fit_many, inference, share_done

__all__ = ["Fitted", "augment", "cross_entropy", "fit", "fit_many", "inference", "share_done"]
