"""`simulate`: federated training under attack; a run is one compiled loop over rounds."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from advjax import aggregation
from advjax.aggregation.aggregators import report_of
from advjax.core import checks, losses, metrics, parallel, random, vectors
from advjax.core.descriptions import described
from advjax.core.io import PathLike
from advjax.core.typing import Array, Key
from advjax.federated.clients import Client, FedAvg, FedSGD
from advjax.federated.tasks import Task, check_mask
from advjax.poisoning import Context, Poisoning
from advjax.training.checkpoints import Checkpoints
from advjax.training.fitting import as_float, fingerprint

_SECONDS_PER_CALL = 1.0  # how often the progress bar moves
_TEST_BATCH = 500  # images


class History(NamedTuple):
    """What a simulation returns; with a stack of keys every leaf has a leading axis of runs.

    Attributes:
      round: how many rounds were done at each evaluation, int32[e]; the last one is always there.
      accuracy: of the global model on the test data, f32[e]; 1 / L for L classes where the model
        or its logits are not finite.
      loss: mean cross-entropy on the test data, f32[e]; infinite where the model is not finite.
      malicious_share: the share of the Byzantine clients in the weights that the rule gave in that
        round, f32[e]; NaN where the rule has no weights.
      distance: distance of the aggregate to the mean of the honest updates, f32[e]; NaN where no
        honest client was drawn.
      cosine: cosine of the angle between the two, f32[e].
      diverged: whether the model was not finite at an evaluation, bool.
      variables: the final global model, for `advjax.bind`.
    """

    round: Array
    accuracy: Array
    loss: Array
    malicious_share: Array
    distance: Array
    cosine: Array
    diverged: Array
    variables: Any


class _Records(NamedTuple):
    accuracy: Array
    loss: Array
    malicious_share: Array
    distance: Array
    cosine: Array
    is_finite: Array


class _State(NamedTuple):
    params: jax.Array  # what clients and server exchange, f32[d]
    aside: Any  # running statistics that are averaged apart from it
    memory: Any  # what each client keeps, leaves [n, ...]
    rule: Any
    attack: Any
    records: _Records


class _Cell(NamedTuple):
    """What may differ between runs of one program."""

    task: Task
    is_byzantine: Array
    learning_rate: Array  # f32[rounds]
    server_rate: Array
    eval_every: Array


def sample_clients(
    key: Key, round_number: ArrayLike, num_clients: int, clients_per_round: int | None = None
) -> jax.Array:
    """The clients of a round, drawn without replacement: a function of the key and the round.

    Args:
      key: the key of the simulation.
      round_number: from 0.
      num_clients: n.
      clients_per_round: m; all clients if None.

    Returns:
      int32[m], ascending.

    Static: num_clients, clients_per_round.
    """
    if clients_per_round is None or clients_per_round == num_clients:
        return jnp.arange(num_clients)
    key = jax.random.fold_in(random.named(random.as_typed(key), "sample"), round_number)
    return jnp.sort(jax.random.permutation(key, num_clients)[:clients_per_round])


class _Program(NamedTuple):
    """The pure part of a run: everything static, and functions of arrays."""

    module: nn.Module
    local: FedSGD | FedAvg
    report: Callable[..., tuple[Array, Array, Any]]
    craft: Callable[..., tuple[Array, Any]] | None
    clients_per_round: int
    client_map: str | int
    statistics: str
    mesh: Mesh | None

    def initialise(self, key: Key, images: Array) -> Any:
        return dict(self.module.init(key, as_float(images[:1])))

    def exchanged(self, variables: Any) -> tuple[Array, Any]:
        """What goes through attack and rule, as a vector, and what is averaged aside."""
        aside = {}
        if self.statistics == "mean":
            aside = {name: tree for name, tree in variables.items() if name != "params"}
            variables = {"params": variables["params"]}
        return vectors.ravel(variables)[0], aside

    def variables(self, images: Array, params: Array, aside: Any) -> Any:
        """The inverse of `exchanged`."""
        shapes = jax.eval_shape(self.initialise, jax.random.key(0), images)
        kept = {name: tree for name, tree in shapes.items() if name not in aside}
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)
        return vectors.ravel(zeros)[1](params) | aside

    def init(self, key: Key, task: Task) -> tuple[Array, Any, Any]:
        """The first global model, and what the clients keep."""
        variables = self.initialise(random.named(key, "init"), task.images)
        memory = jax.tree.map(
            lambda leaf: jnp.zeros((task.num_clients, *leaf.shape), leaf.dtype),
            self.local.init(variables["params"]),
        )
        return *self.exchanged(variables), memory

    def mapped(self, function: Callable[[Any], Any], values: Any, how: str | int) -> Any:
        """`function` of each of the values, on the devices of the mesh."""

        def each(values):
            if how == "vmap":
                return jax.vmap(function)(values)
            batch_size = how if isinstance(how, int) else None
            return jax.lax.map(function, values, batch_size=batch_size)

        if self.mesh is None:
            return each(values)
        # Inside shard_map: this device's share. The last value fills up the last devices.
        axis = self.mesh.axis_names[0]
        size = len(jax.tree.leaves(values)[0])
        share = -(-size // self.mesh.shape[axis])
        rows = jnp.minimum(jax.lax.axis_index(axis) * share + jnp.arange(share), size - 1)
        mine = each(jax.tree.map(lambda leaf: leaf[rows], values))
        whole = jax.lax.all_gather(mine, axis, tiled=True)
        return jax.tree.map(lambda leaf: leaf[:size], whole)

    def run(self, state: _State, key: Key, cell: _Cell, start, stop) -> _State:
        """The rounds `start ... stop - 1`."""
        return jax.lax.fori_loop(
            start, stop, lambda number, state: self.round(state, key, cell, number), state
        )

    def round(self, state: _State, key: Key, cell: _Cell, number) -> _State:
        task = cell.task
        variables = self.variables(task.images, state.params, state.aside)
        clients = sample_clients(key, number, task.num_clients, self.clients_per_round)
        key_local = jax.random.fold_in(random.named(key, "local"), number)

        def train(client):
            own = Client(
                jax.random.fold_in(key_local, client), task.images, task.labels,
                task.index[client], task.counts[client],
            )  # fmt: skip
            memory = jax.tree.map(lambda leaf: leaf[client], state.memory)
            rate = cell.learning_rate[number]
            return self.local.train(self.module, own, variables, memory, rate)

        changes, memory = self.mapped(train, clients, self.client_map)
        # Not in the loop over clients, where XLA concatenates number by number.
        honest, aside = jax.vmap(self.exchanged)(changes)
        is_byzantine = cell.is_byzantine[clients]
        updates, attack = honest, state.attack
        if self.craft is not None:
            key_attack = jax.random.fold_in(random.named(key, "attack"), number)
            context = self.context(state, cell, number, clients)
            updates, attack = self.craft(key_attack, honest, is_byzantine, context, state.attack)
        aggregate, weights, rule = self.report(updates, state.rule, state.params, clients)
        for name, value, shape in [
            ("attack", updates, honest.shape),
            ("rule", aggregate, state.params.shape),
            ("rule's weights", weights, clients.shape),
        ]:
            if jnp.shape(value) != shape:
                raise ValueError(
                    f"simulate: need f32{list(shape)} from the {name}, got shape "
                    f"{jnp.shape(value)}."
                )
        params = state.params + cell.server_rate * aggregate.astype(state.params.dtype)
        aside = jax.tree.map(
            lambda old, change: old + cell.server_rate * jnp.mean(change, axis=0),
            state.aside, aside,
        )  # fmt: skip

        # Out of the branch below, into which XLA would copy all updates.
        compared = _compare(aggregate, weights, honest, is_byzantine)

        def record(records: _Records) -> _Records:
            accuracy, loss, is_finite = self.evaluate(task, params, aside)
            new = _Records(accuracy, loss, *compared, is_finite)
            slot = number // cell.eval_every
            return jax.tree.map(lambda column, value: column.at[slot].set(value), records, new)

        done = number + 1
        is_due = (done % cell.eval_every == 0) | (done == cell.learning_rate.shape[0])
        return _State(
            params,
            aside,
            jax.tree.map(lambda all_, own: all_.at[clients].set(own), state.memory, memory),
            rule,
            attack,
            jax.lax.cond(is_due, record, lambda records: records, state.records),
        )

    def context(self, state: _State, cell: _Cell, number, clients) -> Context:
        """What the attacker sees."""
        task = cell.task

        def examples(row, position):
            rows = task.index[clients[row], position]
            return as_float(task.images[rows]), task.labels[rows]

        def logits_fn(params, x):
            variables = self.variables(task.images, params, state.aside)
            return jnp.asarray(self.module.apply(variables, x))

        def initialise(key):
            return self.exchanged(self.initialise(key, task.images))[0]

        return Context(
            params=state.params,
            round=number,
            server_rate=cell.server_rate,
            clients=clients,
            counts=task.counts[clients],
            examples=examples,
            logits_fn=logits_fn,
            initialise=initialise,
        )

    def evaluate(self, task: Task, params: Array, aside: Any) -> tuple[Array, ...]:
        """Loss and accuracy on the test data, and whether the model is finite."""
        variables = self.variables(task.images, params, aside)
        size = task.test_labels.shape[0]
        batch_size = min(size, _TEST_BATCH)

        def judge(rows):
            logits = jnp.asarray(self.module.apply(variables, as_float(task.test_images[rows])))
            labels = task.test_labels[rows]
            return (
                metrics.is_correct(logits, labels),
                losses.cross_entropy(logits, labels),
                jnp.all(jnp.isfinite(logits), axis=-1),
            )

        rows = jnp.arange(parallel.padded(size, batch_size)) % size
        judged = self.mapped(judge, rows.reshape(-1, batch_size), "map")
        correct, loss, is_finite = (value.reshape(-1)[:size] for value in judged)
        is_finite = jnp.all(is_finite)
        for leaf in jax.tree.leaves((params, aside)):
            is_finite &= jnp.all(jnp.isfinite(leaf))
        return (
            jnp.where(is_finite, jnp.mean(correct), 1 / task.num_classes),
            jnp.where(is_finite, jnp.mean(loss), jnp.inf),
            is_finite,
        )


def _compare(aggregate: Array, weights: Array, honest: Array, is_byzantine: Array):
    """The malicious share, and distance and cosine of the aggregate to the honest mean."""
    share = jnp.sum(jnp.where(is_byzantine, weights, 0)) / jnp.sum(weights)
    mean = vectors.combine(~is_byzantine / jnp.sum(~is_byzantine), honest)
    norms = jnp.linalg.norm(aggregate) * jnp.linalg.norm(mean)
    return share, jnp.linalg.norm(aggregate - mean), jnp.vdot(aggregate, mean) / norms


@functools.lru_cache(maxsize=32)
def _compiled(program: _Program, is_stack: bool):
    """`init` of one run, and `run` of one or of a stack of them, compiled once for all cells."""
    run = program.run
    if is_stack:

        def run(state, key, cell, start, stop):
            def one(values):
                state, key = values
                return program.run(state, key, cell, start, stop)

            if program.client_map == "vmap":
                return jax.vmap(one)((state, key))
            return jax.lax.map(one, (state, key))

    if program.mesh is not None:
        # Every device computes all but the work of the clients and the test batches, so nothing is
        # summed over devices. check_vma=False: the gradient of a client stays its own.
        everywhere = PartitionSpec()
        run = jax.shard_map(
            run, mesh=program.mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )
    return jax.jit(program.init), jax.jit(run, donate_argnums=0)


@functools.lru_cache(maxsize=32)
def _configured(lift: Callable, function: Callable, args: tuple, options: tuple) -> Callable:
    """What `lift` makes of a function; one object for equal options, so one compilation."""
    return lift(functools.partial(function, *args, **dict(options)))


def _lifted(lift: Callable, function: Callable) -> Callable:
    parts = function, (), ()
    if isinstance(function, functools.partial):
        parts = function.func, function.args, tuple(sorted(function.keywords.items()))
    try:
        return _configured(lift, *parts)
    except TypeError:  # options that cannot be hashed, such as arrays
        return _configured.__wrapped__(lift, *parts)


def _reporting(rule: Callable[..., jax.Array]) -> Any:
    return aggregation.stateless(rule, key=jax.random.key(0)).report


def _knowing(attack: Callable[..., Array]) -> Callable:
    """The attack as a `craft` whose state is the mask of the clients that it knows."""

    def craft(key, updates, is_byzantine, context, knows):
        return attack(key, updates, is_byzantine, knows=knows[context.clients]), knows

    return craft


def _own(leaf: Any) -> jax.Array:
    """A copy that may be donated, of a type that stays the same in the loop."""
    leaf = jnp.asarray(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.copy(leaf)
    return jnp.array(leaf, leaf.dtype)


def _check_made(name: str, function: Any, made: type, example: str) -> None:
    """A rule or an attack is a function, and not one that makes what is wanted."""
    if not callable(function):
        given = repr(function) if isinstance(function, str) else type(function).__name__
        raise ValueError(
            f"simulate: need {name} as a function, such as {example}, or as a {made.__name__}, got "
            f"{given}."
        )
    maker = function
    while isinstance(maker, functools.partial):
        maker = maker.func
    if getattr(maker, "__annotations__", {}).get("return") in (made, made.__name__):
        raise ValueError(
            f"simulate: need {name}={maker.__name__}(...), what the function makes when it is "
            f"called, got the function {maker.__name__}."
        )


def _check_local(local: Any) -> None:
    if isinstance(local, type):
        raise ValueError(
            f"simulate: need local={local.__name__}(...), an object of the class, got the class "
            f"{local.__name__}."
        )
    if not hasattr(local, "train"):
        raise ValueError(
            f"simulate: need local work, such as FedAvg(num_epochs=1), got {type(local).__name__}."
        )


def _check_clients(state: Any, num_clients: int) -> None:
    """A rule that remembers clients, such as `afa`, has room for all."""
    memories = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, aggregation.Reputation))
    for memory in memories:
        if isinstance(memory, aggregation.Reputation):
            known = memory.good.shape[-1]
            if known < num_clients:
                raise ValueError(
                    f"simulate: need afa of all {num_clients} clients, got num_clients={known}."
                )


def _rule(rule: Any) -> tuple[Callable, Callable[[Key, Array], Any]]:
    """Of a rule, its `report`, the same object for the same rule, and its `init`."""
    if isinstance(rule, aggregation.Aggregator):
        return report_of(rule), lambda key, params: rule.init(params)
    _check_made("rule", rule, aggregation.Aggregator, "aggregation.mean")
    return _lifted(_reporting, rule), lambda key, params: aggregation.stateless(rule, key=key).init(
        params
    )


def _attack(
    attack: Any, knows: str | Array | None, is_byzantine: np.ndarray, counts: np.ndarray
) -> tuple[Callable | None, Callable[[Key, Array], Any]]:
    """Of an attack, its `craft`, the same object for the same attack, and its `init`."""
    if isinstance(attack, Poisoning) or attack is None:
        if knows is not None:
            raise ValueError(
                "simulate: knows is for an attack that is a function; a Poisoning has its own, see "
                "poisoning.stateless."
            )
        if attack is None:
            return None, lambda key, params: ()
        attack.check(is_byzantine, counts)
        return attack.craft, attack.init
    _check_made("poisoning", attack, Poisoning, "poisoning.lie")
    known = _known_clients(knows, is_byzantine)
    return _lifted(_knowing, attack), lambda key, params: known


def _known_clients(knows: str | Array | None, is_byzantine: np.ndarray) -> jax.Array:
    words = {
        "byzantine": is_byzantine,
        "honest": ~is_byzantine,
        "all": np.ones_like(is_byzantine),
    }
    if knows is None or isinstance(knows, str):
        knows = "byzantine" if knows is None else knows
        checks.known("simulate", "knowledge", knows, words)
        return jnp.asarray(words[knows])
    return jnp.asarray(check_mask("simulate", "knows", knows, len(is_byzantine)))


def _mask(num_byzantine: int, is_byzantine: Array | None, num_clients: int) -> np.ndarray:
    if is_byzantine is None:
        checks.at_least("simulate", "num_byzantine", num_byzantine, 0)
        is_byzantine = np.arange(num_clients) < num_byzantine
    else:
        is_byzantine = check_mask("simulate", "is_byzantine", is_byzantine, num_clients)
        if num_byzantine not in (0, is_byzantine.sum()):
            raise ValueError(
                "simulate: need num_byzantine or is_byzantine, got "
                f"num_byzantine={num_byzantine} and a mask of {is_byzantine.sum()}."
            )
        num_byzantine = int(is_byzantine.sum())
    if 2 * num_byzantine > num_clients:
        raise ValueError(
            "simulate: need 2 * num_byzantine <= num_clients, got "
            f"num_byzantine={num_byzantine} and num_clients={num_clients}."
        )
    return is_byzantine


def _describe(program: _Program, rule, attack, key: Key, cell: _Cell, state: _State) -> dict:
    """What a run is, as far as it can be told: enough to refuse another run's checkpoint."""
    shapes = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda s: s, state))[0]
    arrays = (cell.task, cell.is_byzantine, cell.learning_rate, cell.server_rate)
    return {
        "module": " ".join(repr(program.module).split()),
        "local": {
            field.name: described(getattr(program.local, field.name))
            for field in dataclasses.fields(program.local)
        },
        "rule": described(rule),
        "poisoning": described(attack),
        "clients_per_round": program.clients_per_round,
        "statistics": program.statistics,
        "num_rounds": len(cell.learning_rate),
        "eval_every": int(cell.eval_every),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "data": fingerprint(arrays),
        "start": fingerprint((state.rule, state.attack)),
        "state": {jax.tree_util.keystr(path): f"{s.dtype}{list(s.shape)}" for path, s in shapes},
    }


def simulate(
    key: Key,
    task: Task,
    *,
    rule: aggregation.Aggregator | Callable[..., Array],
    poisoning: Poisoning | Callable[..., Array] | None = None,
    num_rounds: int,
    num_byzantine: int = 0,
    is_byzantine: Array | None = None,
    knows: str | Array | None = None,
    clients_per_round: int | None = None,
    local: FedSGD | FedAvg = FedSGD(),  # noqa: B008 it is immutable
    server_rate: ArrayLike = 1.0,
    client_map: str | int = "auto",
    eval_every: int = 1,
    statistics: str = "aggregate",
    mesh: Mesh | None = None,
    checkpoint_dir: PathLike | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> History:
    """Trains a network on the data of many clients, some of them malicious.

    In each round the server draws clients and sends them the global model g; each makes an update
    `w_i - g` by its local work; the attack replaces the updates of the malicious ones; the server
    steps `g + server_rate * rule(updates)`. All random numbers are functions of the key, the round
    and the client, so a run that is killed and called again with the same arguments ends with the
    same model, bit for bit.

    A call compiles once for each module, local work, rule, attack, and shapes. Other keys, masks,
    data of the same shape, learning and server rates do not compile again, nor do rules and attacks
    from one `aggregation.choose` or `poisoning.choose`, which differ in their states.

    Args:
      key: a key, or a stack of keys [r] for as many runs; run i is that of `key[i]` up to rounding.
      task: network and data, see `make_task`.
      rule: an `Aggregator`, or a function `updates f32[n, d] -> f32[d]` such as
        `functools.partial(aggregation.krum, num_byzantine=2)`. The number of malicious clients that
        it assumes is its own option; it stays as it is whichever clients are drawn.
      poisoning: a `Poisoning`, or a function `(key, updates, is_byzantine, knows=...) -> updates`
        such as `poisoning.lie`; None for no attack. For flipped labels see `poison_labels`.
      num_rounds: rounds.
      num_byzantine: this many of the first clients are malicious.
      is_byzantine: which clients are malicious, bool[n], in place of `num_byzantine`.
      knows: whose honest updates an attack that is a function sees: "byzantine" (the default)
        those of the malicious clients, "honest", "all", or a mask bool[n].
      clients_per_round: how many clients are drawn each round, see `sample_clients`; all if None.
      local: the work of a client, `FedSGD` or `FedAvg`.
      server_rate: the step of the server, eta.
      client_map: "vmap" trains the clients side by side, "map" one after the other, an integer as
        many side by side as it says: the same result up to rounding. "auto" is "map" on a CPU,
        where it is faster, and "vmap" elsewhere. A stack of runs is mapped likewise.
      eval_every: rounds between evaluations; there is always one after the last round.
      statistics: what becomes of running statistics, such as those of batch normalisation.
        "aggregate": they are part of the updates, so rule and attack act on them as on weights.
        "mean": the server adds the plain mean of all clients' changes, out of reach of both.
      mesh: devices to spread the clients over; the data lie whole on each. The result is that of
        one device.
      checkpoint_dir: folder for checkpoints; if it holds one of this run, the run goes on there.
        Rules and attacks are told apart by their names and options, not by their code.
      checkpoint_every: seconds between checkpoints; one is always written at the end.
      progress: show a progress bar with accuracy and loss.

    Returns:
      A `History`. A model that is not finite counts as accuracy 1 / L, and the run goes on.

    Static: the module, rule, poisoning, num_rounds, clients_per_round, local (but its learning
    rate), client_map, statistics, mesh.

    Raises:
      ValueError: more malicious clients than half, counts out of range, masks of another shape, a
        rule, an attack or local work that is none or was not made yet, a rule that refuses so few
        clients or remembers fewer, an attack that refuses these clients, or a checkpoint of another
        run.

    Example:
      >>> import jax
      >>> from advjax import aggregation, data, federated, models
      >>> train, test = data.load("digits", "train"), data.load("digits", "test")
      >>> partition = federated.partition_iid(jax.random.key(0), train.labels, 10)
      >>> task = federated.make_task(models.make("mlp", 10), train, test, partition)
      >>> history = federated.simulate(
      ...     jax.random.key(0), task, rule=aggregation.mean, num_rounds=4,
      ...     local=federated.FedAvg(num_epochs=2), eval_every=2, progress=False)
      >>> history.round, bool(history.accuracy[-1] > 0.5)
      (Array([2, 4], dtype=int32), True)
    """
    n = task.num_clients
    checks.at_least("simulate", "num_rounds", num_rounds, 1)
    checks.at_least("simulate", "eval_every", eval_every, 1)
    checks.known("simulate", "statistics", statistics, ("aggregate", "mean"))
    if isinstance(client_map, str):
        checks.known("simulate", "client_map", client_map, ("auto", "map", "vmap"))
    else:
        checks.at_least("simulate", "client_map", client_map, 1)
    clients_per_round = n if clients_per_round is None else clients_per_round
    checks.at_least("simulate", "clients_per_round", clients_per_round, 1)
    if clients_per_round > n:
        raise ValueError(
            "simulate: need clients_per_round <= num_clients, got "
            f"clients_per_round={clients_per_round} and num_clients={n}."
        )
    if client_map == "auto":
        client_map = "map" if jax.default_backend() == "cpu" else "vmap"
    _check_local(local)
    mask = _mask(num_byzantine, is_byzantine, n)
    keys = random.as_typed(key)
    if keys.ndim > 1 or not keys.size:
        raise ValueError(f"simulate: need one key or a stack of keys [r], got shape {keys.shape}.")
    report, init_rule = _rule(rule)
    craft, init_attack = _attack(poisoning, knows, mask, np.asarray(task.counts))
    rate = local.learning_rate
    learning_rate = jax.vmap(rate)(jnp.arange(num_rounds)) if callable(rate) else rate
    cell = _Cell(
        dataclasses.replace(task, module=None),
        jnp.asarray(mask),
        jnp.broadcast_to(jnp.asarray(learning_rate, jnp.float32), (num_rounds,)),
        jnp.asarray(server_rate, jnp.float32),
        jnp.asarray(eval_every, jnp.int32),
    )
    program = _Program(
        task.module, dataclasses.replace(local, learning_rate=0.0), report, craft,
        clients_per_round, client_map, statistics, mesh,
    )  # fmt: skip
    try:
        init, run = _compiled(program, keys.ndim == 1)
    except TypeError:  # a module or an option that cannot be hashed
        init, run = _compiled.__wrapped__(program, keys.ndim == 1)
    num_evaluations = -(-num_rounds // eval_every)

    def start(key):
        params, aside, memory = init(key, cell.task)
        unknown = jnp.full(num_evaluations, jnp.nan)
        records = _Records(*[unknown] * 5, is_finite=jnp.ones(num_evaluations, bool))
        rule_state = init_rule(random.named(key, "rule"), params)
        _check_clients(rule_state, n)
        attack_state = init_attack(random.named(key, "poisoning"), params)
        state = _State(params, aside, memory, rule_state, attack_state, records)
        return jax.tree.map(_own, state)

    if keys.ndim == 0:
        state = start(keys)
    else:
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(start, keys))
    description = {}
    if checkpoint_dir is not None:
        description = _describe(program, rule, poisoning, keys, cell, state)
    state, keys, cell = parallel.place((state, keys, cell), mesh)
    state = _rounds(
        lambda state, start, stop: run(state, keys, cell, start, stop), state, num_rounds,
        eval_every, description, mesh, checkpoint_dir, checkpoint_every, progress,
    )  # fmt: skip

    state = jax.tree.map(
        lambda leaf: parallel.gather(leaf, mesh), state._replace(rule=(), attack=())
    )
    to_variables = functools.partial(program.variables, task.images)
    if keys.ndim == 1:
        to_variables = jax.vmap(to_variables)
    *curves, is_finite = state.records
    done = jnp.minimum(eval_every * jnp.arange(1, num_evaluations + 1), num_rounds)
    return History(
        jnp.broadcast_to(done, is_finite.shape),
        *curves,
        diverged=~jnp.all(is_finite, axis=-1),
        variables=to_variables(state.params, state.aside),
    )


def _rounds(
    run: Callable[..., _State],
    state: _State,
    num_rounds: int,
    eval_every: int,
    description: dict[str, Any],
    mesh: Mesh | None,
    checkpoint_dir: PathLike | None,
    checkpoint_every: float,
    progress: bool,
) -> _State:
    """All rounds from where the checkpoints stand, about a second of them a call."""
    checkpoints, done = None, 0
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(checkpoint_dir, description, caller="simulate")
        restored = checkpoints.restore({"done": jnp.zeros((), jnp.int32), "state": state})
        if restored is not None:
            done, state = int(restored["done"]), restored["state"]
    chunk, saved_at = 1, time.monotonic()
    is_shared = checkpoints is not None or parallel.is_global(mesh)
    is_quiet = not (progress and parallel.is_main_process()) or done == num_rounds
    with tqdm(
        total=num_rounds, initial=done, desc="simulate", unit="round", disable=is_quiet
    ) as bar:
        is_compiled = False
        while done < num_rounds:
            stop, started = min(done + chunk, num_rounds), time.monotonic()
            state = run(state, done, stop)
            accuracy, loss = np.asarray(state.records.accuracy), np.asarray(state.records.loss)
            judged = accuracy.shape[-1] if stop == num_rounds else stop // eval_every
            if judged:
                bar.set_postfix(
                    accuracy=f"{np.mean(accuracy[..., judged - 1]):.2%}",
                    loss=f"{np.mean(loss[..., judged - 1]):.4f}",
                    refresh=False,
                )
            bar.update(stop - done)
            seconds = max(time.monotonic() - started, 1e-4)
            # The first call compiles; from then on aim at one call a second.
            if is_compiled:
                chunk = max(1, round((stop - done) * _SECONDS_PER_CALL / seconds))
            is_compiled, done = True, stop
            is_due = time.monotonic() - saved_at >= checkpoint_every
            if is_shared:
                chunk, is_due = parallel.agree(chunk, is_due)
            if checkpoints is not None and (is_due or done == num_rounds):
                checkpoints.save(done, {"done": jnp.asarray(done, jnp.int32), "state": state})
                saved_at = time.monotonic()
    return state
