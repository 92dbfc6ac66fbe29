"""Partitions: which client holds which examples. They are made on the host, before any training."""

from typing import NamedTuple

import jax
import numpy as np

from advjax.core import checks, random
from advjax.core.typing import Array, Key


class Partition(NamedTuple):
    """The examples of each client; no example belongs to two.

    Attributes:
      index: positions in the data set, int32[n, s]; s is the size of the largest client, and a
        smaller one repeats its own examples to fill the row.
      counts: how many examples each client has, int32[n]; row i is real up to `counts[i]`.
    """

    index: np.ndarray
    counts: np.ndarray


def _generator(key: Key) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(random.as_typed(key))).ravel())


def _labels(caller: str, labels: Array, num_clients: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{caller}: need integer labels of shape [examples], got {labels.dtype}"
            f"{list(labels.shape)}."
        )
    checks.at_least(caller, "num_clients", num_clients, 1)
    if labels.size and labels.min() < 0:
        raise ValueError(f"{caller}: need labels >= 0, got {labels.min()}.")
    return labels


def _partition(caller: str, owners: np.ndarray, num_clients: int, advice: str) -> Partition:
    """The partition in which example j belongs to client `owners[j]`."""
    counts = np.bincount(owners, minlength=num_clients)
    if not counts.all():
        empty = np.flatnonzero(counts == 0)
        names = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise ValueError(
            f"{caller}: need data for each of {num_clients} clients, got none for client {names}; "
            f"{advice}."
        )
    rows = np.split(np.argsort(owners, kind="stable"), np.cumsum(counts)[:-1])
    index = np.stack([np.resize(row, counts.max()) for row in rows])
    return Partition(index.astype(np.int32), counts.astype(np.int32))


def _positive(caller: str, name: str, value: float, most: float = np.inf) -> None:
    if not 0 <= value <= most or value == np.inf or (most == np.inf and value == 0):
        bound = f"0 <= {name} <= {most:g}" if np.isfinite(most) else f"a finite {name} > 0"
        raise ValueError(f"{caller}: need {bound}, got {name}={value}.")


def partition_iid(key: Key, labels: Array, num_clients: int) -> Partition:
    """Deals the examples out at random: every client draws from the same distribution.

    All examples are used; the sizes of the clients differ by one at most.

    Args:
      key: a key.
      labels: int32[examples].
      num_clients: n.

    Returns:
      `Partition(index, counts)`.

    Raises:
      ValueError: a client without data.

    Example:
      >>> import jax, numpy as np
      >>> from advjax import federated
      >>> federated.partition_iid(jax.random.key(0), np.zeros(10, int), 4).counts
      array([3, 3, 2, 2], dtype=int32)
    """
    labels = _labels("partition_iid", labels, num_clients)
    owners = _generator(key).permutation(np.arange(len(labels)) % num_clients)
    return _partition("partition_iid", owners, num_clients, "ask for fewer clients")


def partition_fang(
    key: Key, labels: Array, num_clients: int, *, q: float = 0.5, num_classes: int | None = None
) -> Partition:
    """Fang's split: each group of clients prefers one label.

    The clients form L random groups, one a label. An example of label l goes to group l with
    probability q and to each other group with probability (1 - q) / (L - 1), there to a client at
    random. q = 1 / L is an independent and identical distribution, q = 1 one label a client. All
    examples are used. Groups differ by one client at most where L does not divide n.

    Args:
      key: a key.
      labels: int32[examples].
      num_clients: n, at least one for each label.
      q: the share of an example's own group.
      num_classes: L; by default the largest label and one.

    Returns:
      `Partition(index, counts)`.

    Raises:
      ValueError: fewer clients than labels, a label beyond `num_classes`, a share outside [0, 1],
        or a client without data.

    Source: M. Fang, X. Cao, J. Jia, N. Z. Gong, "Local Model Poisoning Attacks to
    Byzantine-Robust Federated Learning", USENIX Security 2020.
    """
    labels = _labels("partition_fang", labels, num_clients)
    most = int(labels.max(initial=0)) + 1
    num_classes = most if num_classes is None else num_classes
    if not max(most, 2) <= num_classes <= num_clients:
        raise ValueError(
            f"partition_fang: need {max(most, 2)} <= num_classes <= num_clients, got "
            f"num_classes={num_classes} and num_clients={num_clients}."
        )
    _positive("partition_fang", "q", q, 1)
    generator = _generator(key)
    # Some other group, each with the same probability.
    other = (labels + generator.integers(1, num_classes, len(labels))) % num_classes
    group = np.where(generator.random(len(labels)) < q, labels, other)
    # Client `members[g + L i]` is member i of group g.
    members = generator.permutation(num_clients)
    group_sizes = np.bincount(np.arange(num_clients) % num_classes)
    member = np.floor(generator.random(len(labels)) * group_sizes[group]).astype(int)
    owners = members[group + num_classes * member]
    return _partition(
        "partition_fang", owners, num_clients, "ask for fewer clients or move q towards 1 / L"
    )


def partition_dirichlet(
    key: Key, labels: Array, num_clients: int, *, concentration: float
) -> Partition:
    """Splits each label over the clients in proportions drawn from a Dirichlet distribution.

    For each label, `p ~ Dirichlet(concentration * 1_n)` are the shares of the clients in its
    examples; a small concentration gives each label to few clients. All examples are used. (Hsu et
    al. 2019 draw proportions of labels for each client instead, all clients being of one size.)

    Args:
      key: a key.
      labels: int32[examples].
      num_clients: n.
      concentration: parameter of the distribution, above 0; 0.1 is uneven, 100 nearly even.

    Returns:
      `Partition(index, counts)`.

    Raises:
      ValueError: a concentration that is not positive, or a client without data.

    Source: M. Yurochkin, M. Agarwal, S. Ghosh, K. Greenewald, N. Hoang, Y. Khazaeni, "Bayesian
    Nonparametric Federated Learning of Neural Networks", ICML 2019.
    """
    labels = _labels("partition_dirichlet", labels, num_clients)
    _positive("partition_dirichlet", "concentration", concentration)
    generator = _generator(key)
    owners = np.zeros(len(labels), int)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(num_clients, concentration))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for client, part in enumerate(np.split(rows, cuts)):
            owners[part] = client
    advice = "ask for fewer clients or raise concentration"
    return _partition("partition_dirichlet", owners, num_clients, advice)


def partition_shards(
    key: Key, labels: Array, num_clients: int, *, shards_per_client: int = 2
) -> Partition:
    """Sorts the examples by label, cuts them into shards and deals the shards out.

    With two shards most clients see two labels. All examples are used; the sizes of the shards
    differ by one at most.

    Args:
      key: a key.
      labels: int32[examples].
      num_clients: n.
      shards_per_client: how many shards each client gets.

    Returns:
      `Partition(index, counts)`.

    Raises:
      ValueError: a count below 1, or a client without data.

    Source: B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
    """
    labels = _labels("partition_shards", labels, num_clients)
    checks.at_least("partition_shards", "shards_per_client", shards_per_client, 1)
    generator = _generator(key)
    num_shards = num_clients * shards_per_client
    owner_of_shard = generator.permutation(np.arange(num_shards) % num_clients)
    owners = np.zeros(len(labels), int)
    # Equal labels in random order, so that a cut within a label is no order of the data set.
    by_label = np.lexsort((generator.random(len(labels)), labels))
    for shard, rows in enumerate(np.array_split(by_label, num_shards)):
        owners[rows] = owner_of_shard[shard]
    advice = "ask for fewer clients or fewer shards"
    return _partition("partition_shards", owners, num_clients, advice)
