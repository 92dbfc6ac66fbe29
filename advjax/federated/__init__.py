"""Federated training under attack: partitions of the data, a simulator, and what an attack costs.

`simulate(key, task, rule=..., poisoning=..., num_rounds=...)` runs `FedSGD` or `FedAvg` with a rule
of `advjax.aggregation` against an attack of `advjax.poisoning`.
"""

from advjax.federated.clients import FedAvg, FedSGD
from advjax.federated.measures import attack_deviation, attack_impact
from advjax.federated.partitions import (
    Partition,
    partition_dirichlet,
    partition_fang,
    partition_iid,
    partition_shards,
)
from advjax.federated.simulation import History, sample_clients, simulate
from advjax.federated.tasks import Task, make_task, poison_labels

__all__ = [
    "FedAvg",
    "FedSGD",
    "History",
    "Partition",
    "Task",
    "attack_deviation",
    "attack_impact",
    "make_task",
    "partition_dirichlet",
    "partition_fang",
    "partition_iid",
    "partition_shards",
    "poison_labels",
    "sample_clients",
    "simulate",
]
