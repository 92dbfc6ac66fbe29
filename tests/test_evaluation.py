"""Curves: every method gives the same numbers, in any batches, on any devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import attacks, balls, evaluation, models, parallel, traits

EPSILONS = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4], np.float32)
PGD = functools.partial(attacks.pgd, num_steps=4)
NET = models.make("mlp", num_classes=4, hidden=(16,))


def classifier(seed: int):
    return advjax.bind(NET, NET.init(jax.random.key(seed), jnp.zeros((1, 3, 3, 1))))


@pytest.fixture(scope="module")
def problem():
    """A random network that is right about each of 21 random images: labels are its answers."""
    x = np.array(jax.random.uniform(jax.random.key(7), (21, 3, 3, 1)))
    logits_fn = classifier(0)
    y = np.array(jnp.argmax(logits_fn(x), axis=-1), np.int32)
    y[:2] = (y[:2] + 1) % 4  # and wrong about two
    return logits_fn, x, y


def curve(problem, attack=PGD, epsilons=EPSILONS, **options):
    logits_fn, x, y = problem
    return np.asarray(
        evaluation.robust_accuracy(jax.random.key(1), attack, logits_fn, x, y, epsilons, **options)
    )


def by_loop(problem, attack=PGD, epsilons=EPSILONS):
    """The definition: attack at each epsilon, accumulate from small to large."""
    logits_fn, x, y = problem
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(len(y)))
    run = jax.jit(lambda epsilon: attack(keys, logits_fn, jnp.array(x), jnp.array(y), epsilon))
    alive, shares = np.ones(len(y), bool), []
    for epsilon in epsilons:
        alive &= np.asarray(jnp.argmax(logits_fn(run(epsilon)), axis=-1)) == y
        shares.append(np.float32(alive.sum()) / np.float32(len(y)))
    return np.array(shares)


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("method", ["map", "vmap", "active"])
def test_exact_methods_equal_a_loop_in_any_batches(problem, method, batch_size):
    expected = by_loop(problem)
    np.testing.assert_array_equal(curve(problem, method=method, batch_size=batch_size), expected)
    assert expected[0] == np.float32(19 / 21) and expected[-1] < 0.5  # there is something to find


@pytest.mark.parametrize("num_epsilons", [1, 2, 7, 8])
def test_bisection_equals_map_for_a_monotone_attack(num_epsilons):
    # A linear network and FGSM: broken exactly from some epsilon on, so bisection is exact.
    x = np.linspace(0.5, 0.9, 13, dtype=np.float32).reshape(13, 1, 1, 1)
    logits_fn = jax.tree_util.Partial(lambda x: (x[:, 0, 0] - 0.5) * jnp.array([-1.0, 1.0]))
    problem = (logits_fn, x, np.ones(13, np.int32))
    epsilons = np.linspace(0, 0.37, num_epsilons, dtype=np.float32)
    options = dict(attack=attacks.fgsm, epsilons=epsilons)
    np.testing.assert_array_equal(
        curve(problem, method="bisect", **options), curve(problem, method="map", **options)
    )


def test_bisection_costs_the_logarithm_of_the_number_of_epsilons(problem):
    calls = []

    @traits.declare(example_keys=True)
    def counting(key, logits_fn, x, y, epsilon):
        jax.debug.callback(lambda _: calls.append(1), epsilon[0])
        return attacks.fgsm(key, logits_fn, x, y, epsilon)

    for num_epsilons, num_attacks in [(1, 1), (7, 3), (8, 4), (32, 6)]:
        calls.clear()
        curve(problem, counting, np.linspace(0, 0.3, num_epsilons), method="bisect")
        jax.effects_barrier()
        assert len(calls) == num_attacks


def test_bisection_only_overstates(problem):
    exact, bisected = curve(problem, method="map"), curve(problem, method="bisect")
    assert np.all(bisected >= exact) and np.all(np.diff(bisected) <= 0)


def test_epsilons_in_any_order_and_epsilon_zero_is_the_clean_accuracy(problem):
    order = np.array([3, 0, 5, 1, 4, 2])
    for method in evaluation.METHODS:
        shuffled = curve(problem, epsilons=EPSILONS[order], method=method)
        np.testing.assert_array_equal(shuffled, curve(problem, method=method)[order])
        assert shuffled[1] == evaluation.accuracy(*problem)


def test_the_curve_is_monotone_even_for_an_attack_that_is_not(problem):
    @traits.declare(example_keys=True)
    def only_small(key, logits_fn, x, y, epsilon):
        x_adv = attacks.fgsm(key, logits_fn, x, y, epsilon)
        return jnp.where(epsilon < 0.3, x_adv, x)  # finds nothing at the largest epsilon

    shares = curve(problem, only_small, method="map")
    assert np.all(np.diff(shares) <= 0) and shares[-1] == shares[-2] < shares[0]


def test_one_trace_for_many_epsilons_and_many_weights(problem):
    logits_fn, x, y = problem

    @jax.jit
    @chex.assert_max_traces(n=1)
    def compiled(logits_fn, epsilons):
        return evaluation.robust_accuracy(
            jax.random.key(0), PGD, logits_fn, jnp.array(x), jnp.array(y), epsilons, method="map"
        )

    first = compiled(logits_fn, jnp.linspace(0, 0.3, 16))
    assert first.shape == (16,)
    for seed in range(3):
        compiled(classifier(seed), jnp.linspace(0, 0.1 * seed, 16))


def test_eager_calls_compile_once(problem):
    _, x, y = problem
    traces = []

    @traits.declare(example_keys=True)
    def traced(key, logits_fn, x, y, epsilon):
        traces.append(1)
        return attacks.fgsm(key, logits_fn, x, y, epsilon)

    for seed in range(3):
        evaluation.robust_accuracy(
            jax.random.key(seed), traced, classifier(seed), x, y, EPSILONS, method="map"
        )
    assert len(traces) == 1


@pytest.mark.parametrize("method", ["map", "vmap", "bisect"])
def test_vmap_over_a_stack_of_eight_models_equals_a_loop(problem, method):
    _, x, y = problem
    nets = [classifier(seed) for seed in range(8)]

    def one(f):
        return evaluation.robust_accuracy(jax.random.key(1), PGD, f, x, y, EPSILONS, method=method)

    stacked = jax.vmap(one)(advjax.stack(nets))
    # Counts of images: rounding inside the batched products flips none of these.
    np.testing.assert_array_equal(stacked, np.stack([one(f) for f in nets]))


@pytest.mark.parametrize(
    "method, batch_size", [("map", None), ("map", 8), ("vmap", None), ("bisect", 8), ("active", 8)]
)
def test_eight_devices_equal_one(problem, method, batch_size):
    mesh = parallel.make_mesh()
    assert mesh.size == 8
    sharded = curve(problem, method=method, batch_size=batch_size, mesh=mesh)
    np.testing.assert_array_equal(sharded, curve(problem, method=method, batch_size=batch_size))


def test_an_attack_of_the_users_own_gets_one_key_a_batch(problem):
    def noise(key, logits_fn, x, y, epsilon):
        return jnp.clip(x + epsilon * jax.random.normal(key, x.shape), 0, 1)

    shares = curve(problem, noise, batch_size=8)
    assert shares[0] == evaluation.accuracy(*problem) and shares[-1] < shares[0]


def test_worst_case_is_the_intersection(problem):
    logits_fn, x, y = problem
    both = [attacks.fgsm, attacks.rand_fgsm]
    key = jax.random.key(1)
    kept = [
        np.asarray(evaluation.survival(key, a, logits_fn, x, y, EPSILONS, method="map"))
        for a in both
    ]
    worst = evaluation.worst_case(key, both, logits_fn, x, y, EPSILONS, method="map")
    np.testing.assert_array_equal(worst, (kept[0] & kept[1]).mean(1, dtype=np.float32))
    alone = evaluation.worst_case(key, [attacks.fgsm], logits_fn, x, y, 0.1)
    assert alone.shape == () and alone == curve(problem, attacks.fgsm, np.array([0.1]))[0]


def test_worst_case_and_predict_name_what_is_wrong(problem):
    (logits_fn, x, y), key = problem, jax.random.key(0)
    for call, sentence in [
        (lambda: evaluation.worst_case(key, [attacks.fgsm], logits_fn, [0.5], y, 0.1),
         "worst_case: need images as an array, got list"),
        (lambda: evaluation.worst_case(key, [attacks.fgsm], logits_fn, x, y, -0.1),
         r"got epsilons=\[-0\.1"),
        (lambda: evaluation.predict(logits_fn, x, batch_size=0), "need batch_size >= 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("method", ["map", "vmap", "active", "bisect"])
def test_an_image_that_is_wrong_by_itself_is_not_robust(method):
    """Not even against an attack that moves it to its label, as one with targets may."""

    def logits_fn(x):
        return x.reshape(len(x), 4)

    def helpful(key, logits_fn, x, y, epsilon):
        return jax.nn.one_hot(y, 4).reshape(x.shape)

    x, y = np.eye(4, dtype=np.float32).reshape(4, 2, 2, 1), np.array([0, 1, 2, 2], np.int32)
    problem = logits_fn, x, y
    np.testing.assert_array_equal(curve(problem, helpful, [0.1, 0.2], method=method), [0.75, 0.75])
    worst = evaluation.worst_case(jax.random.key(0), [helpful], *problem, 0.1, method=method)
    assert worst == 0.75


def test_minimal_curve_reads_distances():
    found = evaluation.MinNorm(
        jnp.zeros((4, 1, 1, 1)), jnp.array([0.0, 0.1, 0.3, jnp.inf]),
        jnp.array([True, True, True, False]),
    )  # fmt: skip
    np.testing.assert_array_equal(
        evaluation.minimal_curve(found, [0.0, 0.05, 0.1, 0.2, 9.0]), [0.75, 0.75, 0.5, 0.5, 0.25]
    )


def test_accuracy_masks_the_last_batch_and_counts_nan_as_wrong(problem):
    logits_fn, x, y = problem
    for batch_size in (None, 4, 20, 50):
        assert evaluation.accuracy(logits_fn, x, y, batch_size=batch_size) == np.float32(19 / 21)
    broken = jax.tree_util.Partial(lambda x: jnp.full((x.shape[0], 4), jnp.nan))
    assert evaluation.accuracy(broken, x, np.zeros_like(y)) == 0
    assert curve((broken, x, y))[-1] == 0


def test_methods_of_choice():
    assert evaluation.default_method(PGD) == "bisect"
    assert evaluation.default_method(attacks.fgsm) == "map"
    assert evaluation.default_method(lambda *_: None) == "map"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(x=np.zeros((21, 3, 3, 1), np.uint8)), "float images"),
        (dict(x=np.full((21, 3, 3, 1), 2.0, np.float32)), r"images in \[0, 1\], got values"),
        (dict(y=np.full(21, 4, np.int32)), r"labels in 0 \.\.\. 3, got 4"),
        (dict(y=np.zeros(20, np.int32)), "one label an image"),
        (dict(epsilons=[-0.1]), "finite epsilons >= 0"),
        (dict(epsilons=[np.nan]), "finite epsilons >= 0"),
        (dict(epsilons=[]), "need a list of epsilons"),
        (dict(epsilons=0.1), "need a list of epsilons"),
        (dict(method="loop"), "unknown method 'loop'; known: map, vmap, bisect, active"),
        (dict(batch_size=0), "batch_size >= 1, got batch_size=0"),
        (dict(x=np.zeros((0, 3, 3, 1), np.float32), y=np.zeros(0, np.int32)), "at least one image"),
    ],
)
def test_bad_input_is_one_sentence(problem, change, sentence):
    logits_fn, x, y = problem
    given = dict(x=x, y=y, epsilons=EPSILONS) | change
    options = {k: v for k, v in given.items() if k not in ("x", "y", "epsilons")}
    with pytest.raises(ValueError, match=sentence) as caught:
        evaluation.robust_accuracy(
            jax.random.key(0), PGD, logits_fn, given["x"], given["y"], given["epsilons"], **options
        )
    assert "\n" not in str(caught.value)


def test_a_classifier_of_the_wrong_shape_is_told(problem):
    _, x, y = problem
    with pytest.raises(ValueError, match=r"logits of shape \[21, k\]"):
        evaluation.accuracy(lambda x: x, x, y)


def test_l2_and_l1_curves_stay_monotone_with_restarts(problem):
    for ball, scale in [(balls.l2, 5), (balls.l1, 20)]:
        attack = functools.partial(PGD, ball=ball, num_restarts=2)
        shares = curve(problem, attack, EPSILONS * scale)
        assert np.all(np.diff(shares) <= 0) and shares[-1] < shares[0]


def test_what_the_classifier_gets_wrong_by_itself_counts_as_broken():
    inf = np.float32(np.inf)
    found = evaluation.MinNorm(
        np.zeros((3, 1, 1, 1), np.float32), np.array([0.5, inf, inf], np.float32),
        np.array([True, False, False]),
    )  # fmt: skip
    np.testing.assert_allclose(evaluation.minimal_curve(found, [0.0, 1.0]), [1, 2 / 3], rtol=1e-6)
    is_correct = np.array([True, False, True])
    curve = evaluation.minimal_curve(found, [0.0, 1.0], is_correct=is_correct)
    np.testing.assert_allclose(curve, [2 / 3, 1 / 3], rtol=1e-6)


def _noisy(logits_fn, key, x):
    return logits_fn(x + 0.05 * jax.random.normal(key, x.shape))


def test_a_random_classifier_has_a_curve_and_one_trace_for_every_key(problem):
    _, x, y = problem

    def attack(key, logits_fn, x, y, epsilon):
        return attacks.fgsm(key, logits_fn, x, y, epsilon)

    counting = chex.assert_max_traces(attack, n=1)
    for seed in (2, 1, 0):
        random_fn = advjax.Randomised(
            jax.tree_util.Partial(_noisy, classifier(seed)), jax.random.key(seed)
        )
        curve((random_fn, x, y), counting, [0.1])
    rand = functools.partial(attacks.auto_attack, version="rand", num_steps=3, num_samples=2)
    (clean, attacked) = curve((random_fn, x, y), rand, [0.0, 0.4])
    assert clean == evaluation.accuracy(random_fn, x, y) and attacked < clean


def test_the_default_method_names_the_attacks_that_promise_to_be_monotone():
    monotone = {name for name in attacks.__all__ if traits.of(getattr(attacks, name)).monotone}
    assert {"pgd", "square", "auto_attack"} <= monotone
    for name in attacks.__all__:
        if name != "cascade":
            is_named = f"`{name}`" in evaluation.default_method.__doc__
            assert is_named == (name in monotone), name


TARGETED = {
    "partial": functools.partial(attacks.pgd, targeted=True),
    "partial of a partial": functools.partial(
        functools.partial(attacks.pgd, targeted=True), num_steps=2
    ),
    "Partial": jax.tree_util.Partial(attacks.fgsm, targeted=True),
}


@pytest.mark.parametrize("attack", TARGETED.values(), ids=TARGETED)
def test_targets_are_not_taken_for_the_truth(problem, attack):
    message = "^{}: need an untargeted attack, since y are the true labels here, got targeted=True"
    logits_fn, x, y = problem
    arguments = logits_fn, x, y, 0.1
    with pytest.raises(ValueError, match=message.format("robust_accuracy")):
        curve(problem, attack)
    with pytest.raises(ValueError, match=message.format("worst_case")):
        evaluation.worst_case(jax.random.key(0), [PGD, attack], *arguments)
    with pytest.raises(ValueError, match=message.format("cascade")):
        attacks.cascade(jax.random.key(0), {"fgsm": attacks.fgsm, "mine": attack}, *arguments)
    # What is switched off again is no targeted attack.
    off = functools.partial(attack, targeted=False)
    assert evaluation.worst_case(jax.random.key(0), [off], *arguments) <= 1


@pytest.mark.parametrize("attack", [attacks.deepfool, functools.partial(attacks.ddn, num_steps=2)])
def test_a_minimum_norm_attack_has_no_epsilon(problem, attack):
    message = r"need attack\(key, logits_fn, x, y, epsilon\), .* see evaluation.minimal_curve.$"
    logits_fn, x, y = problem
    with pytest.raises(ValueError, match="^robust_accuracy: " + message) as caught:
        curve(problem, attack)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^worst_case: " + message):
        evaluation.worst_case(jax.random.key(0), [attack], logits_fn, x, y, 0.1)
    with pytest.raises(ValueError, match="^cascade: " + message):
        attacks.cascade(jax.random.key(0), {"mine": attack}, logits_fn, x, y, 0.1)
