"""Attacks with state, attacks chosen by their state, and flipped labels."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import poisoning
from tests import helpers

N, D = 6, 4
KEY = jax.random.key(3)
UPDATES = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
IS_BYZANTINE = np.arange(N) < 2


def initialise(key):
    return jax.random.normal(key, (D,))


def context_of(params, round_=0):
    return poisoning.Context(
        params=params,
        round=jnp.asarray(round_),
        server_rate=jnp.ones(()),
        clients=jnp.arange(N),
        counts=jnp.ones(N, jnp.int32),
        examples=lambda row, position: (jnp.zeros((*row.shape, 2, 2, 1)), jnp.zeros_like(row)),
        logits_fn=lambda params, x: x.reshape(len(x), -1) @ params[:, None],
        initialise=initialise,
    )


def test_mpaf_keeps_its_model_over_the_rounds():
    attack = poisoning.mpaf(scale=1e6)
    start = jnp.ones(D)

    def round_(carry, number):
        params, state = carry
        key = jax.random.fold_in(KEY, number)
        context = context_of(params, number)
        updates, state = attack.craft(key, UPDATES, IS_BYZANTINE, context, state)
        return (params + 0.1 * number, state), (params, updates)

    carry = start, attack.init(KEY, start)
    _, (params, updates) = jax.jit(lambda carry: jax.lax.scan(round_, carry, jnp.arange(4)))(carry)
    target = np.asarray(initialise(KEY))
    for each, sent in zip(np.asarray(params), np.asarray(updates), strict=True):
        helpers.assert_same_bits(sent[~IS_BYZANTINE], UPDATES[~IS_BYZANTINE])
        # 1e-6 of the values: one difference and one product in float32.
        desired = np.broadcast_to(1e6 * (target - each), (2, D))
        np.testing.assert_allclose(sent[IS_BYZANTINE], desired, rtol=1e-5, atol=1)
    assert np.ptp(np.asarray(params)) > 0
    other = attack.init(jax.random.key(4), start)
    first = attack.craft(KEY, UPDATES, IS_BYZANTINE, context_of(start), other)[0]
    assert not np.allclose(first[0], updates[0][0])


def test_mpaf_vmaps_over_its_scale_and_keeps_short_floats():
    def sent(scale, updates=UPDATES):
        attack, params = poisoning.mpaf(scale=scale), jnp.zeros(D)
        state = attack.init(KEY, params)
        return attack.craft(KEY, updates, IS_BYZANTINE, context_of(params), state)[0]

    together = jax.vmap(sent)(jnp.array([1.0, 10.0]))
    np.testing.assert_allclose(together[1, :2], 10 * together[0, :2], rtol=1e-6)  # one rounding
    short = jax.eval_shape(lambda: sent(1e6, jnp.asarray(UPDATES, jnp.bfloat16)))
    assert short.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"mpaf: need updates of shape \[n, d\]"):
        sent(1e6, UPDATES[0])


@pytest.mark.parametrize(
    "word, mask",
    [
        (None, None),
        ("byzantine", IS_BYZANTINE),
        ("all", np.ones(N, bool)),
        ("honest", ~IS_BYZANTINE),
        (np.arange(N) == 3, np.arange(N) == 3),
    ],
)
def test_stateless_hands_on_the_knowledge(word, mask):
    ipm = functools.partial(poisoning.ipm, epsilon=0.5)
    attack = poisoning.stateless(ipm, knows=word)
    state = attack.init(KEY, jnp.zeros(D))
    assert state == ()
    craft = jax.jit(lambda mask: attack.craft(KEY, UPDATES, mask, None, state))
    updates, after = craft(IS_BYZANTINE)
    assert after == ()
    desired = ipm(KEY, UPDATES, IS_BYZANTINE, knows=mask)
    np.testing.assert_allclose(updates, desired, rtol=1e-6, atol=1e-7)  # fused sums


def test_stateless_knows_its_words():
    sentence = "stateless: unknown knowledge 'full'; known: all, byzantine, honest"
    with pytest.raises(ValueError, match=sentence):
        poisoning.stateless(poisoning.lie, knows="full")


MEMBERS = {
    "none": poisoning.stateless(poisoning.no_attack),
    "gaussian": poisoning.stateless(poisoning.gaussian),
    "mpaf": poisoning.mpaf(),
    "lie": poisoning.stateless(functools.partial(poisoning.lie, z=0.5), knows="all"),
}


def rounds(craft, state):
    """Two rounds of an attack: what was sent, and the state afterwards."""
    sent = []
    for number in range(2):
        context = context_of(jnp.full(D, 0.1 * number), number)
        key = jax.random.fold_in(KEY, number)
        updates, state = craft(key, UPDATES, IS_BYZANTINE, context, state)
        sent.append(updates)
    return jnp.stack(sent), state


def test_chosen_attacks_equal_each_alone_in_one_trace():
    chosen = poisoning.choose(MEMBERS)
    assert list(chosen) == list(MEMBERS)
    (craft,) = {attack.craft for attack in chosen.values()}

    def two_rounds(state):
        return rounds(craft, state)

    program = jax.jit(chex.assert_max_traces(two_rounds, n=1))
    states, results = {}, {}
    for name, attack in chosen.items():
        states[name] = attack.init(KEY, jnp.zeros(D))
        results[name], after = program(states[name])
        chex.assert_trees_all_equal_shapes_and_dtypes(after, states[name])
        alone, _ = jax.jit(functools.partial(rounds, MEMBERS[name].craft))(
            MEMBERS[name].init(KEY, jnp.zeros(D))
        )
        np.testing.assert_allclose(results[name], alone, rtol=1e-6, atol=1e-6)  # fused sums
    assert np.array_equal(results["none"], np.stack([UPDATES, UPDATES]))
    assert len({np.asarray(result).tobytes() for result in results.values()}) == len(MEMBERS)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states.values())
    together, _ = jax.jit(jax.vmap(two_rounds))(stack)
    for result, alone in zip(together, results.values(), strict=True):
        np.testing.assert_allclose(result, alone, rtol=1e-6, atol=1e-6)  # fused sums


def test_only_the_chosen_state_moves():
    count = poisoning.Poisoning(
        lambda key, params: jnp.zeros(()),
        lambda key, updates, is_byzantine, context, state: (updates, state + 1),
    )
    chosen = poisoning.choose({"first": count, "second": count})
    _, (index, states) = rounds(chosen["second"].craft, chosen["second"].init(KEY, jnp.zeros(D)))
    assert (int(index), *map(float, states)) == (1, 0, 2)


def test_choose_needs_an_attack():
    with pytest.raises(ValueError, match=r"choose: need at least one attack, got none\."):
        poisoning.choose({})


def test_label_flip():
    labels = np.arange(12, dtype=np.int32).reshape(3, 4) % 10
    helpers.assert_same_bits(poisoning.label_flip(labels, 10), 9 - labels)
    table = np.roll(np.arange(10), -1)
    flip = jax.jit(functools.partial(poisoning.label_flip, num_classes=10))
    helpers.assert_same_bits(flip(labels, target=table), ((labels + 1) % 10).astype(np.int32))
    assert poisoning.label_flip(labels.astype(np.uint8), 10, target=table).dtype == jnp.uint8
    assert poisoning.label_flip(labels[:0], 10).shape == (0, 4)


@pytest.mark.parametrize(
    "labels, num_classes, target, sentence",
    [
        (np.zeros(3), 10, None, "need labels as an array of integers, got dtype float64"),
        ([1, 2], 10, None, "need labels as an array of integers, got list"),
        (np.array([0, 10]), 10, None, r"need labels in 0 \.\.\. 9, got 0 \.\.\. 10"),
        (np.array([0, 1]), 1, None, "need num_classes >= 2, got num_classes=1"),
        (np.array([0, 1]), 2, np.array([1]), r"need one target a class \(2\), got shape \(1,\)"),
        (np.array([0, 1]), 2, np.array([2, 0]), r"need target in 0 \.\.\. 1, got 0 \.\.\. 2"),
    ],
)
def test_label_flip_bad_input(labels, num_classes, target, sentence):
    with pytest.raises(ValueError, match=rf"^label_flip: {sentence}\.$"):
        poisoning.label_flip(labels, num_classes, target=target)
