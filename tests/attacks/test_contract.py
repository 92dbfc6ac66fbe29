"""What every fixed-budget attack promises, run over one table of attacks.

An attack is compiled here for eight images with one epsilon and one key each, so a single call
meets zero, tiny, ordinary and huge epsilons, and most tests share that program. Compiling is what
the table costs, in the slow tests too; without XLA's optimisations it costs a third.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from advjax import attacks, balls, losses, metrics, parallel, traits
from advjax.core import random
from tests import helpers

pytestmark = pytest.mark.usefixtures("quick_compilation")
NUM_IMAGES = 8  # one for each virtual device
EPSILONS = np.array([0, 1e-12, 1e-6, 0.03, 0.1, 0.3, 1, 1e6], np.float32)
USUAL = np.linspace(0.05, 0.4, NUM_IMAGES, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """An attack, configured, and what of its options the checks have to know."""

    attack: functools.partial
    ball: balls.Ball = balls.linf
    is_random: bool = False
    targeted: bool = False
    loss_fn: object = losses.cross_entropy


def _case(attack, *, is_random=False, **options):
    default = balls.l2 if attack is attacks.fgm else balls.linf
    loss_fn = losses.dlr if attack is attacks.apgd_targeted else losses.cross_entropy
    return Case(
        functools.partial(attack, **options),
        options.get("ball", default),
        is_random,
        options.get("targeted", False),
        options.get("loss_fn", loss_fn),
    )


_pgd = functools.partial(_case, attacks.pgd, is_random=True, num_steps=3)
_one_pixel = functools.partial(
    _case, attacks.one_pixel, is_random=True, num_pixels=3, population=8, generations=3
)
# A wide difference and only the sign of it (linf): in l2 the rounding of a difference of losses
# moves the image by some 1e-5, more than these tests allow.
_SAMPLED = {"num_steps": 3, "num_samples": 20, "sigma": 0.1, "loss_fn": losses.cross_entropy}
_apgd = functools.partial(_case, attacks.apgd, is_random=True, num_steps=5)
_square = functools.partial(
    _case, attacks.square, is_random=True, num_queries=20, loss_fn=losses.margin
)
CASES = {
    "fgsm": _case(attacks.fgsm),
    "fgsm-targeted": _case(attacks.fgsm, targeted=True),
    "fgm-l2": _case(attacks.fgm),
    "fgm-linf": _case(attacks.fgm, ball=balls.linf),
    "least_likely": _case(attacks.least_likely),
    "least_likely-iterative": _case(attacks.least_likely, num_steps=3),
    "bim": _case(attacks.bim, num_steps=3),
    "bim-targeted": _case(attacks.bim, num_steps=3, targeted=True),
    "rand_fgsm": _case(attacks.rand_fgsm, is_random=True),
    "pgd-linf": _pgd(),
    "pgd-l2": _pgd(ball=balls.l2),
    "pgd-l1": _pgd(ball=balls.l1),
    "pgd-restarts": _pgd(num_restarts=2),
    "pgd-targeted": _pgd(targeted=True),
    "pgd-margin": _pgd(loss_fn=losses.margin),
    "pgd-dlr": _pgd(loss_fn=losses.dlr),
    "apgd-linf": _apgd(),
    "apgd-l2": _apgd(ball=balls.l2),
    "apgd-l1": _apgd(ball=balls.l1),
    "apgd-dlr": _apgd(loss_fn=losses.dlr, num_restarts=2),
    "apgd_targeted": _case(attacks.apgd_targeted, is_random=True, num_steps=3),
    "square-linf": _square(),
    "square-l2": _square(ball=balls.l2),
    "auto_attack": _case(attacks.auto_attack, is_random=True, num_steps=3, num_queries=8),
    "one_pixel": _one_pixel(),
    "one_pixel-rand1-targeted": _one_pixel(strategy="rand1", targeted=True),
    "nes": _case(attacks.nes, is_random=True, **_SAMPLED),
    "spsa": _case(attacks.spsa, is_random=True, **_SAMPLED),
    # Through a channel that changes nothing, so that the checks here see what the attack sees; one
    # that does is in test_physical.py.
    "photo": _case(
        attacks.photo, num_steps=3, num_samples=2, num_held=2, channel=lambda keys, x: x
    ),
}
# One of each kind runs eagerly and on eight devices; the others, which differ by the loss or the
# target, are only traced for the devices.
ON_DEVICES = (
    "fgsm", "fgm-l2", "least_likely-iterative", "rand_fgsm", "pgd-l1", "pgd-restarts", "one_pixel",
    "nes", "apgd-l2", "square-l2", "auto_attack",
)  # fmt: skip
NETWORK = helpers.mlp_network(0)
CONSTANT = jax.tree.map(jnp.zeros_like, NETWORK)
X = helpers.images(0, NUM_IMAGES)
# Six labels are the network's answers and two are not.
Y = np.asarray(metrics.predictions(NETWORK(X)))
Y = np.where(np.arange(NUM_IMAGES) < 6, Y, (Y + 1) % helpers.NUM_CLASSES).astype(np.int32)
KEYS = random.example_keys(jax.random.key(0), NUM_IMAGES)


@pytest.fixture(scope="module", params=CASES)
def name(request):
    """Scoped to the module, so that pytest runs all tests of one attack together."""
    return request.param


def _traced_once(name, program):
    """The attack, which fails if it is traced twice; chex counts by the function's name."""

    def attack(*args):
        return CASES[name].attack(*args)

    attack.__name__ = f"{name} {program}"
    return jax.jit(chex.assert_max_traces(attack, n=1))


@functools.cache
def compiled(name):
    """Eight images with one epsilon and one key each."""
    return _traced_once(name, "many")


@functools.cache
def compiled_single(name):
    """One image and a scalar epsilon."""
    return _traced_once(name, "single")


@functools.cache
def usual_result(name):
    return np.asarray(compiled(name)(KEYS, NETWORK, X, Y, USUAL))


def test_every_attack_has_a_case():
    tested = {case.attack.func.__name__ for case in CASES.values()}
    assert tested == set(helpers.fixed_budget_attacks())


@pytest.mark.parametrize(
    "network",
    [
        NETWORK,
        CONSTANT,
        jax.tree.map(lambda leaf: leaf * jnp.nan, NETWORK),
        jax.tree.map(lambda leaf: leaf * 1e30, NETWORK),  # logits and gradients overflow
        jax.tree.map(lambda leaf: leaf * 1e-20, NETWORK),  # squares of gradients underflow
    ],
    ids=["usual", "constant", "nan", "overflowing", "underflowing"],
)
def test_stays_in_the_ball_and_the_box(name, network):
    for epsilon in (EPSILONS, USUAL, EPSILONS[::-1]):
        x_adv = compiled(name)(KEYS, network, X, Y, epsilon)
        helpers.assert_in_ball_and_box(x_adv, X, CASES[name].ball.name, epsilon)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_short_floats_stay_short(name, dtype):
    # An epsilon of float32 must not promote them.
    attack = functools.partial(CASES[name].attack, KEYS, NETWORK)
    result = jax.eval_shape(attack, jnp.asarray(X, dtype), Y, USUAL)
    assert result.shape == X.shape
    assert result.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("short", ["fgm-l2", "bim", "rand_fgsm", "pgd-l1"])
def test_short_floats_stay_in_the_ball(short, dtype):
    # float16 ends at 65504, and 1e-12 is zero in it.
    epsilon = jnp.asarray(np.minimum(EPSILONS, 1e4), dtype)
    x = jnp.asarray(X, dtype)
    x_adv = jax.jit(lambda *args: CASES[short].attack(*args))(KEYS, NETWORK, x, Y, epsilon)
    helpers.assert_in_ball_and_box(x_adv, x, CASES[short].ball.name, epsilon)


def test_epsilon_zero_gives_the_image_back(name):
    x_adv = compiled(name)(KEYS, NETWORK, X, Y, np.zeros(NUM_IMAGES, np.float32))
    helpers.assert_same_bits(x_adv, X)


def test_without_a_gradient_the_image_comes_back(name):
    # No image is better than the clean one, and a tie goes to the clean one.
    x_adv = compiled(name)(KEYS, CONSTANT, X, Y, EPSILONS)
    helpers.assert_same_bits(x_adv, X)


def _judged(case, x_adv, y):
    """What the attack wants, from the definition: success bool[b] and the loss it ascends."""
    logits, y = NETWORK(x_adv), jnp.asarray(y)
    is_correct = np.asarray(jnp.argmax(logits, -1) == y)
    if case.attack.func is attacks.least_likely:
        clean = np.array(NETWORK(X))
        clean[np.arange(NUM_IMAGES), y] = np.inf
        target = jnp.asarray(clean.argmin(-1))
        return ~is_correct, -np.asarray(case.loss_fn(logits, target))
    loss = np.asarray(case.loss_fn(logits, y))
    return (is_correct, -loss) if case.targeted else (~is_correct, loss)


def test_never_worse_than_the_clean_image(name):
    case = CASES[name]
    clean_success, clean_loss = _judged(case, X, Y)
    assert clean_success.any()
    assert not clean_success.all()
    for epsilon in (EPSILONS, USUAL):
        success, loss = _judged(case, compiled(name)(KEYS, NETWORK, X, Y, epsilon), Y)
        assert np.all(success >= clean_success)
        # Only a new success may cost loss. 1e-5: the logits here come from another program; they
        # are of size ten, and a sum of sixteen such terms is off by a few times 6e-8 of that.
        assert np.all((success > clean_success) | (loss >= clean_loss - 1e-5))


def test_finds_something(name):
    """Guards the other checks: an attack that gives the clean image back would pass most."""
    case = CASES[name]
    epsilon = np.full(NUM_IMAGES, {"linf": 0.4, "l2": 1, "l1": 4}[case.ball.name], np.float32)
    y = np.asarray(metrics.predictions(NETWORK(X)))
    y = (y + 1) % helpers.NUM_CLASSES if case.targeted else y
    before, loss_before = _judged(case, X, y)
    after, loss_after = _judged(case, compiled(name)(KEYS, NETWORK, X, y, epsilon), y)
    assert not before.any()
    assert after.any() or case.targeted  # one step can be too coarse for a certain class
    assert np.mean(loss_after > loss_before) >= 0.5


def test_the_key_decides(name):
    helpers.assert_same_bits(compiled(name)(KEYS, NETWORK, X, Y, USUAL), usual_result(name))
    other_keys = random.example_keys(jax.random.key(1), NUM_IMAGES)
    other = np.asarray(compiled(name)(other_keys, NETWORK, X, Y, USUAL))
    assert np.array_equal(other, usual_result(name)) != CASES[name].is_random


def test_examples_do_not_influence_each_other(name):
    for pixel in (0.5, np.nan):  # a NaN passes the checks under jit
        x = X.copy()
        x[3] = pixel
        x_adv = np.asarray(compiled(name)(KEYS, NETWORK, x, Y, USUAL))
        others = np.arange(NUM_IMAGES) != 3
        helpers.assert_same_bits(x_adv[others], usual_result(name)[others])


@pytest.mark.study
def test_batch_size_does_not_matter(name):
    """Eight calls with one image and a scalar epsilon are one call with eight of each."""
    for i in range(NUM_IMAGES):
        alone = compiled_single(name)(
            KEYS[i : i + 1], NETWORK, X[i : i + 1], Y[i : i + 1], USUAL[i]
        )
        # 1e-6: a product of another shape may add its terms in another order; a step that turns
        # by a rounding moves the image by as little. A flipped sign would move it by epsilon.
        np.testing.assert_allclose(alone[0], usual_result(name)[i], rtol=0, atol=1e-6)


def test_one_trace_for_many_epsilons(name):
    single = functools.partial(compiled_single(name), KEYS[:1], NETWORK, X[:1], Y[:1])
    results = [np.asarray(single(np.float32(epsilon))) for epsilon in np.linspace(0, 1, 16)]
    assert len({result.tobytes() for result in results}) > 1


def test_declares_that_it_takes_a_key_an_example(name):
    assert traits.of(CASES[name].attack).example_keys


@pytest.mark.parametrize("name", ON_DEVICES, scope="module")
def test_jit_equals_eager(name):
    eager = CASES[name].attack(KEYS, NETWORK, X, Y, USUAL)
    # 1e-6: fused operations round differently, see test_batch_size_does_not_matter.
    np.testing.assert_allclose(eager, usual_result(name), rtol=0, atol=1e-6)


@pytest.mark.study
def test_vmap_over_models_and_epsilons_equals_a_loop(name):
    """Eight models and three epsilons in one program, with one key for all images."""
    attack, key, epsilons = CASES[name].attack, jax.random.key(0), np.float32([0, 0.1, 0.4])
    networks = [helpers.mlp_network(seed) for seed in range(8)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)

    def curve(logits_fn):
        return jax.vmap(lambda epsilon: attack(key, logits_fn, X, Y, epsilon))(epsilons)

    together = np.asarray(jax.jit(jax.vmap(curve))(stack))
    for i, network in enumerate(networks):
        for j, epsilon in enumerate(epsilons):
            alone = compiled(name)(KEYS, network, X, Y, np.full(NUM_IMAGES, epsilon))
            # 1e-6: see test_batch_size_does_not_matter.
            np.testing.assert_allclose(together[i, j], alone, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < NUM_IMAGES:
        pytest.skip(f"needs {NUM_IMAGES} devices, has {jax.device_count()}")
    return parallel.make_mesh(devices=jax.devices()[:NUM_IMAGES])


def _assert_equals_one_device(name, x_adv):
    if CASES[name].ball.name == "linf":  # only the sign of a gradient matters
        helpers.assert_same_bits(x_adv, usual_result(name))
    else:
        # 1e-6: XLA picks the form of a matrix product by its shape, one row a device instead of
        # eight, and a direction in l2 keeps the rounding of the gradient.
        np.testing.assert_allclose(x_adv, usual_result(name), rtol=0, atol=1e-6)


def test_sharded_batch_equals_one_device(name, mesh):
    attack = jax.jit(lambda *args: CASES[name].attack(*args))
    keys, x, y, epsilon = parallel.place((KEYS, X, Y, USUAL), mesh, axis=0)
    args = (keys, parallel.place(NETWORK, mesh), x, y, epsilon)
    if name in ON_DEVICES:
        x_adv = attack(*args)
        assert x_adv.sharding.is_equivalent_to(x.sharding, x.ndim)
        _assert_equals_one_device(name, x_adv)
        if CASES[name].ball.name != "linf":  # bit for bit, with as many images at a time
            parts = [
                attack(KEYS[rows], NETWORK, X[rows], Y[rows], USUAL[rows])
                for rows in np.split(np.arange(NUM_IMAGES), NUM_IMAGES)
            ]
            helpers.assert_same_bits(x_adv, np.concatenate(parts))
    else:
        assert jax.eval_shape(attack, *args).shape == X.shape


@pytest.mark.slow
def test_shard_map_equals_one_device(name, mesh):
    data = PartitionSpec(mesh.axis_names[0])
    attack = jax.shard_map(
        lambda *args: CASES[name].attack(*args),
        mesh=mesh,
        in_specs=(data, PartitionSpec(), data, data, data),
        out_specs=data,
    )
    args = (KEYS, NETWORK, X, Y, USUAL)
    if name in ON_DEVICES:
        _assert_equals_one_device(name, jax.jit(attack)(*args))
    else:  # what varies over the devices is checked when it is traced
        assert jax.eval_shape(attack, *args).shape == X.shape


@pytest.mark.study
def test_pmap_equals_one_device(name, mesh):
    split = lambda leaf: leaf.reshape(NUM_IMAGES, 1, *leaf.shape[1:])
    attack = jax.pmap(lambda *args: CASES[name].attack(*args), in_axes=(0, None, 0, 0, 0))
    args = (split(KEYS), NETWORK, split(X), split(Y), split(USUAL))
    if name in ON_DEVICES:
        _assert_equals_one_device(name, np.asarray(attack(*args)).reshape(X.shape))
    else:
        assert jax.eval_shape(attack, *args).shape == (NUM_IMAGES, 1, *X.shape[1:])


def test_any_function_is_a_classifier(name):
    """A closure works like a `Partial`, and so does one wrapped in another."""
    params = NETWORK.args[0]
    for logits_fn in (lambda x: helpers.mlp(params, x), Partial(lambda x: NETWORK(x))):
        attack = functools.partial(CASES[name].attack, KEYS, logits_fn)
        assert jax.eval_shape(attack, X, Y, 0.1).shape == X.shape
