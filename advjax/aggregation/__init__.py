"""Aggregation rules: what the server makes of the updates of its clients, some of them Byzantine.

Updates are differences to the global model, `update_i = w_i - g`, as rows of f32[n, d]; the server
steps `g + eta * aggregate`.
"""

from advjax.aggregation.aggregators import Aggregator, choose, noising, reporting, stateless
from advjax.aggregation.clustered import flame, flame_weights, signguard, signguard_weights
from advjax.aggregation.iterative import (
    caf,
    caf_weights,
    geometric_median,
    geometric_median_weights,
)
from advjax.aggregation.stateful import Reputation, afa, centered_clipping, fltrust

__all__ = [
    "Aggregator",
    "Reputation",
    "afa",
    "caf",
    "caf_weights",
    "centered_clipping",
    "choose",
    "flame",
    "flame_weights",
    "fltrust",
    "geometric_median",
    "geometric_median_weights",
    "noising",
    "reporting",
    "signguard",
    "signguard_weights",
    "stateless",
]
