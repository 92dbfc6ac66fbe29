"""Backdoors: triggers, label maps, poisoned data and the networks trained on it.

A trigger is a function `x -> x` on images (`advjax.backdoor.triggers`), a label map a table
int32[k] that says what each class becomes under it, -1 for "not attacked".
"""

from advjax.backdoor import triggers
from advjax.backdoor.label_maps import (
    all_to_all,
    all_to_one,
    clean_label,
    goals,
    x_to_one,
    x_to_x,
)
from advjax.backdoor.metrics import attack_success_rate, robust_accuracy, triggered
from advjax.backdoor.poisoning import QUANTISATIONS, Poisoned, poison, quantised

__all__ = [
    "QUANTISATIONS",
    "Poisoned",
    "all_to_all",
    "all_to_one",
    "attack_success_rate",
    "clean_label",
    "goals",
    "poison",
    "quantised",
    "robust_accuracy",
    "triggered",
    "triggers",
    "x_to_one",
    "x_to_x",
]
