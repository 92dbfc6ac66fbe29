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

__all__ = [
    "Autoencoder",
    "divergence_detector",
    "error_detector",
    "magnet",
    "magnet_detects",
    "magnet_rejecting",
    "magnet_scores",
    "member",
    "thresholds",
    "train_autoencoder",
    "train_autoencoders",
]
