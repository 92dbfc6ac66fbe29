"""The simulator: against loops in NumPy and optax, on devices, interrupted, under attack."""

import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import advjax
from advjax import aggregation, data, federated, models, parallel, poisoning
from advjax.federated import simulation
from advjax.federated.clients import Client

KEY = jax.random.key(3)
LINEAR = models.make("mlp", 10, hidden=())
NET = models.make("mlp", 10, hidden=(8,))
NUM_CLIENTS, NUM_ROUNDS = 5, 6


def weighed_mean(updates):
    return jnp.mean(updates, axis=0), jnp.full(len(updates), 1 / len(updates))


MEAN = aggregation.reporting(
    lambda params: (),
    lambda updates, state, params=None, clients=None: (*weighed_mean(updates), state),
)
simulate = functools.partial(
    federated.simulate, rule=MEAN, num_rounds=NUM_ROUNDS, eval_every=2, progress=False
)


def make_task(module, num_clients=NUM_CLIENTS, num_examples=60):
    """Clients of unequal sizes."""
    train = data.load("digits", "train").take(num_examples)
    test = data.load("digits", "test").take(90)
    partition = federated.partition_dirichlet(
        jax.random.key(1), train.labels, num_clients, concentration=5.0
    )
    assert np.ptp(partition.counts) > 0
    return federated.make_task(module, train, test, partition)


@pytest.fixture(scope="module")
def linear():
    return make_task(LINEAR)


@pytest.fixture(scope="module")
def task():
    return make_task(NET)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def own_examples(task, client):
    rows = np.asarray(task.index[client][: task.counts[client]])
    images = np.asarray(task.images[rows], np.float64).reshape(len(rows), -1) / 255
    return images, np.asarray(task.labels[rows])


def gradient_by_hand(kernel, bias, images, labels):
    logits = images @ kernel + bias
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances = chances / chances.sum(1, keepdims=True) - np.eye(10)[labels]
    return images.T @ chances / len(labels), chances.mean(0)


def first_weights(module, key=KEY):
    """The first global model: that of `training.fit` for the same key."""
    from advjax.core import random

    return module.init(random.named(key, "init"), jnp.zeros((1, 8, 8, 1)))["params"]


def test_fedsgd_is_the_loop_by_hand(linear):
    """Drawn clients, unequal sizes, worker momentum, a schedule, a server rate: in NumPy."""
    history = simulate(
        KEY, linear, clients_per_round=3, server_rate=0.7,
        local=federated.FedSGD(lambda t: 0.5 / (1 + t), momentum=0.6),
    )  # fmt: skip
    dense = jax.tree.map(np.float64, first_weights(LINEAR)["logits"])
    kernel, bias = dense["kernel"], dense["bias"]
    momenta = [(0.0, 0.0)] * NUM_CLIENTS
    for number in range(NUM_ROUNDS):
        changes = []
        for client in np.asarray(federated.sample_clients(KEY, number, NUM_CLIENTS, 3)):
            gradient = gradient_by_hand(kernel, bias, *own_examples(linear, client))
            momenta[client] = tuple(
                0.6 * m + 0.4 * g for m, g in zip(momenta[client], gradient, strict=True)
            )
            changes.append([-0.5 / (1 + number) * m for m in momenta[client]])
        kernel = kernel + 0.7 * np.mean([change[0] for change in changes], axis=0)
        bias = bias + 0.7 * np.mean([change[1] for change in changes], axis=0)
    found = history.variables["params"]["logits"]
    # float32 against float64 over six steps.
    np.testing.assert_allclose(found["kernel"], kernel, atol=2e-6)
    np.testing.assert_allclose(found["bias"], bias, atol=2e-6)
    images = np.asarray(linear.test_images, np.float64).reshape(90, -1) / 255
    logits = images @ kernel + bias
    accuracy = np.mean(logits.argmax(1) == linear.test_labels)
    np.testing.assert_allclose(history.accuracy[-1], accuracy, atol=1e-6)
    chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -chances[np.arange(90), np.asarray(linear.test_labels)].mean()
    np.testing.assert_allclose(history.loss[-1], loss, rtol=1e-5)
    np.testing.assert_array_equal(history.round, [2, 4, 6])


def test_fedsgd_of_all_data_is_gradient_descent(linear):
    """With each client counted by its size, FedSGD is a step on the data of all."""
    shares = jnp.asarray(linear.counts / np.sum(linear.counts), jnp.float32)
    rule = aggregation.reporting(
        lambda params: (),
        lambda updates, state, params=None, clients=None: (
            shares[clients] @ updates, shares[clients], state,
        ),
    )  # fmt: skip
    history = simulate(KEY, linear, rule=rule, local=federated.FedSGD(0.5))
    dense = jax.tree.map(np.float64, first_weights(LINEAR)["logits"])
    kernel, bias = dense["kernel"], dense["bias"]
    examples = [own_examples(linear, client) for client in range(NUM_CLIENTS)]
    images, labels = (np.concatenate(part) for part in zip(*examples, strict=True))
    for _ in range(NUM_ROUNDS):
        gradient = gradient_by_hand(kernel, bias, images, labels)
        kernel, bias = kernel - 0.5 * gradient[0], bias - 0.5 * gradient[1]
    found = history.variables["params"]["logits"]
    np.testing.assert_allclose(found["kernel"], kernel, atol=2e-6)  # float32, six steps


def client_of(task, number, client):
    from advjax.core import random

    key = jax.random.fold_in(jax.random.fold_in(random.named(KEY, "local"), number), client)
    return Client(key, task.images, task.labels, task.index[client], task.counts[client])


@pytest.mark.parametrize("length", [dict(num_epochs=2), dict(num_steps=7)], ids=str)
def test_fedavg_is_the_loop_of_optax(task, length):
    batch_size = 4
    local = federated.FedAvg(
        0.05, batch_size=batch_size, optimizer=functools.partial(optax.sgd, momentum=0.5), **length
    )
    history = simulate(KEY, task, local=local, num_rounds=2)
    optimizer = optax.sgd(0.05, momentum=0.5)

    @jax.jit
    def loss(params, x, y):
        logits = NET.apply({"params": params}, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    params = first_weights(NET)
    for number in range(2):
        ends = []
        for client in range(NUM_CLIENTS):
            own, count = client_of(task, number, client), int(task.counts[client])
            weights, state, steps, epoch = params, optimizer.init(params), 0, 0
            steps_per_epoch = -(-count // batch_size)
            total = length.get("num_steps", 2 * steps_per_epoch)
            while steps < total:
                order = np.asarray(own.order(epoch))[:count]
                np.testing.assert_array_equal(np.sort(order), np.sort(task.index[client][:count]))
                for first in range(0, count, batch_size):
                    rows = order[first : first + batch_size]
                    if steps < total:
                        x, y = task.images[rows].astype(jnp.float32) / 255, task.labels[rows]
                        changes, state = optimizer.update(jax.grad(loss)(weights, x, y), state)
                        weights, steps = optax.apply_updates(weights, changes), steps + 1
                epoch += 1
            ends.append(weights)
        params = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *ends)
    # The same steps, summed in another order where a batch is filled up.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        history.variables["params"],
        params,
    )


def test_a_batch_is_drawn_without_replacement(linear):
    own = client_of(linear, 0, 0)
    count = int(own.count)
    orders = [np.asarray(own.order(epoch))[:count] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and (orders[0] != orders[1]).any()
    x, y, weights = own.batch(own.order(0), count - 1, 3)
    np.testing.assert_array_equal(weights, [1, 0, 0])
    assert x.dtype == jnp.float32 and x.min() >= 0 and 0.5 < x.max() <= 1
    np.testing.assert_array_equal(y, linear.labels[orders[0][[count - 1, 0, 1]]])
    whole = simulate(KEY, linear, local=federated.FedSGD(batch_size=None), num_rounds=1)
    large = simulate(KEY, linear, local=federated.FedSGD(batch_size=999), num_rounds=1)
    assert_equal(whole, large)
    part = simulate(KEY, linear, local=federated.FedSGD(batch_size=2), num_rounds=1)
    assert part.loss != whole.loss


FAST = federated.FedAvg(0.2, num_epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def flipped(task):
    """A run that the other tests compare with: drawn clients, one of two malicious."""
    return simulate(
        KEY, task, local=FAST, clients_per_round=3, num_byzantine=2, poisoning=poisoning.sign_flip
    )


attacked = functools.partial(
    simulate, local=FAST, clients_per_round=3, num_byzantine=2, poisoning=poisoning.sign_flip
)


def test_it_learns(task):
    history = simulate(KEY, task, local=FAST, num_rounds=60)
    assert history.accuracy[-1] > 0.6 > 0.3 > history.accuracy[0] and not history.diverged
    logits = advjax.bind(NET, history.variables)(task.test_images.astype(jnp.float32) / 255)
    assert np.mean(np.argmax(logits, -1) == task.test_labels) == history.accuracy[-1]


@pytest.mark.parametrize("client_map", ["vmap", 2])
def test_how_clients_are_mapped_does_not_matter(task, flipped, client_map):
    # One product of a batch of clients may round otherwise than one client's: 36 steps.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        attacked(KEY, task, client_map=client_map), flipped,
    )  # fmt: skip


def test_what_the_rule_chose(task, flipped):
    """Share of the malicious in the weights, distance and cosine to the honest mean."""
    clients = [np.asarray(federated.sample_clients(KEY, t, NUM_CLIENTS, 3)) for t in range(6)]
    shares = [np.mean(c < 2) for c in clients]
    np.testing.assert_allclose(flipped.malicious_share, np.float32(shares)[1::2])
    assert np.ptp(shares) > 0 and np.all(np.isfinite(flipped.distance))
    clean = attacked(KEY, task, poisoning=None, num_byzantine=0)
    np.testing.assert_allclose(clean.distance, 0, atol=1e-6)
    np.testing.assert_allclose(clean.cosine, 1, atol=1e-6)
    np.testing.assert_array_equal(clean.malicious_share, 0)
    untold = aggregation.Aggregator(
        lambda params: (), lambda u, state, params=None, clients=None: (-2 * u.mean(0), state)
    )
    turned = simulate(KEY, task, rule=untold, num_rounds=1)
    assert np.isnan(turned.malicious_share[0])
    np.testing.assert_allclose(turned.cosine, -1, atol=1e-6)


def test_clients_are_a_function_of_key_and_round():
    draws = [np.asarray(federated.sample_clients(KEY, t, 20, 6)) for t in range(40)]
    for draw in draws:
        assert len(set(draw)) == 6 and np.all(np.diff(draw) > 0) and draw[0] >= 0 and draw[-1] < 20
    assert len({tuple(draw) for draw in draws}) == 40
    assert set(np.concatenate(draws)) == set(range(20))  # missing one: 20 * 0.7^40 = 1e-5
    np.testing.assert_array_equal(draws[7], jax.jit(
        lambda t: federated.sample_clients(KEY, t, 20, 6))(7))  # fmt: skip
    np.testing.assert_array_equal(federated.sample_clients(KEY, 5, 20), np.arange(20))


class Counting(nn.Module):
    """Counts how often it is traced."""

    traces = 0

    @nn.compact
    def __call__(self, x):
        Counting.traces += not self.is_initializing()
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def test_cells_share_one_compilation():
    """Keys, masks, labels, rates, rules and attacks: one program, as if each ran alone."""
    task = make_task(Counting())
    rules = aggregation.choose({"mean": MEAN, "median": aggregation.stateless(
        lambda updates: jnp.median(updates, axis=0))})  # fmt: skip
    attacks = poisoning.choose({name: poisoning.stateless(getattr(poisoning, name))
                                for name in ("no_attack", "sign_flip")})  # fmt: skip
    local = federated.FedSGD(0.3)
    run = functools.partial(simulate, local=local, num_rounds=2)
    run(KEY, task, rule=rules["mean"], poisoning=attacks["no_attack"])
    traces = Counting.traces
    assert traces > 0
    results = [
        run(KEY, task, rule=rules["median"], poisoning=attacks["sign_flip"], num_byzantine=1),
        run(jax.random.key(8), task, rule=rules["mean"], poisoning=attacks["sign_flip"],
            is_byzantine=np.array([False, True, False, True, False])),
        run(KEY, federated.poison_labels(task, np.arange(5) == 2, lambda y: 9 - y),
            rule=rules["mean"], poisoning=attacks["no_attack"], server_rate=0.5),
        run(KEY, task, rule=rules["mean"], poisoning=attacks["no_attack"],
            local=federated.FedSGD(lambda t: 0.1 * t)),
    ]  # fmt: skip
    assert Counting.traces == traces
    assert len({float(r.loss[-1]) for r in results}) == len(results)


def test_functions_share_a_compilation_too():
    task = make_task(Counting())

    def rule(updates, scale):
        return scale * updates.mean(axis=0)

    def run(seed, scale):
        return simulate(
            jax.random.key(seed), task, rule=functools.partial(rule, scale=scale), num_rounds=1,
            poisoning=functools.partial(poisoning.ipm, epsilon=0.5), num_byzantine=seed,
            knows="all", local=federated.FedSGD(),
        )  # fmt: skip

    first = run(0, 1.0)
    traces = Counting.traces
    run(1, 1.0)
    assert Counting.traces == traces
    assert np.isnan(first.malicious_share[0])
    assert run(0, 2.0).loss[0] != first.loss[0]


def test_a_stack_of_keys_is_one_run_a_key(task, flipped):
    keys = jnp.stack([jax.random.key(9), KEY])
    for client_map in ("map", "vmap"):
        both = attacked(keys, task, client_map=client_map)
        assert both.accuracy.shape == both.round.shape == (2, 3) and both.diverged.shape == (2,)
        # The loop over runs may fuse otherwise: 36 steps.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-4, rtol=1e-4), both, flipped
        )
        assert both.loss[0, -1] != both.loss[1, -1]


# Devices, interruptions


@pytest.mark.parametrize("client_map", ["map", "vmap"])
def test_eight_devices_equal_one(task, flipped, client_map):
    """Three clients over eight devices; no client's gradient is summed with another's."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, has {jax.device_count()}")
    mesh = parallel.make_mesh("clients", jax.devices()[:8])
    spread = attacked(KEY, task, client_map=client_map, mesh=mesh)
    assert len(spread.loss.sharding.device_set) == 1
    if client_map == "map":
        assert_equal(spread, flipped)
    # vmap: one client's product may round otherwise than a batch of clients.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), spread, flipped
    )


class InterruptionError(Exception):
    pass


def test_a_rule_may_do_without_clients(linear):
    rule = aggregation.Aggregator(
        lambda params: (), lambda updates, state, params=None: (weighed_mean(updates)[0], state)
    )
    found, expected = simulate(KEY, linear, rule=rule), simulate(KEY, linear)
    assert_equal(found.variables, expected.variables)


@pytest.mark.parametrize(
    "first, second, name",
    [
        (dict(rule=aggregation.centered_clipping(5.0)),
         dict(rule=aggregation.centered_clipping(1e-6)), "rule"),
        (dict(poisoning=poisoning.stateless(poisoning.lie, knows="all")),
         dict(poisoning=poisoning.stateless(poisoning.lie, knows="byzantine")), "poisoning"),
        (dict(rule=functools.partial(aggregation.mean, weights=np.arange(5) + 1.0)),
         dict(rule=functools.partial(aggregation.mean, weights=np.arange(5) + 2.0)), "rule"),
    ],
    ids=["closure", "attack", "array"],
)  # fmt: skip
def test_another_option_is_another_run(linear, tmp_path, first, second, name):
    run = functools.partial(
        simulate, KEY, linear, num_rounds=2, num_byzantine=2, checkpoint_dir=tmp_path / "c"
    )
    expected = run(**first)
    assert_equal(run(**first).variables, expected.variables)
    with pytest.raises(ValueError, match=f"belong to another run: {name} was .* use another"):
        run(**second)


def keyed_mean(key, updates):
    """A rule with random numbers, so with a key in its state."""
    return jnp.mean(updates, axis=0) + 0.01 * jax.random.normal(key, updates.shape[1:])


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resume_is_exact(linear, tmp_path, monkeypatch, stop_after):
    options = dict(
        rule=keyed_mean, local=federated.FedSGD(0.3, batch_size=4, momentum=0.5),
        clients_per_round=3, poisoning=poisoning.gaussian, num_byzantine=1,
    )  # fmt: skip
    unbroken = simulate(KEY, linear, **options)
    monkeypatch.setattr(simulation, "_SECONDS_PER_CALL", 0.0)  # one round a call
    save, count = simulation.Checkpoints.save, []

    def save_and_stop(self, step, state):
        save(self, step, state)
        count.append(step)
        if len(count) == stop_after:
            raise InterruptionError

    monkeypatch.setattr(simulation.Checkpoints, "save", save_and_stop)
    options |= dict(checkpoint_dir=tmp_path / "c", checkpoint_every=0.0)
    with pytest.raises(InterruptionError):
        simulate(KEY, linear, **options)
    assert count[-1] == stop_after < NUM_ROUNDS
    monkeypatch.setattr(simulation.Checkpoints, "save", save)
    assert_equal(simulate(KEY, linear, **options), unbroken)
    assert_equal(simulate(KEY, linear, **options), unbroken)  # nothing left to do: only restored
    for change, sentence in [
        (dict(num_byzantine=2), "data was"),
        (dict(eval_every=3), "eval_every was 2 and is now 3"),
        (dict(poisoning=poisoning.sign_flip), "poisoning was 'gaussian' and is now 'sign_flip'"),
        (dict(local=federated.FedSGD(0.3)), "local was"),
    ]:
        with pytest.raises(ValueError, match=f"simulate: .* belong to another run: {sentence}"):
            simulate(KEY, linear, **options | change)


_SCRIPT = """
import functools, sys, jax, jax.numpy as jnp, numpy as np
from advjax import data, federated, models, parallel, poisoning
parallel.initialize(sys.argv[1] or None, int(sys.argv[2]), int(sys.argv[3]))
federated.simulation._SECONDS_PER_CALL = float(sys.argv[5])
train, test = data.load("digits", "train").take(60), data.load("digits", "test").take(90)
partition = federated.partition_dirichlet(jax.random.key(1), train.labels, 5, concentration=5.0)
task = federated.make_task(models.make("mlp", 10, hidden=(8,)), train, test, partition)
history = federated.simulate(
    jax.random.key(3), task, rule=functools.partial(jnp.mean, axis=0), num_rounds=6, eval_every=2,
    local=federated.FedAvg(0.2, num_epochs=2, batch_size=8), clients_per_round=3, num_byzantine=2,
    poisoning=poisoning.sign_flip, mesh=parallel.make_mesh() if sys.argv[1] else None,
    checkpoint_dir=sys.argv[4], checkpoint_every=0.0)
np.savez(sys.argv[4] + f"{sys.argv[3]}.npz", *jax.tree.leaves(history))
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


def steps_in(folder):
    names = [path.name[5:] for path in folder.glob("step_*")]
    return [int(name) for name in names if name.isdecimal()]


def without_shares(history):
    return history._replace(malicious_share=jnp.full_like(history.malicious_share, jnp.nan))


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_model(task, tmp_path, flipped):
    """SIGKILL between rounds of a process, then on to the end in this one."""
    folder = tmp_path / "c"
    process = start("", 1, 0, folder, 0.0)
    while process.poll() is None and not steps_in(folder):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and not pathlib.Path(f"{folder}0.npz").exists()
    assert 0 < max(steps_in(folder)) < NUM_ROUNDS
    resumed = attacked(KEY, task, rule=functools.partial(jnp.mean, axis=0), checkpoint_dir=folder)
    assert_equal(resumed, without_shares(flipped))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, flipped):
    """Two processes on loopback share the clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(f"127.0.0.1:{port}", 2, i, tmp_path / "c", 1.0) for i in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for i in range(2):
        with np.load(tmp_path / f"c{i}.npz") as file:
            found = [file[name] for name in file.files]
        assert_equal(found, list(map(np.asarray, jax.tree.leaves(without_shares(flipped)))))
    bar = outputs[0][1]
    assert "simulate: 100%" in bar and "accuracy=" in bar and "loss=" in bar
    assert "simulate:" not in outputs[1][1]


# Attacks


def plant(key, updates, is_byzantine, context, value):
    return jnp.where(is_byzantine[:, None], value, updates), value


def planted(value):
    """All malicious rows of the updates set to a number."""
    return poisoning.Poisoning(lambda key, params: jnp.float32(value), plant)


def counting(key, updates, is_byzantine, knows):
    """All malicious rows set to the number of clients that the attacker knows."""
    return jnp.where(is_byzantine[:, None], jnp.sum(knows, dtype=jnp.float32), updates)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38], ids=str)
def test_a_diverged_model_counts_as_guessing(linear, value):
    history = simulate(KEY, linear, poisoning=planted(value), num_byzantine=1)
    np.testing.assert_allclose(history.accuracy, 0.1)
    assert history.diverged and np.all(np.isinf(history.loss))


def test_what_an_attacker_sees(linear):
    """The context holds what a client works on: the attacker makes its honest update from it."""

    def craft(key, updates, is_byzantine, context, state):
        def loss(params, x, y, is_real):
            logits = context.logits_fn(params, x)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.sum(jnp.where(is_real, each, 0)) / jnp.sum(is_real)

        # A position beyond a client's count is one of its padding.
        row, position = jnp.indices((updates.shape[0], linear.index.shape[1]))
        x, y = context.examples(row.ravel(), position.ravel())
        gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0))(
            context.params,
            x.reshape(*row.shape, *x.shape[1:]),
            y.reshape(row.shape),
            position < context.counts[:, None],
        )
        fresh = context.initialise(key)
        state = state.at[context.round].set(jnp.array([context.server_rate, fresh.shape[0]]))
        return -0.1 * gradients, state + 0 * jnp.sum(fresh) + context.clients[0]

    attack = poisoning.Poisoning(lambda key, params: jnp.zeros((NUM_ROUNDS, 2)), craft)
    rule = aggregation.Aggregator(
        MEAN.init, lambda updates, state, params=None, clients=None: (updates[1], state)
    )
    options = dict(rule=rule, local=federated.FedSGD(0.1), clients_per_round=2)
    crafted = simulate(KEY, linear, poisoning=attack, **options)
    honest = simulate(KEY, linear, **options)
    # Gradients of padded batches, summed in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        crafted.variables, honest.variables,
    )  # fmt: skip


@pytest.mark.parametrize(
    "knows, clients",
    [(None, [0, 1]), ("honest", [2, 3, 4]), ("all", [0, 1, 2, 3, 4]), (np.arange(5) == 3, [3])],
    ids=["none", "honest", "all", "mask"],
)
def test_whom_the_attacker_knows(linear, knows, clients):
    history = simulate(
        KEY, linear, poisoning=counting, knows=knows, num_byzantine=2, clients_per_round=3,
        local=federated.FedSGD(0.0), num_rounds=4,
    )  # fmt: skip
    moved = 0.0
    for number in range(4):
        drawn = np.asarray(federated.sample_clients(KEY, number, NUM_CLIENTS, 3))
        moved += np.mean(drawn < 2) * np.isin(drawn, clients).sum()
    bias = np.asarray(history.variables["params"]["logits"]["bias"])
    np.testing.assert_allclose(bias, moved, rtol=1e-6)
    assert moved > 0


def test_flipped_labels(task):
    is_byzantine = np.arange(NUM_CLIENTS) % 2 == 0
    poisoned = federated.poison_labels(task, is_byzantine, lambda y: 9 - y)
    assert jax.tree.structure(poisoned) == jax.tree.structure(task)
    for client in range(NUM_CLIENTS):
        before, after = (own_examples(t, client)[1] for t in (task, poisoned))
        np.testing.assert_array_equal(after, 9 - before if is_byzantine[client] else before)
    flip = functools.partial(poisoning.label_flip, num_classes=10)
    assert_equal(federated.poison_labels(task, is_byzantine, flip).labels, poisoned.labels)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


def test_what_becomes_of_running_statistics():
    task = make_task(Normed())
    options = dict(local=federated.FedSGD(0.1), num_rounds=1)
    # A small client's batch is filled up with its own examples, which its row repeats.
    means = [np.asarray(task.images[row]).mean(0).ravel() / 255 for row in task.index]

    def statistics(**changes):
        history = simulate(KEY, task, **options | changes)
        return np.asarray(history.variables["batch_stats"]["BatchNorm_0"]["mean"])

    # One step from 0 with momentum 0.5 is half the mean.
    expected = 0.5 * np.mean(means, axis=0)
    for policy in ("aggregate", "mean"):
        run = functools.partial(statistics, statistics=policy, poisoning=planted(0.0))
        np.testing.assert_allclose(run(num_byzantine=0), expected, atol=1e-6)
        zeroed = run(num_byzantine=1)
        # What the malicious client sends is part of the statistics only in the updates.
        expected_now = 0.5 * np.sum(means[1:], axis=0) / 5 if policy == "aggregate" else expected
        np.testing.assert_allclose(zeroed, expected_now, atol=1e-6)
    assert np.abs(means[0]).max() / 10 > 0.05


def test_dropout_is_random_and_reproducible():
    task = make_task(models.make("mlp", 10, hidden=(8,), dropout_rate=0.5))
    run = functools.partial(simulate, task=task, local=FAST, num_rounds=1)
    assert_equal(run(KEY), run(KEY))
    still = simulate(KEY, make_task(NET), local=FAST, num_rounds=1)
    assert run(KEY).loss[0] != still.loss[0]


def test_impact_and_deviation(flipped, task):
    clean = attacked(KEY, task, poisoning=None, num_byzantine=0)
    impact = federated.attack_impact(clean, flipped, at="final")
    expected = 100 * (1 - flipped.accuracy[-1] / clean.accuracy[-1])
    np.testing.assert_allclose(impact, expected, rtol=1e-5)
    curves = np.array([[0.4, 0.9, 0.8], [0.6, 0.5, 0.4]])
    below = curves / 2
    np.testing.assert_allclose(federated.attack_impact(curves, below), [50, 50], rtol=1e-6)
    absolute = federated.attack_impact(curves, below, relative=False)
    np.testing.assert_allclose(absolute, [45, 30], rtol=1e-6)
    deviation = federated.attack_deviation(curves, below, 42.0, at="final")
    np.testing.assert_allclose(deviation, [2, 22], rtol=1e-5)
    np.testing.assert_allclose(federated.attack_deviation(0.9, 0.6, 10.0), 20, rtol=1e-5)
    with pytest.raises(ValueError, match="attack_impact: unknown at 'last'; known: best, final"):
        federated.attack_impact(0.9, 0.6, at="last")


# Bad input


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(num_rounds=0), "need num_rounds >= 1, got num_rounds=0"),
        (dict(eval_every=0), "need eval_every >= 1"),
        (dict(clients_per_round=0), "need clients_per_round >= 1, got clients_per_round=0"),
        (dict(clients_per_round=6), "got clients_per_round=6 and num_clients=5"),
        (dict(num_byzantine=3), r"need 2 \* num_byzantine <= num_clients, got num_byzantine=3"),
        (dict(is_byzantine=np.arange(5) > 1), "got num_byzantine=3 and num_clients=5"),
        (dict(num_byzantine=-1), "need num_byzantine >= 0"),
        (dict(is_byzantine=np.zeros(4, bool)), r"is_byzantine as bool\[5\].*got bool\[4\]"),
        (dict(is_byzantine=np.zeros(5)), r"is_byzantine as bool\[5\].*got float64\[5\]"),
        (dict(num_byzantine=1, is_byzantine=np.arange(5) < 2), "got num_byzantine=1 and a mask"),
        (dict(poisoning=counting, knows=np.ones(3, bool)), r"knows as bool\[5\]"),
        (dict(poisoning=counting, knows="none"), "unknown knowledge 'none'; known: byz"),
        (dict(knows="all"), "knows is for an attack that is a function"),
        (dict(client_map="loop"), "unknown client_map 'loop'; known: auto, map, vmap"),
        (dict(client_map=0), "need client_map >= 1"),
        (dict(statistics="server"), "unknown statistics 'server'; known: aggregate, mean"),
        (dict(rule=functools.partial(aggregation.krum, num_byzantine=2)), "krum: need .*n=5"),
        (dict(rule=lambda updates: updates), r"need f32\[650\] from the rule, got .*\(5, 650\)"),
        (
            dict(rule=aggregation.reporting(
                MEAN.init, lambda u, s, params=None, clients=None: (u[0], u, s))),
            r"need f32\[5\] from the rule's weights",
        ),
        (
            dict(poisoning=lambda key, updates, is_byzantine, knows: updates[0]),
            r"need f32\[5, 650\] from the attack",
        ),
        (dict(rule="krum"), "need rule as a function, such as aggregation.mean, .*got 'krum'"),
        (dict(rule=None), "need rule as a function, .*got NoneType"),
        (dict(rule=aggregation.afa), r"need rule=afa\(...\), .*got the function afa"),
        (dict(rule=aggregation.centered_clipping), r"need rule=centered_clipping\(...\)"),
        (dict(rule=functools.partial(aggregation.fltrust)), r"need rule=fltrust\(...\)"),
        (dict(poisoning="lie"), "need poisoning as a function, such as poisoning.lie, .*'lie'"),
        (dict(poisoning=poisoning.i_fmpa), r"need poisoning=i_fmpa\(...\), .*function i_fmpa"),
        (dict(poisoning=poisoning.f_fmpa), r"need poisoning=f_fmpa\(...\)"),
        (dict(poisoning=poisoning.mpaf), r"need poisoning=mpaf\(...\)"),
        (dict(local=federated.FedAvg), r"need local=FedAvg\(...\), .*got the class FedAvg"),
        (dict(local="avg"), "need local work, such as FedAvg.*, got str"),
        (dict(rule=aggregation.afa(4)), "need afa of all 5 clients, got num_clients=4"),
        (
            dict(rule=aggregation.choose({"a": aggregation.afa(3), "m": MEAN})["m"]),
            "need afa of all 5 clients, got num_clients=3",
        ),
        (dict(rule=aggregation.afa(4), clients_per_round=2), "got num_clients=4"),
        (dict(local=federated.FedSGD(loss_fn=lambda *a: jnp.zeros(()))), "one value an image"),
        (dict(key=jax.random.split(KEY, (2, 2))), r"a stack of keys \[r\], got shape \(2, 2\)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(linear, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        simulate(**dict(key=KEY, task=linear) | change)
    assert "\n" not in str(caught.value)


def test_bad_tasks_and_local_work_are_one_sentence(task):
    train, test = data.load("digits", "train"), data.load("digits", "test")
    wide = data.Dataset(
        np.zeros((3, 9, 9, 1), np.uint8), np.zeros(3, np.int32), 10, "w", "test", test.class_names
    )
    good = federated.partition_iid(KEY, train.labels, 4)
    empty = good._replace(counts=np.array([300, 0, 300, 300]))
    mask = np.ones(NUM_CLIENTS, bool)
    for call, sentence in [
        (lambda: federated.make_task(NET, train, wide, good), r"\(8, 8, 1\).*\(9, 9, 1\)"),
        (lambda: federated.make_task(NET, train, test.take(0), good), "at least one test image"),
        (lambda: federated.make_task(NET, train, test, empty), "but client 1 has 0; leave out"),
        (lambda: federated.make_task(NET, train.take(9), test, good), "training data has 9"),
        (lambda: federated.make_task(NET, train, test, good._replace(counts=good.index)),
         r"counts \[n\]"),
        (lambda: federated.poison_labels(task, mask[:2], lambda y: y), r"bool\[5\]"),
        (lambda: federated.poison_labels(task, mask, lambda y: y[:1]), "flip must return int32"),
        (lambda: federated.poison_labels(task, mask, lambda y: y + 5), "need labels in 0 ... 9"),
        (lambda: federated.FedSGD(batch_size=0), "FedSGD: need batch_size >= 1"),
        (lambda: federated.FedSGD(momentum=1.0), "0 <= momentum < 1, got momentum=1.0"),
        (lambda: federated.FedAvg(num_epochs=1, num_steps=1), "got both"),
        (lambda: federated.FedAvg(num_steps=0), "FedAvg: need num_steps >= 1"),
        (lambda: federated.FedAvg(optimizer=optax.sgd(0.1)),
         "FedAvg: need optimizer as a function of the learning rate, such as optax.sgd, got Grad"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
