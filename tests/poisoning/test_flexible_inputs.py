"""FMPA where there is little to attack with: nobody malicious, one image a client, odd options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advjax import aggregation, data, federated, models, poisoning
from advjax.experiments import recordings
from tests import helpers

KEY = jax.random.key(0)
N, D = 5, 6
NOBODY = np.zeros(N, bool)
UPDATES = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
PARAMS = jnp.asarray(np.random.default_rng(1).normal(size=D), jnp.float32)
SEARCH = poisoning.Search(num_steps=4, check_every=2, batch_size=50, num_validation=50)
ATTACKS = {
    "i_fmpa": functools.partial(poisoning.i_fmpa, search=SEARCH),
    "f_fmpa": functools.partial(
        poisoning.f_fmpa, target_accuracy=0.01, boost="searched", search=SEARCH
    ),
}


class Shop:
    """A context whose examples are numbers, and which notes who asked for which."""

    def __init__(self, counts):
        self.counts = jnp.asarray(counts, jnp.int32)
        self.draws = []  # (rows, positions) of each batch

    def context(self, counts):
        def examples(row, position):
            jax.debug.callback(
                lambda r, p: self.draws.append((np.array(r), np.array(p))), row, position
            )
            x = jnp.stack([1.0 + row, jnp.sin(1.0 + position)], axis=-1)
            return x, jnp.argmax(x @ PARAMS.reshape(2, 3), axis=-1).astype(jnp.int32)

        return poisoning.Context(
            params=PARAMS, round=jnp.int32(0), server_rate=jnp.float32(1),
            clients=jnp.arange(N), counts=counts, examples=examples,
            logits_fn=lambda params, x: x @ params.reshape(2, 3), initialise=lambda key: PARAMS,
        )  # fmt: skip

    def craft(self, attack, is_byzantine, memory, is_traced=True):
        def run(is_byzantine, counts, memory):
            return attack.craft(KEY, UPDATES, is_byzantine, self.context(counts), memory)

        result = (jax.jit(run) if is_traced else run)(is_byzantine, self.counts, memory)
        jax.effects_barrier()
        return result


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("is_traced", [True, False])
def test_without_malicious_clients_the_state_goes_on(name, is_traced):
    for observe, num_seen in [("all", 1), ("sampled", 0)]:
        attack = ATTACKS[name](observe=observe)
        shop = Shop([4] * N)
        memory = attack.init(KEY, PARAMS)
        sent, memory = shop.craft(attack, NOBODY, memory, is_traced)
        helpers.assert_same_bits(sent, UPDATES)
        assert memory.history.num_seen == num_seen
        assert memory.boost == 1
        assert all(np.all(np.isfinite(leaf)) for leaf in memory.history)
        assert len(shop.draws) == 1  # the validation images, which are drawn in any case


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("share", [0.3, 1e-6])
def test_training_and_validation_part(name, share):
    counts, is_byzantine = np.array([10, 1, 7, 2, 9]), np.array([1, 1, 0, 1, 0], bool)
    attack = ATTACKS[name](search=SEARCH._replace(validation_share=share))
    shop = Shop(counts)
    sent, _ = shop.craft(attack, is_byzantine, attack.init(KEY, PARAMS))
    assert np.all(np.isfinite(sent))
    (validation, *training) = shop.draws
    assert len(training) == SEARCH.num_steps
    kept = {0: 7 if share == 0.3 else 9, 1: 1, 3: 1}

    def places(draws):
        return {(int(r), int(p)) for draw in draws for r, p in np.stack(draw, axis=1)}

    assert places(training) == {(r, p) for r in kept for p in range(kept[r])}
    expected = {(r, p) for r in kept for p in range(kept[r], counts[r])}
    assert places([validation]) == expected
    # No image twice before each is there once.
    _, times = np.unique(np.stack(validation), axis=1, return_counts=True)
    assert np.ptp(times) <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_single_images(name):
    is_byzantine = np.arange(N) < 2
    attack, shop = ATTACKS[name](), Shop([1, 1, 8, 8, 8])
    sentence = f"^{name}: need a malicious client with at least 2 images, .*, got at most 1.$"
    memory = attack.init(KEY, PARAMS)
    with pytest.raises(ValueError, match=sentence):
        shop.craft(attack, is_byzantine, memory, is_traced=False)
    with pytest.raises(ValueError, match=sentence):
        attack.check(is_byzantine, np.asarray(shop.counts))
    # Where nothing can be looked at, they serve for both.
    sent, _ = shop.craft(attack, is_byzantine, memory)
    assert np.all(np.isfinite(sent)) and np.any(sent[:2] != UPDATES[:2])
    for rows, positions in shop.draws:
        assert set(rows) == {0, 1} and set(positions) == {0}


@pytest.fixture(scope="module")
def task():
    train, test = data.load("digits", "train"), data.load("digits", "test").take(50)
    partition = federated.partition_iid(KEY, train.labels, 6)
    return federated.make_task(models.make("mlp", 10, hidden=(8,)), train, test, partition)


@pytest.mark.parametrize("name", ATTACKS)
def test_simulations_that_are_refused(task, name):
    run = functools.partial(
        federated.simulate, KEY, task, rule=aggregation.mean, num_rounds=1, progress=False
    )
    attack = ATTACKS[name]()
    chosen = poisoning.choose({"other": poisoning.mpaf(), "this": attack})
    for made in (attack, chosen["this"]):
        with pytest.raises(ValueError, match=f"^{name}: need at least one malicious client, got n"):
            run(poisoning=made)
    chosen["other"].check(NOBODY, np.ones(N, np.int32))  # does without
    single = dataclasses.replace(task, counts=jnp.ones_like(task.counts))
    with pytest.raises(ValueError, match=f"^{name}: need a malicious client with at least 2"):
        federated.simulate(
            KEY, single, rule=aggregation.mean, poisoning=attack, num_rounds=1, num_byzantine=2,
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("observe", ["all", "sampled"])
def test_sampled_rounds_without_malicious_clients(task, observe):
    made = poisoning.i_fmpa(observe=observe, search=SEARCH)
    attack, rounds = recordings.record(
        made, lambda context, honest, sent: (context.clients, honest, sent)
    )
    history = federated.simulate(
        KEY, task, rule=aggregation.mean, poisoning=attack, num_rounds=8, num_byzantine=1,
        clients_per_round=2, eval_every=8, progress=False,
        local=federated.FedSGD(batch_size=8),
    )  # fmt: skip
    jax.effects_barrier()
    assert not history.diverged
    assert sorted(rounds) == list(range(8))
    has_drawn = [0 in clients for clients, _, _ in rounds.values()]
    assert any(has_drawn) and not all(has_drawn)
    for clients, honest, sent in rounds.values():
        assert np.all(np.isfinite(sent))
        helpers.assert_same_bits(sent[clients != 0], honest[clients != 0])


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda v: poisoning.i_fmpa(alpha=v), "i_fmpa: need 0 < alpha < 1, got alpha={}."),
        (
            lambda v: poisoning.f_fmpa(target_accuracy=0.5, alpha=v),
            "f_fmpa: need 0 < alpha < 1, got alpha={}.",
        ),
        (
            lambda v: poisoning.f_fmpa(target_accuracy=v),
            "f_fmpa: need 0 < target_accuracy < 1, got target_accuracy={}.",
        ),
        (
            lambda v: poisoning.i_fmpa(search=poisoning.Search(validation_share=v)),
            "i_fmpa: need 0 < validation_share < 1, got validation_share={}.",
        ),
    ],
)
# 1 - 1e-9 is 1 in float32, where 1 / (1 - alpha) is infinite.
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 80, np.nan, np.inf, 1 - 1e-9])
def test_shares_outside_the_unit_interval(make, sentence, value):
    with pytest.raises(ValueError) as caught:
        make(value)
    assert str(caught.value) == sentence.format(value)


def test_traced_shares_are_not_looked_at():
    def predicted(alpha, accuracy):
        attack = poisoning.f_fmpa(target_accuracy=accuracy, alpha=alpha, search=SEARCH)
        shop = Shop([4] * N)
        is_byzantine = jnp.arange(N) < 2
        args = KEY, UPDATES, is_byzantine, shop.context(shop.counts)
        return attack.craft(*args, attack.init(KEY, PARAMS))[0]

    result = jax.eval_shape(predicted, jnp.float32(0.5), jnp.float32(0.5))
    assert result.shape == UPDATES.shape


def test_a_search_over_alphas_is_one_program():
    shop = Shop([8] * N)
    is_byzantine = jnp.arange(N) < 2
    search = SEARCH._replace(optimizer=optax.sgd(0.1))

    def sent(alpha):
        attack = poisoning.i_fmpa(alpha=alpha, search=search)
        memory = attack.init(KEY, PARAMS)
        for shift in (0.0, 1.0):
            context = shop.context(shop.counts)._replace(params=PARAMS + shift)
            result, memory = attack.craft(KEY, UPDATES, is_byzantine, context, memory)
        return result

    alphas = jnp.float32([0.3, 0.7])
    together = jax.jit(jax.vmap(sent))(alphas)
    for alpha, expected in zip(alphas, together, strict=True):
        # Fused sums round differently; the values are of order one.
        np.testing.assert_allclose(jax.jit(sent)(alpha), expected, atol=1e-5)
    assert np.any(together[0] != together[1])
