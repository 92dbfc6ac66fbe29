"""Aggregators: functions lifted and chosen, centered clipping, AFA, FLTrust, noise."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special

from advjax import aggregation
from advjax.aggregation import weighing
from tests import helpers

N, D, NUM_BYZANTINE, NUM_ROUNDS = 10, 20, 2, 4
DIRECTION = np.random.default_rng(9).normal(size=D).astype(np.float32)
PARAMS = np.linspace(-1, 1, D, dtype=np.float32)


def last_but_one(updates):
    return updates[-2]


def noisy_weights(key, updates):
    return jax.random.uniform(key, (len(updates),))


@weighing.weighted_by(noisy_weights)
def noisy(key, updates):
    return noisy_weights(key, updates) @ updates.astype(jnp.float32)


def optionally_noisy(updates, *, key=None):
    return updates[0] if key is None else updates[0] + jax.random.normal(key)


def server_update(params):
    return DIRECTION + 0 * params


KEY = jax.random.key(0)
RULES = {
    "stateless": aggregation.stateless(last_but_one),
    "stateless-weights": aggregation.stateless(aggregation.geometric_median),
    "stateless-key": aggregation.stateless(noisy, key=KEY),
    "centered_clipping": aggregation.centered_clipping(5.0, num_iters=2),
    "afa": aggregation.afa(N),
    "afa-model": aggregation.afa(N, space="model"),
    "fltrust": aggregation.fltrust(server_update),
    "noising": aggregation.noising(aggregation.stateless(last_but_one), KEY, 0.1, relative=True),
}
# These leave out what is not finite.
ROBUST = ("stateless-weights", "centered_clipping", "afa", "afa-model", "fltrust")
# Sums of twenty terms of size a few, added in another order.
TOLERANCE = 3e-6


def drawn(seed):
    """Clients that agree on a direction, but for the first two, who go backwards."""
    rng = np.random.default_rng(seed)
    updates = DIRECTION + 0.2 * rng.normal(size=(N, D))
    updates[:NUM_BYZANTINE] *= -2
    return updates.astype(np.float32)


ROUNDS = np.stack([drawn(seed) for seed in range(NUM_ROUNDS)])


@functools.cache
def compiled(name):
    """A round of the rule, which fails if it is traced twice; chex counts by name."""

    def report(updates, state, params):
        return RULES[name].report(updates, state, params)

    report.__name__ = f"{name} report"
    return jax.jit(chex.assert_max_traces(report, n=1))


@functools.cache
def compiled_without(name, client):
    clients = np.delete(np.arange(N), client)
    return jax.jit(lambda *args: RULES[name].report(*args, clients))


def played(name, rounds=ROUNDS):
    """The rule round by round: aggregates, weights, states."""
    state, history = RULES[name].init(PARAMS), []
    for updates in rounds:
        aggregate, weights, state = compiled(name)(updates, state, PARAMS)
        history.append((aggregate, weights, state))
    return history


@pytest.fixture(params=RULES)
def name(request):
    return request.param


def _assert_close(actual, desired, atol=TOLERANCE):
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    chex.assert_trees_all_close(
        jax.tree.map(plain, actual), jax.tree.map(plain, desired), atol=atol, rtol=0
    )


@pytest.mark.parametrize(
    "name", ["stateless-weights", "stateless-key", "centered_clipping", "fltrust", "noising"]
)
def test_jit_equals_eager(name):
    state = RULES[name].init(PARAMS)
    eager = RULES[name].report(ROUNDS[0], state, PARAMS)
    _assert_close(eager, compiled(name)(ROUNDS[0], state, PARAMS))


def test_scan_of_updates_equals_a_loop_of_reports(name):
    def step(state, updates):
        aggregate, state = RULES[name].update(updates, state, PARAMS)
        return state, aggregate

    last, aggregates = jax.jit(lambda state: jax.lax.scan(step, state, ROUNDS))(
        RULES[name].init(PARAMS)
    )
    history = played(name)
    _assert_close(aggregates, jnp.stack([aggregate for aggregate, _, _ in history]))
    _assert_close(last, history[-1][-1])


def test_resumed_equals_uninterrupted(name):
    whole = [aggregate for aggregate, _, _ in played(name)]
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), played(name, ROUNDS[:2])[-1][-1])
    for t in (2, 3):
        aggregate, _, state = compiled(name)(ROUNDS[t], state, PARAMS)
        helpers.assert_same_bits(aggregate, whole[t])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_the_dtype(name, dtype):
    state = RULES[name].init(PARAMS)
    updates = jnp.asarray(ROUNDS[0], dtype)
    aggregate, weights, after = jax.eval_shape(RULES[name].report, updates, state, PARAMS)
    if "key" not in name:  # this test's own function computes in float32
        assert aggregate.dtype == dtype
    assert (weights.shape, weights.dtype) == ((N,), jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda: state))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", ROBUST)
def test_rows_that_are_not_finite_are_left_out(name, value):
    """1e30 is finite, but its square is not."""
    broken, others = ROUNDS.copy(), np.delete(ROUNDS, 4, axis=1)
    broken[:, 4] = value
    history = played(name, broken)
    state = RULES[name].init(PARAMS)
    report = compiled_without(name, 4)
    for updates, (aggregate, weights, _) in zip(others, history, strict=True):
        desired, desired_weights, state = report(updates, state, PARAMS)
        np.testing.assert_allclose(aggregate, desired, atol=TOLERANCE)
        np.testing.assert_allclose(np.delete(weights, 4), desired_weights, atol=TOLERANCE)
        assert weights[4] == 0
        assert np.all(np.isfinite(aggregate))
    if name.startswith("afa"):
        assert history[-1][2].bad[4] == 3 + NUM_ROUNDS


@pytest.mark.parametrize("updates", [np.nan * ROUNDS[0], 0 * ROUNDS[0]], ids=["nan", "zero"])
@pytest.mark.parametrize("name", ROBUST)
def test_nothing_to_add_is_zero(name, updates):
    aggregate, weights, _ = compiled(name)(updates, RULES[name].init(PARAMS), PARAMS)
    np.testing.assert_array_equal(aggregate, 0)
    assert np.all(np.isfinite(weights))


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=20)
@pytest.mark.parametrize("name", ROBUST)
def test_order_does_not_matter(name, seed):
    order = np.random.default_rng(seed).permutation(N)
    for (aggregate, weights, _), (permuted, permuted_weights, _) in zip(
        played(name), played(name, ROUNDS[:, order]), strict=True
    ):
        np.testing.assert_allclose(permuted_weights, np.asarray(weights)[order], atol=TOLERANCE)
        np.testing.assert_allclose(permuted, aggregate, atol=TOLERANCE)


@pytest.mark.parametrize(
    "make, values",
    [
        (lambda radius: aggregation.centered_clipping(radius), np.float32([0, 0.5, 5, 100])),
        (lambda value: aggregation.afa(N, threshold=value), np.float32([0, 0.5, 1, 3])),
        (lambda scale: aggregation.noising(RULES["stateless"], KEY, scale), np.float32([0, 1])),
    ],
    ids=["centered_clipping", "afa", "noising"],
)
def test_vmap_over_a_scalar_equals_a_loop(make, values):
    def aggregate(value):
        return make(value).update(ROUNDS[0], make(value).init(PARAMS))[0]

    together = jax.jit(jax.vmap(aggregate))(values)
    alone = jax.jit(aggregate)
    for value, row in zip(values, together, strict=True):
        np.testing.assert_allclose(row, alone(value), atol=TOLERANCE)
    assert len({row.tobytes() for row in np.asarray(together)}) == len(values)


# stateless


def test_stateless_is_the_function():
    rule = aggregation.stateless(last_but_one)
    assert rule.init(PARAMS) == ()
    aggregate, weights, _ = rule.report(ROUNDS[0], ())
    helpers.assert_same_bits(aggregate, ROUNDS[0, -2])
    assert np.all(np.isnan(weights))
    aggregate, weights, _ = RULES["stateless-weights"].report(ROUNDS[0], ())
    np.testing.assert_allclose(aggregate, aggregation.geometric_median(ROUNDS[0]), atol=TOLERANCE)
    np.testing.assert_array_equal(weights, aggregation.geometric_median_weights(ROUNDS[0]))


@pytest.mark.parametrize(
    "rule",
    [noisy, functools.partial(noisy), optionally_noisy, functools.partial(optionally_noisy)],
)
def test_stateless_draws_by_round(rule):
    lifted = aggregation.stateless(rule, key=KEY)
    state = lifted.init(PARAMS)
    for t in range(3):
        key = jax.random.fold_in(KEY, t)
        desired = optionally_noisy(ROUNDS[0], key=key)
        if weighing.weights_function_of(rule):
            desired = noisy(key, ROUNDS[0])
        aggregate, state = lifted.update(ROUNDS[0], state)
        np.testing.assert_allclose(aggregate, desired, atol=TOLERANCE)


def test_a_key_that_nobody_wants():
    assert aggregation.stateless(last_but_one, key=KEY).init(PARAMS) == ()
    assert aggregation.stateless(optionally_noisy).init(PARAMS) == ()
    assert aggregation.stateless(functools.partial(noisy, KEY)).init(PARAMS) == ()


# choose


def test_chosen_rules_are_the_rules_and_compile_once():
    chosen = aggregation.choose(RULES)
    assert list(chosen) == list(RULES)
    assert len({(rule.update, rule.report) for rule in chosen.values()}) == 1
    common = next(iter(chosen.values())).report
    report = jax.jit(chex.assert_max_traces(lambda *args: common(*args), n=1))
    for name, rule in chosen.items():
        state = rule.init(PARAMS)
        for updates, (aggregate, weights, _) in zip(ROUNDS, played(name), strict=True):
            actual, actual_weights, state = report(updates, state, PARAMS)
            np.testing.assert_allclose(actual, aggregate, atol=TOLERANCE)
            np.testing.assert_allclose(actual_weights, weights, atol=TOLERANCE)


def test_chosen_rules_in_one_scan_over_rules():
    names = ("stateless", "centered_clipping", "fltrust")
    chosen = aggregation.choose({name: RULES[name] for name in names})
    common = chosen["fltrust"].update

    def run(state):
        def step(state, updates):
            aggregate, state = common(updates, state, PARAMS)
            return state, aggregate

        return jax.lax.scan(step, state, ROUNDS)[1]

    states = [rule.init(PARAMS) for rule in chosen.values()]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    for together in (jax.lax.map(run, stack), jax.vmap(run)(stack)):
        for name, aggregates in zip(names, together, strict=True):
            desired = jnp.stack([aggregate for aggregate, _, _ in played(name)])
            np.testing.assert_allclose(aggregates, desired, atol=TOLERANCE)


def test_choose_takes_rules_that_do_not_report():
    silent = aggregation.Aggregator(lambda params: (), lambda u, s, p, c: (u[0], s))
    rule = aggregation.choose({"silent": silent})["silent"]
    aggregate, weights, _ = rule.report(ROUNDS[0], rule.init(PARAMS))
    helpers.assert_same_bits(aggregate, ROUNDS[0, 0])
    assert np.all(np.isnan(weights))


# noising


def test_a_rule_may_do_without_clients():
    def update(updates, state, params=None):
        return updates[-2], state

    plain = aggregation.Aggregator(lambda params: (), update)
    reporting = plain._replace(report=lambda u, s, params=None: (u[-2], np.ones(len(u)), s))
    rules = aggregation.choose({"plain": plain, "reporting": reporting})
    noisy = aggregation.noising(plain, KEY, 0.0)
    for rule in (*rules.values(), noisy):
        aggregate, weights, _ = rule.report(ROUNDS[0], rule.init(PARAMS), PARAMS, np.arange(N))
        np.testing.assert_array_equal(aggregate, ROUNDS[0][-2])
        assert weights.shape == (N,)


def test_noise_has_its_scale():
    updates = np.ones((3, 4000), np.float32) * np.float32([[1], [2], [9]])
    for relative, deviation in ((False, 0.1), (True, 0.1 * 2 * 4000**0.5)):
        rule = aggregation.noising(RULES["stateless"], KEY, 0.1, relative=relative)
        state = rule.init(updates[0])
        first, state = rule.update(updates, state)
        second, _ = rule.update(updates, state)
        # Of 4000 draws the deviation is off by 1 / sqrt(8000), five of which are 6 %.
        np.testing.assert_allclose(np.std(first), deviation, rtol=0.06)
        np.testing.assert_allclose(np.mean(first), 2, atol=5 * deviation / 4000**0.5)
        assert not np.array_equal(first, second)


# centered clipping


def _centered_clipping(x, v, radius, num_iters):
    for _ in range(num_iters):
        difference = x.astype(np.float64) - v
        scale = np.minimum(1, radius / np.linalg.norm(difference, axis=1))
        v = v + (scale[:, None] * difference).mean(0)
    return v


@pytest.mark.parametrize("radius, num_iters", [(0.5, 1), (5.0, 2), (1e6, 1)])
def test_centered_clipping_by_numpy(radius, num_iters):
    rule = aggregation.centered_clipping(radius, num_iters)
    report = jax.jit(rule.report)
    state, desired = rule.init(PARAMS), np.zeros(D)
    mixture = np.zeros(D)
    for updates in ROUNDS:
        aggregate, weights, state = report(updates, state)
        desired = _centered_clipping(updates, desired, radius, num_iters)
        np.testing.assert_allclose(aggregate, desired, atol=TOLERANCE)
        # The weights and the rest, which the old centre has, make the new one.
        mixture = (1 - np.sum(weights)) * mixture + weights @ updates
        np.testing.assert_allclose(aggregate, mixture, atol=TOLERANCE)


def test_centered_clipping_equals_byzfl(reference_dir):
    with np.load(reference_dir / "aggregators.npz") as file:
        rule = aggregation.centered_clipping(10.0, num_iters=3)
        state = rule.init(file["updates"][0])
        for rows, entry in (("updates", "first"), ("updates_2", "second")):
            aggregate, state = rule.update(file[rows], state)
            desired = file[f"centered_clipping_tau10_L3_{entry}"]
            np.testing.assert_allclose(aggregate, desired, rtol=0, atol=1e-5)  # the issue's


def test_one_row_moves_centered_clipping_by_no_more_than_its_part():
    # Two arrays: a program that still runs may read the memory of its argument.
    attacked = ROUNDS[0].copy()
    attacked[0] = 1e15
    state = RULES["centered_clipping"].init(PARAMS)
    before, _, _ = compiled("centered_clipping")(ROUNDS[0], state, PARAMS)
    after, _, _ = compiled("centered_clipping")(attacked, state, PARAMS)
    # In each of two steps from one end of the ball to the other; 1e-3: rounding.
    assert 0.1 < np.linalg.norm(after - before) <= 2 * 2 * 5.0 / N + 1e-3


# AFA


def _afa(x, good, bad, is_blocked, sizes, threshold=2.0, threshold_step=0.5):
    """A round; returns the aggregate, the rows kept and the new state."""
    x = x.astype(np.float64)
    part = sizes * good / (good + bad)
    kept = [i for i in range(len(x)) if not is_blocked[i]]
    while True:
        a = sum(part[i] * x[i] for i in kept) / sum(part[i] for i in kept)
        s = {i: a @ x[i] / np.linalg.norm(a) / np.linalg.norm(x[i]) for i in kept}
        values = list(s.values())
        mean, median, deviation = np.mean(values), np.median(values), np.std(values)
        if mean < median:
            far = [i for i in kept if s[i] < median - threshold * deviation]
        else:
            far = [i for i in kept if s[i] > median + threshold * deviation]
        if not far:
            break
        kept = [i for i in kept if i not in far]
        threshold += threshold_step
    is_good = np.isin(np.arange(len(x)), kept)
    good = good + is_good
    bad = bad + (~is_good & ~is_blocked)
    is_blocked = is_blocked | (special.betainc(good, bad, 0.5) > 0.95)
    return a, is_good, good, bad, is_blocked


@pytest.mark.parametrize("space", ["update", "model"])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_afa_by_numpy(space, spread):
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 9, N).astype(np.float32)
    rule = aggregation.afa(N, num_examples=sizes, space=space, threshold=1.0)
    report = jax.jit(rule.report)
    state = rule.init(PARAMS)
    desired = (np.full(N, 3.0), np.full(N, 3.0), np.zeros(N, bool))
    for _ in range(12):
        updates = (DIRECTION + spread * rng.normal(size=(N, D))).astype(np.float32)
        updates[:NUM_BYZANTINE] *= -2
        aggregate, weights, state = report(updates, state, PARAMS)
        shift = PARAMS if space == "model" else 0
        mean, is_good, *desired = _afa(updates + shift, *desired, sizes, threshold=1.0)
        np.testing.assert_array_equal(weights > 0, is_good)
        np.testing.assert_allclose(aggregate, mean - shift, atol=1e-5)  # sums of terms up to ten
        for actual, expected in zip(state, desired, strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert state.is_blocked.any() or spread > 1


def test_afa_blocks_at_the_sixth_bad_round():
    # By hand: I_0.5(3, 3 + k) = P(at least 3 heads in 5 + k throws of a coin).
    assert special.betainc(3, 8, 0.5) == pytest.approx(1 - (1 + 10 + 45) / 2**10)  # 0.945
    assert special.betainc(3, 9, 0.5) == pytest.approx(1 - (1 + 11 + 55) / 2**11)  # 0.967
    state = RULES["afa"].init(PARAMS)
    for number in range(1, 9):
        _, weights, state = compiled("afa")(drawn(number), state, PARAMS)
        np.testing.assert_array_equal(weights[:NUM_BYZANTINE], 0)
        is_blocked = np.arange(N) < (NUM_BYZANTINE if number >= 6 else 0)
        np.testing.assert_array_equal(state.is_blocked, is_blocked)
    # Blocked is for good, and a blocked client is not counted further.
    _, weights, state = compiled("afa")(np.ones((N, D), np.float32), state, PARAMS)
    np.testing.assert_array_equal(weights[:NUM_BYZANTINE], 0)
    np.testing.assert_array_equal(state.bad[:NUM_BYZANTINE], 3 + 6)
    np.testing.assert_array_equal(state.good[:NUM_BYZANTINE], 3)
    np.testing.assert_array_equal((state.good + state.bad)[NUM_BYZANTINE:], 3 + 3 + 9)


def test_afa_remembers_clients_under_sampling():
    """Client 7 of twenty is bad whenever it is drawn, in whichever row."""
    rule = aggregation.afa(20)
    update = jax.jit(rule.report)
    rng, state, times = np.random.default_rng(0), rule.init(PARAMS), 0
    for seed in range(30):
        clients = rng.choice(20, N, replace=False)
        updates = drawn(seed)
        updates[:NUM_BYZANTINE] /= -2
        updates[clients == 7] *= -1
        was_blocked = times >= 6
        assert bool(state.is_blocked[7]) == was_blocked
        _, weights, state = update(updates, state, None, clients)
        times += 7 in clients
        np.testing.assert_array_equal(np.asarray(weights)[clients == 7], 0)
    assert times > 6
    np.testing.assert_array_equal(np.flatnonzero(state.is_blocked), [7])
    assert np.sum(state.good - 3 + state.bad - 3) == 30 * N - (times - 6)


def test_afa_takes_rounding_for_no_sign():
    state = RULES["afa"].init(PARAMS)
    same = np.tile(DIRECTION, (N, 1)) * np.linspace(1, 2, N, dtype=np.float32)[:, None]
    _, weights, state = compiled("afa")(same, state, PARAMS)
    assert np.all(weights > 0)


# FLTrust


def test_fltrust_by_numpy():
    updates = np.concatenate([drawn(0), 1e4 * drawn(1)[-1:]]).astype(np.float64)
    norm = np.linalg.norm(DIRECTION)
    norms = np.linalg.norm(updates, axis=1)
    trust = np.maximum(updates @ DIRECTION / norms / norm, 0)
    weights = trust * norm / norms / trust.sum()
    rule = RULES["fltrust"]
    aggregate, actual, _ = rule.report(updates.astype(np.float32), (), PARAMS)
    np.testing.assert_allclose(actual, weights, atol=1e-6)  # of numbers below 1
    np.testing.assert_allclose(aggregate, weights @ updates, atol=TOLERANCE)
    np.testing.assert_array_equal(actual[:NUM_BYZANTINE], 0)
    assert np.linalg.norm(aggregate) <= norm * (1 + 1e-6)


@pytest.mark.parametrize("server", [np.zeros(D), np.full(D, np.nan), np.full(D, np.inf)])
def test_fltrust_without_an_update_of_the_server(server):
    rule = aggregation.fltrust(lambda params: jnp.asarray(server))
    aggregate, _ = rule.update(ROUNDS[0], (), PARAMS)
    np.testing.assert_array_equal(aggregate, 0)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: aggregation.stateless(noisy), "stateless: need a key"),
        (lambda: aggregation.choose({}), "choose: need at least one rule, got none"),
        (lambda: aggregation.noising(RULES["afa"], KEY, -1.0), "noising: need a finite scale >= 0"),
        (lambda: aggregation.centered_clipping(-1.0), "centered_clipping: need a finite radius"),
        (lambda: aggregation.centered_clipping(1.0, 0), "centered_clipping: need num_iters >= 1"),
        (lambda: aggregation.afa(0), "afa: need num_clients >= 1, got num_clients=0"),
        (lambda: aggregation.afa(3, space="angle"), "afa: unknown space 'angle'; known: update"),
        (lambda: aggregation.afa(3, prior=0.0), "afa: need prior > 0, got prior=0"),
        (
            lambda: aggregation.afa(3, num_examples=np.ones(4)),
            r"afa: need num_examples of shape \(3,\), got \(4,\)",
        ),
        (
            lambda: aggregation.afa(3).update(ROUNDS[0], aggregation.afa(3).init(PARAMS)),
            "afa: need at most num_clients=3 updates, got n=10",
        ),
        (
            lambda: aggregation.afa(3).update(
                ROUNDS[0], aggregation.afa(3).init(PARAMS), None, np.arange(N)
            ),
            "afa: need at most num_clients=3 updates, got n=10",
        ),
        (
            lambda: RULES["afa"].update(
                ROUNDS[0], RULES["afa"].init(PARAMS), None, np.arange(N) + 1
            ),
            "afa: need clients in 0 ... 9, got 1 ... 10",
        ),
        (
            lambda: RULES["afa"].update(
                ROUNDS[0], RULES["afa"].init(PARAMS), None, np.arange(N) - 1
            ),
            "afa: need clients in 0 ... 9, got -1 ... 8",
        ),
        (
            lambda: RULES["afa"].update(ROUNDS[0], RULES["afa"].init(PARAMS), None, np.arange(3)),
            r"afa: need clients of shape \(10,\), got \(3,\)",
        ),
        (
            lambda: RULES["afa-model"].update(ROUNDS[0], RULES["afa"].init(PARAMS)),
            "afa: need params, the global model, got None",
        ),
        (lambda: RULES["fltrust"].update(ROUNDS[0], ()), "fltrust: need params"),
        (
            lambda: RULES["centered_clipping"].update(PARAMS, PARAMS),
            r"centered_clipping: .*\[n, d\]",
        ),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
