"""Data sets as arrays: `load(name, split) -> Dataset`, with everything cached and read-only."""

from advjax.data.catalogue import NAMES
from advjax.data.dataset import Dataset
from advjax.data.loading import Info, info, load

__all__ = ["NAMES", "Dataset", "Info", "info", "load"]
