"""Partitions: disjoint, complete, deterministic, and with the label shares that they promise."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax import federated

KEY = jax.random.key(0)
METHODS = {
    "iid": federated.partition_iid,
    "fang": federated.partition_fang,
    "dirichlet": functools.partial(federated.partition_dirichlet, concentration=100.0),
    "shards": federated.partition_shards,
}


def examples_of(partition):
    return [row[:count] for row, count in zip(*partition, strict=True)]


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000), num_clients=st.integers(4, 12), size=st.integers(600, 700)
)  # fmt: skip
def test_every_example_belongs_to_one_client(name, seed, num_clients, size):
    labels = np.random.default_rng(seed).integers(0, 4, size).astype(np.int32)
    labels[:4] = range(4)
    partition = METHODS[name](jax.random.key(seed), labels, num_clients)
    index, counts = partition
    assert index.dtype == counts.dtype == np.int32
    assert index.shape == (num_clients, counts.max()) and counts.min() >= 1
    parts = examples_of(partition)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(size))
    for row, part in zip(index, parts, strict=True):
        assert set(row) == set(part)  # the padding is the client's own
    again = METHODS[name](jax.random.key(seed), labels, num_clients)
    np.testing.assert_array_equal(again.index, index)
    other = METHODS[name](jax.random.key(seed + 1), labels, num_clients)
    assert other.index.shape != index.shape or (other.index != index).any()


@pytest.mark.parametrize("name", ["iid", "shards"])
def test_sizes_differ_by_little(name):
    counts = METHODS[name](KEY, np.arange(1003, dtype=np.int32) % 10, 7).counts
    assert np.ptp(counts) <= (1 if name == "iid" else 2)


def test_fang_gives_each_group_its_share():
    """In each group the share q of a label's examples; the others get (1 - q) / (L - 1) each."""
    labels = np.repeat(np.arange(5), 4000).astype(np.int32)
    for q in (0.2, 0.6, 1.0):
        parts = examples_of(federated.partition_fang(KEY, labels, 10, q=q))
        table = np.stack([np.bincount(labels[part], minlength=5) for part in parts])
        if q == 0.2:
            # q = 1 / L: every cell is Binomial(4000, 1 / 10). Chi-square with 50 - 5 degrees of
            # freedom exceeds 90 with probability 1e-4.
            assert ((table - 400.0) ** 2 / 400).sum() < 90
            continue
        favourite = table.argmax(axis=1)
        np.testing.assert_array_equal(np.bincount(favourite), [2] * 5)  # two clients a label
        for label in range(5):
            group = table[favourite == label].sum(axis=0) / 4000
            # Five standard deviations of a share of 4000 examples are at most 0.04.
            np.testing.assert_allclose(group, [q if k == label else (1 - q) / 4 for k in range(5)],
                                       atol=0.04)  # fmt: skip


def test_dirichlet_follows_its_concentration():
    labels = np.repeat(np.arange(10), 1000).astype(np.int32)

    def largest_share(concentration):
        partition = federated.partition_dirichlet(KEY, labels, 5, concentration=concentration)
        table = np.stack([np.bincount(labels[p], minlength=10) for p in examples_of(partition)])
        return (table.max(axis=0) / 1000).mean()

    # Even is 0.2; Dirichlet(0.1) in five dimensions has a largest share of 0.8 on average.
    assert largest_share(1000.0) < 0.25 < 0.6 < largest_share(0.1)


def test_shards_give_few_labels():
    labels = np.repeat(np.arange(10), 100).astype(np.int32)
    parts = examples_of(federated.partition_shards(KEY, labels, 10))
    # 20 shards of 50 examples of one label each.
    assert all(len(np.unique(labels[part])) <= 2 for part in parts)
    assert any(len(np.unique(labels[part])) == 2 for part in parts)


LABELS = np.arange(20, dtype=np.int32) % 4


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: federated.partition_iid(KEY, LABELS, 21), "21 clients, got none for client 2?"),
        (lambda: federated.partition_iid(KEY, LABELS, 0), "need num_clients >= 1"),
        (lambda: federated.partition_iid(KEY, LABELS[:, None], 2), r"int32\[20, 1\]"),
        (lambda: federated.partition_iid(KEY, LABELS - 1, 2), "need labels >= 0, got -1"),
        (lambda: federated.partition_fang(KEY, LABELS, 3), "num_classes=4 and num_clients=3"),
        (lambda: federated.partition_fang(KEY, LABELS, 8, q=1.5), "0 <= q <= 1, got q=1.5"),
        (lambda: federated.partition_fang(KEY, LABELS, 8, q=float("nan")), "got q=nan"),
        (lambda: federated.partition_fang(KEY, LABELS, 8, num_classes=3), "need 4 <= num_classes"),
        (lambda: federated.partition_fang(KEY, LABELS[:4], 4, q=0.0), "got none for client"),
        (
            lambda: federated.partition_dirichlet(KEY, LABELS, 10, concentration=0.01),
            "got none for client .*; ask for fewer clients or raise concentration",
        ),
        (
            lambda: federated.partition_dirichlet(KEY, LABELS, 4, concentration=0.0),
            "a finite concentration > 0, got concentration=0.0",
        ),
        (
            lambda: federated.partition_shards(KEY, LABELS, 4, shards_per_client=0),
            "shards_per_client >= 1",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=f"partition_.*{sentence}") as caught:
        call()
    assert "\n" not in str(caught.value)
