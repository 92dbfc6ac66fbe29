"""Defences: losses for `training.fit`, and wrappers from classifier to classifier."""
