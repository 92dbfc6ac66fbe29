"""Defences: losses for `training.fit`, and wrappers from classifier to classifier.

Losses are `loss_fn(key, logits_fn, x, y, *, ...) -> f32[b]`; configure them with
`functools.partial(defenses.adversarial, epsilon=0.3)`, or sweep their numbers with
`training.fit_many(..., hyperparameters={"loss": {"epsilon": [...]}})`.

Wrappers make a classifier of a classifier (`magnet`, `defense_gan`), so that every attack works on
the defended one; what they need is trained by functions beside them.
"""

from advjax.defenses.adversarial_losses import (
    adversarial,
    ensemble_adversarial,
    least_likely,
    trades,
)
from advjax.defenses.autoencoders import (
    Autoencoder,
    divergence_detector,
    error_detector,
    magnet,
    magnet_detects,
    magnet_rejecting,
    magnet_scores,
    member,
    thresholds,
    train_autoencoder,
    train_autoencoders,
)
from advjax.defenses.entropies import entropy_regularised
from advjax.defenses.generators import (
    Critic,
    Generator,
    GeneratorFn,
    defense_gan,
    reconstruct,
    train_generator,
)
from advjax.defenses.temperatures import at_temperature, distilled

__all__ = [
    "Autoencoder",
    "Critic",
    "Generator",
    "GeneratorFn",
    "adversarial",
    "at_temperature",
    "defense_gan",
    "distilled",
    "divergence_detector",
    "ensemble_adversarial",
    "entropy_regularised",
    "error_detector",
    "least_likely",
    "magnet",
    "magnet_detects",
    "magnet_rejecting",
    "magnet_scores",
    "member",
    "reconstruct",
    "thresholds",
    "trades",
    "train_autoencoder",
    "train_autoencoders",
    "train_generator",
]
