"""Aggregation rules: what the server makes of the updates of its clients, some of them Byzantine.

Updates are differences to the global model, `update_i = w_i - g`, as rows of f32[n, d]; the server
steps `g + eta * aggregate`.
"""

from advjax.aggregation.aggregators import Aggregator

__all__ = ["Aggregator"]
