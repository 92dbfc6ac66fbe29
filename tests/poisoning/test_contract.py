"""What every attack on updates promises, run over one table of attacks.

An attack is compiled here once, for masks and a scalar that are arguments; without XLA's
optimisations, since compiling is what the table costs.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import poisoning
from tests import helpers

NUM_CLIENTS, NUM_PARAMETERS = 9, 5
IS_BYZANTINE = np.arange(NUM_CLIENTS) < 4
UPDATES = np.random.default_rng(0).normal(0.3, 1, (NUM_CLIENTS, NUM_PARAMETERS)).astype(np.float32)
KEY = jax.random.key(0)
OTHERS = np.roll(IS_BYZANTINE, 2)
# Byzantine clients, known clients and the scalar, four times.
LANES = (
    np.stack([IS_BYZANTINE, OTHERS, OTHERS & IS_BYZANTINE, ~IS_BYZANTINE]),
    np.stack([IS_BYZANTINE, ~OTHERS, np.ones(NUM_CLIENTS, bool), OTHERS]),
    np.float32([0.5, 1, 2, 3]),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """An attack of `(key, updates, is_byzantine, knows, value)`, value a traced option."""

    attack: Callable
    run: Callable
    is_random: bool = False
    looks: bool = True


def _case(attack, option, *, as_value=lambda value: value, is_random=False, looks=True, **options):
    def run(key, updates, is_byzantine, knows, value):
        traced = {option: as_value(value)} if option else {}
        return attack(key, updates, is_byzantine, knows=knows, **traced, **options)

    return Case(attack, run, is_random, looks)


_searched = functools.partial(_case, option="search", as_value=lambda value: (value, 12))
CASES = {
    "no_attack": _case(poisoning.no_attack, None, looks=False),
    "sign_flip": _case(poisoning.sign_flip, "scale", looks=False),
    "gaussian": _case(poisoning.gaussian, "stddev", is_random=True, looks=False),
    "lie": _case(poisoning.lie, "z"),
    "lie-quantile": _case(poisoning.lie, "sign"),
    "ipm": _case(poisoning.ipm, "epsilon"),
    "min_max-std": _case(poisoning.min_max, None),
    "min_max-unit": _case(poisoning.min_max, None, direction="unit"),
    "min_max-sign-search": _searched(poisoning.min_max, direction="sign"),
    "min_sum-std-search": _searched(poisoning.min_sum),
    "min_sum-unit-min": _case(poisoning.min_sum, None, direction="unit", bound="min"),
    "fang-krum": _case(
        poisoning.fang, "neighbors", as_value=lambda v: jnp.int32(v) + 3, rule="krum"
    ),
    "fang-trimmed_mean": _case(
        poisoning.fang, "factor", as_value=lambda v: v + 1, rule="trimmed_mean", is_random=True
    ),
}
LOOKING = [name for name, case in CASES.items() if case.looks]


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@functools.cache
def compiled(name):
    """The attack, which fails if it is traced twice; chex counts by the function's name."""

    def attack(*args):
        return CASES[name].run(*args)

    attack.__name__ = f"poisoning {name}"
    return jax.jit(chex.assert_max_traces(attack, n=1))


def crafted(name, updates=UPDATES, is_byzantine=IS_BYZANTINE, knows=None, value=2.0, key=KEY):
    knows = is_byzantine if knows is None else knows
    return np.asarray(compiled(name)(key, updates, is_byzantine, knows, np.float32(value)))


def test_every_attack_has_a_case():
    attacks = {
        getattr(poisoning, name)
        for name in poisoning.__all__
        if inspect.isfunction(getattr(poisoning, name))
        and "is_byzantine" in inspect.signature(getattr(poisoning, name)).parameters
    }
    assert {case.attack for case in CASES.values()} == attacks


def test_only_byzantine_rows_change(name):
    updates = UPDATES.copy()
    updates[5:7] = [[np.nan], [np.inf]]
    for is_byzantine in (IS_BYZANTINE, OTHERS & IS_BYZANTINE, np.arange(NUM_CLIENTS) != 6):
        result = crafted(name, updates, is_byzantine, knows=IS_BYZANTINE)
        helpers.assert_same_bits(result[~is_byzantine], updates[~is_byzantine])
        if name != "no_attack":
            assert np.all(np.any(result != updates, axis=1)[is_byzantine])
    for knows in (IS_BYZANTINE, np.zeros(NUM_CLIENTS, bool)):
        nobody = np.zeros(NUM_CLIENTS, bool)
        helpers.assert_same_bits(crafted(name, updates, nobody, knows), updates)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_shape_and_dtype_stay(name, dtype):
    updates = jnp.asarray(UPDATES, dtype)
    for run in (
        lambda: CASES[name].run(KEY, updates, jnp.asarray(IS_BYZANTINE), None, jnp.float32(2)),
        lambda: CASES[name].run(KEY, updates, IS_BYZANTINE, ~IS_BYZANTINE, np.float32(2)),
    ):
        result = jax.eval_shape(run)
        assert result.shape == UPDATES.shape
        assert result.dtype == dtype


def test_jit_equals_eager(name):
    eager = CASES[name].run(KEY, UPDATES, IS_BYZANTINE, None, 2)
    # 1e-5: fused sums round differently; the values are of size one to ten.
    np.testing.assert_allclose(eager, crafted(name), rtol=1e-5, atol=1e-5)


def test_vmap_over_masks_and_the_scalar_equals_a_loop(name):
    attack = jax.vmap(lambda *lane: CASES[name].run(KEY, UPDATES, *lane))
    together = np.asarray(jax.jit(attack)(*LANES))
    for result, *lane in zip(together, *LANES, strict=True):
        # 1e-5: as above.
        np.testing.assert_allclose(result, crafted(name, UPDATES, *lane), rtol=1e-5, atol=1e-5)


def test_pmap_traces(name):
    attack = jax.pmap(lambda *lane: CASES[name].run(KEY, UPDATES, *lane))
    assert jax.eval_shape(attack, *LANES).shape == (len(LANES[2]), *UPDATES.shape)


def test_the_key_decides(name):
    helpers.assert_same_bits(crafted(name), crafted(name))
    other = crafted(name, key=jax.random.key(1))
    assert np.array_equal(other, crafted(name)) != CASES[name].is_random
    if CASES[name].is_random:
        assert not np.array_equal(other[0], other[1])


@pytest.mark.parametrize("knows", [IS_BYZANTINE, OTHERS, ~IS_BYZANTINE, OTHERS & ~IS_BYZANTINE])
def test_what_is_not_known_does_not_count(name, knows):
    updates = UPDATES.copy()
    uncounted = ~knows & (CASES[name].looks | ~IS_BYZANTINE)
    for value in (7, np.nan, -np.inf):
        updates[uncounted] = value
        helpers.assert_same_bits(
            crafted(name, updates, knows=knows)[IS_BYZANTINE],
            crafted(name, knows=knows)[IS_BYZANTINE],
        )


@pytest.mark.parametrize("name", LOOKING, scope="module")
def test_what_is_known_counts(name):
    for knows in (IS_BYZANTINE, ~IS_BYZANTINE):
        updates = UPDATES.copy()
        updates[knows] *= 2
        before, after = crafted(name, knows=knows), crafted(name, updates, knows=knows)
        assert not np.allclose(before[IS_BYZANTINE], after[IS_BYZANTINE])


@pytest.mark.parametrize("name", LOOKING, scope="module")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_known_updates_that_are_not_finite_are_ignored(name, value):
    updates = UPDATES.copy()
    updates[1, 2] = value
    knows = IS_BYZANTINE & (np.arange(NUM_CLIENTS) != 1)
    helpers.assert_same_bits(
        crafted(name, updates)[IS_BYZANTINE], crafted(name, knows=knows)[IS_BYZANTINE]
    )


def test_degenerate_knowledge_stays_finite(name):
    for rows in (UPDATES, np.ones_like(UPDATES), np.zeros_like(UPDATES)):
        for knows in (
            np.arange(NUM_CLIENTS) == 0,
            np.arange(NUM_CLIENTS) == 8,
            np.arange(NUM_CLIENTS) < 2,
            np.zeros(NUM_CLIENTS, bool),  # not seen under jit
            np.ones(NUM_CLIENTS, bool),
        ):
            for is_byzantine in (IS_BYZANTINE, np.ones(NUM_CLIENTS, bool)):
                if name == "lie-quantile" and is_byzantine.all():
                    continue  # z has no quantile there
                assert np.all(np.isfinite(crafted(name, rows, is_byzantine, knows)))


def test_bad_input_is_one_sentence(name):
    run, caller = CASES[name].run, CASES[name].attack.__name__
    for updates, is_byzantine, knows, sentence in (
        (UPDATES[0], IS_BYZANTINE, None, r"need updates of shape \[n, d\].* got shape \(5,\)"),
        (UPDATES[None], IS_BYZANTINE, None, r"got shape \(1, 9, 5\)"),
        (UPDATES[:, :0], IS_BYZANTINE, None, r"got shape \(9, 0\)"),
        (UPDATES[:0], IS_BYZANTINE[:0], None, r"got shape \(0, 5\)"),
        (UPDATES.astype(np.int32), IS_BYZANTINE, None, "need float updates, got dtype int32"),
        (UPDATES.tolist(), IS_BYZANTINE, None, "need updates as an array, got list"),
        (UPDATES, IS_BYZANTINE[:3], None, r"need is_byzantine .* bool\[9\].* got bool\[3\]"),
        (UPDATES, np.arange(9), None, r"need is_byzantine .* got int64\[9\]"),
        (UPDATES, 2, None, "need is_byzantine .* got 2"),
        (UPDATES, IS_BYZANTINE, IS_BYZANTINE[:, None], r"need knows .* got bool\[9, 1\]"),
        (UPDATES, IS_BYZANTINE, np.ones(9), r"need knows .* got float64\[9\]"),
        (UPDATES, IS_BYZANTINE, "all", "need knows .* got 'all'"),
    ):
        with pytest.raises(ValueError, match=rf"^{caller}: .*{sentence}.*\.$"):
            run(KEY, updates, is_byzantine, knows, 2)


@pytest.mark.parametrize("name", LOOKING, scope="module")
def test_nobody_known_is_refused(name):
    nobody = np.zeros(NUM_CLIENTS, bool)
    sentence = "need at least one client in knows, got none of n=9 with num_byzantine=4"
    with pytest.raises(ValueError, match=sentence):
        CASES[name].run(KEY, UPDATES, IS_BYZANTINE, nobody, 2)
    helpers.assert_same_bits(CASES[name].run(KEY, UPDATES, nobody, None, 2), UPDATES)


@pytest.mark.parametrize(
    "attack, options, sentence",
    [
        (poisoning.gaussian, {"stddev": -1}, "need a finite stddev >= 0"),
        (poisoning.ipm, {"epsilon": -0.5}, "need a finite epsilon >= 0"),
        (poisoning.min_max, {"direction": "up"}, "unknown direction 'up'; known: sign, std, unit"),
        (poisoning.min_max, {"search": (-1, 5)}, "need a finite gamma0 >= 0"),
        (poisoning.min_sum, {"search": (1, 0)}, "need num_halvings >= 1"),
        (poisoning.min_sum, {"bound": "mean"}, "unknown bound 'mean'; known: max, min"),
        (poisoning.fang, {"rule": "dnc"}, "'dnc'.* krum, multi_krum, bulyan, median, trimmed_mean"),
        (poisoning.fang, {"rule": "krum", "neighbors": 0}, "need neighbors >= 1"),
        (poisoning.fang, {"rule": "krum", "num_halvings": 0}, "need num_halvings >= 1"),
        (poisoning.fang, {"rule": "median", "factor": 0.5}, "need factor >= 1, got factor=0.5"),
    ],
)
def test_bad_options_are_one_sentence(attack, options, sentence):
    with pytest.raises(ValueError, match=rf"^{attack.__name__}: .*{sentence}.*\.$"):
        attack(KEY, UPDATES, IS_BYZANTINE, **options)


def test_lie_needs_an_honest_half():
    for n, m in ((9, 5), (10, 6), (3, 3)):
        with pytest.raises(
            ValueError, match=rf"need 2 \* num_byzantine <= n.*={m} and n={n}; give"
        ):
            poisoning.lie(KEY, np.ones((n, 2), np.float32), np.arange(n) < m)
    with pytest.raises(ValueError, match="need n >= 3 to choose z, got n=2; give z"):
        poisoning.lie(KEY, UPDATES[:2], IS_BYZANTINE[:2])
    assert np.all(np.isfinite(poisoning.lie(KEY, UPDATES, np.ones(9, bool), z=1.0)))
