"""Backdoors: triggers, label maps, poisoned data and the networks trained on it."""
