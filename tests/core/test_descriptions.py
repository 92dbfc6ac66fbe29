"""What tells the checkpoints of two simulations apart: the options of a rule and an attack."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advjax import aggregation, poisoning
from advjax.aggregation import Aggregator
from advjax.core.descriptions import described

CENTERED, FMPA = aggregation.centered_clipping, poisoning.i_fmpa


def search(**options):
    return FMPA(search=poisoning.Search(**options))


def closed(value):
    return lambda updates: value


def default(value):
    return lambda updates, value=value: value


@dataclasses.dataclass
class Clip:
    radius: float

    def __call__(self, updates):
        return updates * self.radius


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, updates):
        return updates * self.factor

    def scaled(self, updates):
        return self(updates)


partial = functools.partial
PAIRS = {
    "number": (CENTERED, 5.0, 1e-6),
    "second number": (lambda k: CENTERED(5.0, k), 1, 2),
    "array number": (CENTERED, jnp.float32(5), jnp.float32(6)),
    "fmpa": (lambda alpha: FMPA(alpha=alpha), 0.5, 0.7),
    "fmpa's word": (lambda reference: FMPA(reference=reference), "predictive", "historical"),
    "search": (lambda k: search(num_steps=k), 40, 41),
    "optimizer": (lambda rate: search(optimizer=optax.sgd(rate)), 0.1, 0.2),
    "knows": (lambda knows: poisoning.stateless(poisoning.lie, knows=knows), "all", None),
    "mask": (partial(poisoning.stateless, poisoning.lie), np.arange(3) < 1, np.arange(3) < 2),
    "chosen": (lambda r: aggregation.choose({"a": CENTERED(r), "b": CENTERED(1.0)})["b"], 2.0, 3.0),
    "chosen attack": (lambda s: poisoning.choose({"a": poisoning.mpaf(scale=s)})["a"], 1.0, 2.0),
    "noising": (lambda s: aggregation.noising(CENTERED(1.0), jax.random.key(0), s), 1.0, 2.0),
    "key": (lambda seed: aggregation.noising(CENTERED(1.0), jax.random.key(seed), 1.0), 0, 1),
    "positional": (lambda w: partial(aggregation.mean, w), (1, 2), (2, 1)),
    "tuple": (lambda t: partial(aggregation.mean, weights=t), (1.0, 2), (1.0, 3)),
    "array": (lambda w: partial(aggregation.mean, weights=w), np.ones(2), np.ones(2) * 2),
    "shape": (lambda w: partial(aggregation.mean, weights=w), np.zeros(2), np.zeros((1, 2))),
    "bfloat16": (closed, jnp.bfloat16(1), jnp.bfloat16(2)),
    "bool": (closed, True, False),
    "none": (closed, None, 0),
    "text": (closed, "a", "b"),
    "list": (closed, [1, [2]], [1, [3]]),
    "dictionary": (closed, {"a": 1}, {"a": 2}),
    "set": (closed, {"a", "b"}, {"a", "c"}),
    "default": (default, 1.0, 2.0),
    "dataclass": (Clip, 1.0, 2.0),
    "object": (Scale, 1.0, 2.0),
    "method": (lambda factor: Scale(factor).scaled, 1.0, 2.0),
    "jit": (lambda value: jax.jit(closed(value)), 1.0, 2.0),
    "jax partial": (partial(jax.tree_util.Partial, jnp.add), np.ones(2), np.zeros(2)),
    "deep": (lambda value: functools.reduce(lambda f, _: closed(f), range(20), value), 1.0, 2.0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_options_are_told_apart(name):
    make, first, second = PAIRS[name]
    assert described(make(first)) == described(make(first))
    assert described(make(first)) != described(make(second))


def test_a_description_is_short_and_the_same_in_every_process():
    code = (
        "from advjax.core.descriptions import described\n"
        "from tests.core.test_descriptions import PAIRS\n"
        "print([described(make(value)) for make, value, _ in PAIRS.values()])"
    )
    texts = [described(make(value)) for make, value, _ in PAIRS.values()]
    assert all(len(text) < 3000 and "0x" not in text for text in texts)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == str(texts)
    assert described(aggregation.centered_clipping(5.0)).startswith(
        "Aggregator(init=centered_clipping.<locals>.init, update=reporting.<locals>.update(report="
    )


def test_nothing_is_too_strange_to_be_described():
    def again(updates):
        return again(updates)

    class Broken:
        @property
        def __wrapped__(self):
            raise RuntimeError

    def unfilled():
        return later

    assert "again" in described(again)
    assert described(unfilled).endswith("unfilled(later=None)")
    later = [1]
    later.append(later)
    assert "list(1, list)" in described(unfilled)
    assert described(Broken()) == "Broken" and described(object()) == "object"
    assert described(closed(iter([1]))).endswith("(value=list_iterator)")
    assert described(np.array([object()])) == "object[1]"
    endless = functools.reduce(lambda f, _: closed(f), range(500), 1)
    assert described(endless).startswith("closed.<locals>.<lambda>(value=")
    assert described(jax.jit(lambda x: x)) and described(np.add) and described(len) == "len"
    seen = []
    jax.make_jaxpr(lambda x: seen.append(described(closed(x))) or x)(1.0)
    assert "Tracer" in seen[0]
    assert described(Aggregator) == "Aggregator"


def test_an_optimiser_that_has_been_used_is_the_same():
    def describe(steps, rate=1e-3):
        return described(optax.adam(optax.cosine_decay_schedule(rate, steps)))

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, 44))
    before = described(optimizer)
    weights = {"w": jnp.ones(3)}
    jax.jit(optimizer.update)(weights, optimizer.init(weights))
    assert described(optimizer) == before == describe(44)
    assert before != describe(45) and before != describe(44, 2e-3)
