"""Aggregation rules: what the server makes of the updates of its clients, some of them Byzantine.

Updates are differences to the global model, `update_i = w_i - g`, as rows of f32[n, d]; the server
steps `g + eta * aggregate`.
"""

from advjax.aggregation.aggregators import Aggregator, choose, noising, reporting, stateless
from advjax.aggregation.averages import (
    clipping,
    mean,
    mean_weights,
    norm_bounding,
    norm_bounding_weights,
)
from advjax.aggregation.clustered import flame, flame_weights, signguard, signguard_weights
from advjax.aggregation.coordinates import meamed, median, trimmed_mean
from advjax.aggregation.filters import dnc, dnc_weights, faba, faba_weights
from advjax.aggregation.iterative import (
    caf,
    caf_weights,
    geometric_median,
    geometric_median_weights,
)
from advjax.aggregation.mixing import bucketing, nearest_neighbour_mixing
from advjax.aggregation.selection import (
    bulyan,
    bulyan_weights,
    krum,
    krum_weights,
    mda,
    mda_weights,
    monna,
    monna_weights,
    multi_krum,
    multi_krum_weights,
)
from advjax.aggregation.stateful import Reputation, afa, centered_clipping, fltrust

__all__ = [
    "Aggregator",
    "Reputation",
    "afa",
    "bucketing",
    "bulyan",
    "bulyan_weights",
    "caf",
    "caf_weights",
    "centered_clipping",
    "choose",
    "clipping",
    "dnc",
    "dnc_weights",
    "faba",
    "faba_weights",
    "flame",
    "flame_weights",
    "fltrust",
    "geometric_median",
    "geometric_median_weights",
    "krum",
    "krum_weights",
    "mda",
    "mda_weights",
    "meamed",
    "mean",
    "mean_weights",
    "median",
    "monna",
    "monna_weights",
    "multi_krum",
    "multi_krum_weights",
    "nearest_neighbour_mixing",
    "noising",
    "norm_bounding",
    "norm_bounding_weights",
    "reporting",
    "signguard",
    "signguard_weights",
    "stateless",
    "trimmed_mean",
]
