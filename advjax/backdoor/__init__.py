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
from advjax.backdoor.poisoning import QUANTISATIONS, Poisoned, poison, poison_batch, quantised
from advjax.backdoor.recipes import (
    ATTACKS,
    RECIPES,
    Infected,
    Recipe,
    make_optimizer,
    train,
    train_many,
)
from advjax.backdoor.zoos import (
    Group,
    Member,
    Memory,
    Store,
    Zoo,
    ZooConfig,
    make_network,
    train_zoo,
    verdicts,
)

__all__ = [
    "ATTACKS",
    "QUANTISATIONS",
    "RECIPES",
    "Group",
    "Infected",
    "Member",
    "Memory",
    "Poisoned",
    "Recipe",
    "Store",
    "Zoo",
    "ZooConfig",
    "all_to_all",
    "all_to_one",
    "attack_success_rate",
    "clean_label",
    "goals",
    "make_network",
    "make_optimizer",
    "poison",
    "poison_batch",
    "quantised",
    "robust_accuracy",
    "train",
    "train_many",
    "train_zoo",
    "triggered",
    "triggers",
    "verdicts",
    "x_to_one",
    "x_to_x",
]
