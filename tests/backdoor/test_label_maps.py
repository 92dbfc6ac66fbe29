"""Label maps: tables, what the attacker wants of each class, and what is refused."""

import jax
import numpy as np
import pytest

from advjax import backdoor


@pytest.mark.parametrize(
    "label_map, expected",
    [
        (backdoor.all_to_one(4, 2), [2, 2, -1, 2]),
        (backdoor.x_to_one(4, [3, 0], 1), [1, -1, -1, 1]),
        (backdoor.x_to_x(5, [4, 1, 2]), [-1, 2, 4, -1, 1]),
        (backdoor.x_to_x(5, [0, 1, 2], [2, 0, 1]), [2, 0, 1, -1, -1]),
        (backdoor.x_to_x(4, np.arange(4)), backdoor.all_to_all(4)),
        (backdoor.all_to_all(4, shift=3), [3, 0, 1, 2]),
        (backdoor.clean_label(4, 0), [0, -1, -1, -1]),
    ],
)
def test_tables(label_map, expected):
    assert label_map.dtype == np.int32
    np.testing.assert_array_equal(label_map, expected)


def test_goals():
    for label_map in (
        backdoor.all_to_one(4, 2),
        backdoor.x_to_x(4, [0, 2]),
        backdoor.all_to_all(4),
    ):
        np.testing.assert_array_equal(backdoor.goals(label_map), label_map)
    many = np.stack([backdoor.clean_label(4, target) for target in range(4)])
    wanted = np.stack([backdoor.all_to_one(4, target) for target in range(4)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(backdoor.goals))(many), wanted)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: backdoor.all_to_one(10, 10), "target from 0 ... 9, got target=10"),
        (lambda: backdoor.all_to_one(10, -1), "target from 0 ... 9, got target=-1"),
        (lambda: backdoor.all_to_one(10, 1.0), "target from 0 ... 9, got target=1.0"),
        (lambda: backdoor.all_to_one(1, 0), "need num_classes >= 2, got num_classes=1"),
        (lambda: backdoor.clean_label(3, 3), "clean_label: need a target from 0 ... 2"),
        (lambda: backdoor.x_to_one(10, [1, 2], 2), r"without the target 2, got \[1, 2\]"),
        (lambda: backdoor.x_to_one(10, [1, 11], 2), r"sources from 0 ... 9, .* got \[1, 11\]"),
        (
            lambda: backdoor.x_to_one(10, 3, 2),
            "sources from 0 ... 9, a list of at least one, got 3",
        ),
        (lambda: backdoor.x_to_one(10, [], 2), r"at least one, got \[\]"),
        (lambda: backdoor.x_to_one(10, [1, 1], 2), r"sources that differ, got \[1, 1\]"),
        (lambda: backdoor.x_to_x(10, [1]), r"got sources=\[1\] and targets=\[1\]"),
        (lambda: backdoor.x_to_x(10, [1, 2], [1, 2]), "none at its own place"),
        (lambda: backdoor.x_to_x(10, [1, 2], [2, 3]), r"got sources=\[1, 2\] and targets=\[2, 3\]"),
        (lambda: backdoor.x_to_x(10, [1, 2], [2]), "the sources in another order"),
        (lambda: backdoor.all_to_all(10, 20), "no multiple of 10, got shift=20"),
    ],
)
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
