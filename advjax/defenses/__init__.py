"""Defences: losses for `training.fit`, and wrappers from classifier to classifier."""

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
from advjax.defenses.generators import (
    Critic,
    Generator,
    GeneratorFn,
    defense_gan,
    reconstruct,
    train_generator,
)

__all__ = [
    "Autoencoder",
    "Critic",
    "Generator",
    "GeneratorFn",
    "defense_gan",
    "divergence_detector",
    "error_detector",
    "magnet",
    "magnet_detects",
    "magnet_rejecting",
    "magnet_scores",
    "member",
    "reconstruct",
    "thresholds",
    "train_autoencoder",
    "train_autoencoders",
    "train_generator",
]
