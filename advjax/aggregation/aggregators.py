"""What a rule with state is, how a function becomes one, and how many share one program."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.aggregation import geometry, requirements, weighing
from advjax.core import checks, random, vectors
from advjax.core.typing import Array, Key


class Aggregator(NamedTuple):
    """A rule of the server, as pure functions in optax's shape.

    Attributes:
      init: `state = init(params)`, from the global model f32[d].
      update: `aggregate, state = update(updates, state, params=None, clients=None)`; updates
        f32[n, d] of the clients int32[n] (0 ... n - 1 if None), aggregate f32[d]. A rule that does
        not look at the clients may leave that parameter out.
      report: like `update`, `aggregate, weights, state = report(...)`, with the weight that each
        client's row has in the aggregate, f32[n]; NaN where a rule has no such weights. None where
        a rule does not tell.
    """

    init: Callable[[Array], Any]
    update: Callable[..., tuple[jax.Array, Any]]
    report: Callable[..., tuple[jax.Array, jax.Array, Any]] | None = None


def reporting(
    init: Callable[[Array], Any], report: Callable[..., tuple[jax.Array, jax.Array, Any]]
) -> Aggregator:
    """The rule whose `update` is its `report` without the weights.

    Args:
      init: `state = init(params)`.
      report: `aggregate, weights, state = report(updates, state, params=None, clients=None)`.
    """

    def update(updates, state, params=None, clients=None):
        aggregate, _, state = report(updates, state, params, clients)
        return aggregate, state

    return Aggregator(init, update, report)


def _unknown_weights(updates: Array) -> jax.Array:
    return jnp.full(len(updates), jnp.nan, jnp.float32)


def _with_clients(function: Callable[..., Any]) -> Callable[..., Any]:
    """An `update` or `report` that takes clients, also where the function itself cannot."""
    try:
        inspect.signature(function).bind(None, None, None, None)
    except TypeError:
        return lambda updates, state, params=None, clients=None: function(updates, state, params)
    except ValueError:  # it does not tell its signature
        pass
    return function


@functools.lru_cache(maxsize=32)
def _whole_report(update: Callable[..., Any], report: Callable[..., Any] | None) -> Any:
    if report is not None:
        return _with_clients(report)
    update = _with_clients(update)

    def without_weights(updates, state, params=None, clients=None):
        aggregate, state = update(updates, state, params, clients)
        return aggregate, _unknown_weights(updates), state

    return without_weights


def report_of(rule: Aggregator) -> Callable[..., tuple[jax.Array, jax.Array, Any]]:
    """The `report` of any rule, the same object for the same rule.

    Args:
      rule: it may have no `report`, and its functions may do without the parameter `clients`.
    """
    try:
        return _whole_report(rule.update, rule.report)
    except TypeError:  # functions that cannot be hashed
        return _whole_report.__wrapped__(rule.update, rule.report)


def stateless(rule: Callable[..., jax.Array], *, key: Key | None = None) -> Aggregator:
    """A function of the updates as an `Aggregator`.

    A rule takes a key if it has a parameter `key`, as `aggregation.dnc` has. In round t it gets
    `fold_in(key, t)`; key and t are the state, so a resumed run draws what an uninterrupted one
    does.

    Args:
      rule: `updates -> aggregate` or `(key, updates) -> aggregate`; options are set with
        `functools.partial`.
      key: for rules that take one; the others do not look at it.

    Raises:
      ValueError: no key for a rule that needs one.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = stateless(lambda updates: updates[0])
      >>> updates = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> aggregate, state = rule.update(updates, rule.init(jnp.zeros(2)))
      >>> aggregate
      Array([1., 2.], dtype=float32)
    """
    parameters = inspect.signature(rule).parameters
    key_parameter = parameters.get("key")
    if key_parameter is None or (
        key is None and key_parameter.default is not inspect.Parameter.empty
    ):
        initial_state = ()
    elif key is None:
        raise ValueError("stateless: need a key for a rule that takes one, got key=None.")
    else:
        initial_state = (random.as_typed(key), jnp.zeros((), jnp.int32))
    is_first = next(iter(parameters), None) == "key"
    weights_function, is_sum = weighing.weights_function_of(rule), weighing.is_weighted_sum(rule)

    def call(function, updates, state):
        if not state:
            return function(updates)
        round_key = jax.random.fold_in(*state)
        return function(round_key, updates) if is_first else function(updates, key=round_key)

    def following(state):
        return (state[0], state[1] + 1) if state else ()

    def update(updates, state, params=None, clients=None):
        del params, clients
        return call(rule, updates, state), following(state)

    def report(updates, state, params=None, clients=None):
        if weights_function is None:
            aggregate, state = update(updates, state, params, clients)
            return aggregate, _unknown_weights(updates), state
        weights = call(weights_function, updates, state)
        if is_sum:
            return vectors.combine(weights, updates), weights, following(state)
        return call(rule, updates, state), weights, following(state)

    return Aggregator(lambda params: initial_state, update, report)


def choose(rules: Mapping[str, Aggregator]) -> dict[str, Aggregator]:
    """The same rules with one common program, so that a sweep over rules compiles once.

    All entries share one `update` and one `report`; which rule runs is an index in the state, set
    by the entry's `init`. Every state holds the states of all rules. Under `vmap` over the states
    all rules run and one result is kept, so loop or `lax.map` over rules.

    Args:
      rules: the rules by name; their states do not depend on how many clients a round has.

    Raises:
      ValueError: no rules.

    Example:
      >>> import jax.numpy as jnp
      >>> rules = choose({
      ...     "first": stateless(lambda updates: updates[0]),
      ...     "last": stateless(lambda updates: updates[-1]),
      ... })
      >>> rules["first"].update is rules["last"].update
      True
      >>> updates = jnp.array([[1.0], [3.0]])
      >>> [float(r.update(updates, r.init(jnp.zeros(1)))[0][0]) for r in rules.values()]
      [1.0, 3.0]
    """
    if not rules:
        raise ValueError("choose: need at least one rule, got none.")
    members = tuple(rules.values())
    reports = tuple(report_of(rule) for rule in members)

    def branch(number):
        def run(states, updates, params, clients):
            aggregate, weights, state = reports[number](updates, states[number], params, clients)
            return aggregate, weights, states[:number] + (state,) + states[number + 1 :]

        return run

    branches = [branch(number) for number in range(len(members))]

    def report(updates, state, params=None, clients=None):
        index, states = state
        aggregate, weights, states = jax.lax.switch(
            index, branches, states, updates, params, clients
        )
        return aggregate, weights, (index, states)

    def init(number):
        def of_params(params):
            return jnp.asarray(number, jnp.int32), tuple(rule.init(params) for rule in members)

        return of_params

    _, update, _ = reporting(init(0), report)
    return {name: Aggregator(init(i), update, report) for i, name in enumerate(rules)}


def noising(rule: Aggregator, key: Key, scale: ArrayLike, *, relative: bool = False) -> Aggregator:
    """The rule with Gaussian noise on its aggregate, `N(0, scale^2 I)`.

    With norm bounding this is weak differential privacy; FLAME's noise is
    `noising(stateless(flame), key, 0.001, relative=True)`.

    Args:
      rule: the rule.
      key: round t draws from `fold_in(key, t)`; key and t are part of the state.
      scale: standard deviation of a coordinate.
      relative: in units of the median norm of the round's finite updates.

    Raises:
      ValueError: a negative scale.

    Source: Z. Sun et al., "Can You Really Backdoor Federated Learning?", 2019; T. Nguyen et al.,
    "FLAME: Taming Backdoors in Federated Learning", USENIX Security 2022.
    """
    checks.non_negative("noising", "scale", scale)
    report_inner = report_of(rule)

    def init(params):
        return rule.init(params), random.as_typed(key), jnp.zeros((), jnp.int32)

    def report(updates, state, params=None, clients=None):
        updates = requirements.updates("noising", updates)
        inner, key, number = state
        aggregate, weights, inner = report_inner(updates, inner, params, clients)
        noise = jax.random.normal(jax.random.fold_in(key, number), aggregate.shape)
        lengths = geometry.norms(updates)
        unit = geometry.median_where(jnp.isfinite(lengths), lengths) if relative else 1.0
        return (
            (aggregate + scale * unit * noise).astype(aggregate.dtype),
            weights,
            (inner, key, number + 1),
        )

    return reporting(init, report)
