"""Defences: losses for `training.fit`, and wrappers from classifier to classifier.

Losses are `loss_fn(key, logits_fn, x, y, *, ...) -> f32[b]`; configure them with
`functools.partial(defenses.adversarial, epsilon=0.3)`, or sweep their numbers with
`training.fit_many(..., hyperparameters={"loss": {"epsilon": [...]}})`.
"""

from advjax.defenses.adversarial_losses import (
    adversarial,
    ensemble_adversarial,
    least_likely,
    trades,
)
from advjax.defenses.entropies import entropy_regularised
from advjax.defenses.temperatures import at_temperature, distilled

__all__ = [
    "adversarial",
    "at_temperature",
    "distilled",
    "ensemble_adversarial",
    "entropy_regularised",
    "least_likely",
    "trades",
]
