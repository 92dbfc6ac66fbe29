"""Flags of the studies of defences at test time."""

import dataclasses
from typing import Any

from absl import flags

flags.disclaim_key_flags()  # they belong to the launcher, and to its --help


def define_defence_flags() -> None:
    """Defines the flags for the settings of `defended.DefenceConfig` beyond the network's."""
    flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
    flags.DEFINE_integer("num_held_out", 200, "The last of them, which no network sees.")
    flags.DEFINE_integer("num_steps", 20, "Steps of bim and pgd.")
    flags.DEFINE_integer(
        "cw_num_steps",
        200,
        "Steps of Carlini and Wagner's l2 attack; the linf one has a quarter a round.",
    )
    flags.DEFINE_integer("cw_num_search_steps", 5, "Search steps of the l2 one.")
    flags.DEFINE_integer("cw_num_rounds", 20, "Rounds of the linf one.")
    flags.DEFINE_float("cw_learning_rate", 0.1, "Their step of Adam.")
    flags.DEFINE_integer("attack_batch_size", 200, "Images attacked at a time.")


def values_of(config_class: type) -> dict[str, Any]:
    """The values of the flags that are named like the fields of a configuration.

    Args:
      config_class: a dataclass.
    """
    return {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(config_class)}
