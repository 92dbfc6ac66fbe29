"""The digits that scikit-learn ships: 1,797 images of 8x8, needing neither network nor disk."""

import functools
from typing import Any

import numpy as np

SPLITS = ("train", "test")
_TEST_SHARE = 0.2


@functools.cache
def load_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the digits and splits them 80 to 20, every class alike.

    The original order goes by writer, so a fixed permutation comes first: any slice of a split
    is a fair sample. `RandomState` because NumPy promises that its stream never changes.

    Returns:
      For `train` and `test`: images uint8[n, 8, 8, 1] (0 to 16 scaled to 0 to 255) and labels
      int32[n]. The arrays are shared between calls, so they are read-only.
    """
    import sklearn.datasets

    raw: Any = sklearn.datasets.load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int32)

    order = np.random.RandomState(0).permutation(len(labels))
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        members = order[labels[order] == label]
        is_test[members[: round(_TEST_SHARE * len(members))]] = True

    splits = {}
    for split, chosen in zip(SPLITS, (order[~is_test[order]], order[is_test[order]]), strict=True):
        arrays = images[chosen], labels[chosen]
        for array in arrays:
            array.flags.writeable = False
        splits[split] = arrays
    return splits
