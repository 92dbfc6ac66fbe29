"""Attacks on linear classifiers, whose optimum is known, and identities between attacks.

Two classes with logits `(0, -w.x - c)` have the margin `w.x + c` for class 0 (up to sign), so an
attack on label 0 wants to lower `w.x`: by the norm dual to that of the ball where the box is far.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advjax import attacks, balls, losses, metrics
from advjax.attacks import auto_pgd
from tests import helpers

NUM_IMAGES = 4
NUM_PIXELS = int(np.prod(helpers.SHAPE))
WEIGHTS = np.random.default_rng(1).normal(size=NUM_PIXELS).astype(np.float32)
KEY = jax.random.key(0)
LABELS = np.zeros(NUM_IMAGES, np.int32)
# The cross-entropy of a confident network is flat in float32; the margin of a linear one never is.
STEEPEST = functools.partial(attacks.pgd, loss_fn=losses.margin, random_start=False)


def binary(weights=WEIGHTS):
    """Logits whose difference is `weights . x`."""
    return Partial(helpers.linear, (jnp.stack([jnp.asarray(weights) / 2, -weights / 2], 1), 0.0))


def drop(x_adv, x):
    """By how much the margin `weights . x` fell, in float64."""
    moved = np.asarray(x).astype(np.float64) - np.asarray(x_adv).astype(np.float64)
    return moved.reshape(len(moved), -1) @ WEIGHTS.astype(np.float64)


@pytest.fixture
def middle():
    """Images so far from the box that an epsilon of 0.1 stays inside."""
    shape = (NUM_IMAGES, *helpers.SHAPE)
    return np.random.default_rng(2).uniform(0.3, 0.7, shape).astype(np.float32)


@pytest.mark.parametrize(
    "attack, dual",
    [
        (attacks.fgsm, np.abs(WEIGHTS).sum()),
        (attacks.bim, np.abs(WEIGHTS).sum()),
        (functools.partial(attacks.pgd, num_steps=5), np.abs(WEIGHTS).sum()),
        (attacks.fgm, np.sqrt((WEIGHTS**2).sum())),
        (functools.partial(STEEPEST, num_steps=5, ball=balls.l2), np.sqrt((WEIGHTS**2).sum())),
        (functools.partial(STEEPEST, num_steps=5, ball=balls.l1), np.abs(WEIGHTS).max()),
        (functools.partial(attacks.fgm, ball=balls.l1), np.abs(WEIGHTS).max()),
    ],
    ids=["fgsm", "bim", "pgd-linf", "fgm", "pgd-l2", "pgd-l1", "fgm-l1"],
)
def test_optimum_of_a_linear_classifier(attack, dual, middle):
    epsilon = np.float32([0.1, 0.05, 0.01, 0])
    x_adv = jax.jit(attack)(KEY, binary(), middle, LABELS, epsilon)
    # 1e-6 of the image is lost to rounding a pixel (l2, l1: the radius is less by the worst
    # rounding, 16 x 6e-8), times weights that are of size one.
    np.testing.assert_allclose(drop(x_adv, middle), epsilon * dual, rtol=1e-5, atol=3e-6)


def test_optimum_at_the_box_linf():
    x = helpers.images(3, NUM_IMAGES)
    x_adv = jax.jit(attacks.fgsm)(KEY, binary(), x, LABELS, 0.3)
    sign = np.sign(WEIGHTS).reshape(helpers.SHAPE)
    # 6e-8: the sum x + epsilon in float32 against float64.
    np.testing.assert_allclose(x_adv, np.clip(x - np.float64(0.3) * sign, 0, 1), atol=6e-8)


def _l2_optimum(x, epsilon):
    """`delta = clip(-t w, -x, 1 - x)` with the t whose norm is epsilon (the KKT conditions)."""
    x, w = x.astype(np.float64).ravel(), WEIGHTS.astype(np.float64)
    low, high = 0.0, 1e3
    for _ in range(100):
        t = (low + high) / 2
        delta = np.clip(-t * w, -x, 1 - x)
        low, high = (t, high) if np.sqrt((delta**2).sum()) < epsilon else (low, t)
    return -delta @ w


def _l1_optimum(x, epsilon):
    """The budget goes to the pixels of the largest weights, each until it meets the box."""
    x, w, won = x.astype(np.float64).ravel(), WEIGHTS.astype(np.float64), 0.0
    for i in np.argsort(-np.abs(w)):
        move = min(epsilon, x[i] if w[i] > 0 else 1 - x[i])
        won, epsilon = won + move * abs(w[i]), epsilon - move
    return won


@pytest.mark.parametrize("ball, optimum", [(balls.l2, _l2_optimum), (balls.l1, _l1_optimum)])
def test_optimum_at_the_box(ball, optimum):
    x, epsilon = helpers.images(3, NUM_IMAGES), 1.2
    attack = jax.jit(functools.partial(STEEPEST, num_steps=60, ball=ball, relative_step_size=0.05))
    x_adv = attack(KEY, binary(), x, LABELS, epsilon)
    best = np.array([optimum(image, epsilon) for image in x])
    assert np.any(best < epsilon * (0.9 * np.abs(WEIGHTS).max() if ball is balls.l1 else np.inf))
    share = drop(x_adv, x) / best
    # "Ball, then box" is not the projection on their intersection: with steps of 0.05 epsilon it
    # comes to rest within two percent of the optimum. It can never be above it but by rounding.
    assert np.all(share > 0.98)
    assert np.all(share < 1 + 1e-5)


def test_auto_pgd_spends_all_of_an_l1_radius_at_the_box():
    """Cut by the box after the ball, it would be left with 2.1 to 2.8 on some of the images."""
    x = helpers.images(0, 8)
    network = helpers.mlp_network(0)
    y = np.asarray(metrics.predictions(network(x)))
    attack = jax.jit(functools.partial(attacks.apgd, num_steps=20, ball=balls.l1))
    for logits_fn, labels in ((network, y), (binary(), np.zeros(8, np.int32))):
        x_adv = np.asarray(attack(KEY, logits_fn, x, labels, 3.0))
        moved = helpers.norms("l1", x_adv.astype(np.float64) - x)
        assert np.all(moved <= 3) and np.all(moved > 2.99)


def test_dense_and_sparse_starts_of_l1_take_turns(monkeypatch):
    moved, ascend = [], auto_pgd._ascend

    def watched(goal, logits_fn, x, epsilon, start, *rest, **options):
        moved.append(int(np.sum(np.asarray(start) != np.asarray(x))))
        return ascend(goal, logits_fn, x, epsilon, start, *rest, **options)

    monkeypatch.setattr(auto_pgd, "_ascend", watched)
    x = np.full((1, 12, 12, 1), 0.5, np.float32)

    def logits_fn(x):
        return jnp.stack([x.sum(axis=(1, 2, 3)), jnp.full(len(x), 1e3)], axis=-1)

    with jax.disable_jit():  # loops are Python's, so that starts have values
        attacks.apgd(
            jax.random.key(0), logits_fn, x, np.array([1]), 1.0, ball=balls.l1,
            num_steps=1, num_restarts=3, large_radii=False,
        )  # fmt: skip
    dense, sparse, again = moved
    assert min(dense, again) > 100 and 0 < sparse < 20


def test_the_sparse_start_is_on_ball_and_box():
    """As published: normal noise on all pixels, projected on both at once."""
    x = helpers.images(5, 3, (28, 28, 1))
    keys = jax.random.split(jax.random.key(1), 3)
    start = np.asarray(auto_pgd._sparse(keys, jnp.asarray(x), jnp.asarray(18.0)))
    np.testing.assert_allclose(helpers.norms("l1", start.astype(np.float64) - x), 18, rtol=1e-4)
    assert start.min() >= 0 and start.max() <= 1
    assert (start != x).reshape(3, -1).sum(1).max() < 28 * 28 / 5


def test_every_phase_of_auto_pgd_starts_in_its_ball(monkeypatch):
    """So that its iterates can be better than what the wider ball's phase left."""
    seen, ascend = [], auto_pgd._ascend

    def watched(goal, logits_fn, x, epsilon, start, *rest, **options):
        seen.append((np.asarray(epsilon), helpers.norms("l1", np.asarray(start - x, np.float64))))
        return ascend(goal, logits_fn, x, epsilon, start, *rest, **options)

    monkeypatch.setattr(auto_pgd, "_ascend", watched)
    x, y = helpers.images(6, 4), np.array([0, 1, 2, 3], np.int32)
    attacks.apgd(jax.random.key(0), helpers.mlp_network(0), x, y, 0.5, num_steps=10, ball=balls.l1)
    assert [float(epsilon) for epsilon, _ in seen] == [1.5, 1.0, 0.5]
    for epsilon, distances in seen:
        assert np.all(distances <= epsilon * (1 + 1e-5))


def test_identities_between_attacks():
    """One program: attacks that are special cases of each other give the same images."""
    network, x = helpers.mlp_network(0), helpers.images(1, NUM_IMAGES)
    y = np.asarray(metrics.predictions(network(x)))
    epsilon = np.float32([0.02, 0.1, 0.2, 0.4])

    @jax.jit
    def run(network, epsilon):
        call = lambda attack, **options: attack(KEY, network, x, y, epsilon, **options)
        pairs = {
            "fgm in linf": call(attacks.fgm, ball=balls.linf),
            "bim with one step": call(attacks.bim, num_steps=1, step_size=epsilon),
            "rand_fgsm without alpha": call(attacks.rand_fgsm, alpha=0.0),
        }
        pairs = {name: (x_adv, call(attacks.fgsm)) for name, x_adv in pairs.items()}
        # A step may be given in units of epsilon; where both are given, step_size wins.
        pairs["pgd from the image"] = (
            call(attacks.pgd, num_steps=3, random_start=False, relative_step_size=0.5),
            call(attacks.bim, num_steps=3, relative_step_size=9.0, step_size=epsilon / 2),
        )
        return pairs

    for name, (x_adv, expected) in run(network, epsilon).items():
        # 1e-6: one program may fuse two equal formulas differently.
        np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-6, err_msg=name)


def test_least_likely_descends_the_loss_of_the_least_likely_class():
    network, x = helpers.mlp_network(0), helpers.images(1, NUM_IMAGES)
    y = np.asarray(metrics.predictions(network(x)))
    target = np.asarray(network(x)).argmin(-1)
    x_adv, towards = jax.jit(
        lambda epsilon: (
            attacks.least_likely(KEY, network, x, y, epsilon),
            attacks.fgsm(KEY, network, x, target, epsilon, targeted=True),
        )
    )(np.float32([0.02, 0.05, 0.1, 0.2]))
    # They may only differ where one of them preferred the clean image.
    is_clean = np.all(np.asarray(x_adv) == x, axis=(1, 2, 3)) | np.all(
        np.asarray(towards) == x, axis=(1, 2, 3)
    )
    assert not is_clean.all()
    # 1e-6: see above.
    np.testing.assert_allclose(x_adv[~is_clean], towards[~is_clean], rtol=0, atol=1e-6)


def test_least_likely_never_aims_at_the_label():
    # The label is the least likely class itself: the next one up is the target, and with two
    # classes the other one is, so the attack still moves away from the label.
    x = helpers.images(1, NUM_IMAGES)
    network = binary()
    y = np.asarray(network(x)).argmin(-1).astype(np.int32)
    x_adv = jax.jit(attacks.least_likely)(KEY, network, x, y, 0.1)
    before, after = losses.margin(network(x), y), losses.margin(network(x_adv), y)
    assert np.all(after > before)


def test_a_random_step_of_all_epsilon_leaves_no_gradient_step():
    network, x = helpers.mlp_network(0), helpers.images(1, NUM_IMAGES)
    y = np.asarray(metrics.predictions(network(x)))
    run = jax.jit(lambda alpha: attacks.rand_fgsm(KEY, network, x, y, 0.2, alpha=alpha))
    # "At most epsilon is used".
    helpers.assert_same_bits(run(0.2), run(0.7))
    helpers.assert_in_ball_and_box(run(0.7), x, "linf", np.float32(0.2))


def test_a_restart_never_hurts():
    network, x = helpers.mlp_network(0), helpers.images(1, NUM_IMAGES)
    y = np.asarray(metrics.predictions(network(x)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(num_restarts):
        x_adv = attacks.pgd(
            KEY, network, x, y, 0.1, num_steps=2, num_restarts=num_restarts, loss_fn=losses.margin
        )
        return losses.margin(network(x_adv), y)

    one, five = np.asarray(run(1)), np.asarray(run(5))
    # For the margin a success is a positive loss, so the best image is the one of largest loss.
    # 1e-5: the loss is evaluated by two programs.
    assert np.all(five >= one - 1e-5)
    assert np.any(five > one + 1e-3)


def test_a_step_of_each_example():
    x = np.full((3, *helpers.SHAPE), 0.5, np.float32)
    attack = functools.partial(STEEPEST, num_steps=2)
    x_adv = jax.jit(attack)(
        KEY, binary(), x, LABELS[:3], 0.3, step_size=np.float32([0.01, 0.1, 0.2])
    )
    # 1e-7: two sums near one half in float32.
    np.testing.assert_allclose(
        np.abs(np.asarray(x_adv) - x).max((1, 2, 3)), [0.02, 0.2, 0.3], atol=1e-7
    )


def test_gradients_that_underflow_when_squared_still_give_a_full_step():
    x = np.full((1, *helpers.SHAPE), 0.5, np.float32)
    faint = binary(WEIGHTS * np.float32(1e-25))
    for ball in (balls.l2, balls.l1):
        attack = jax.jit(functools.partial(attacks.fgm, ball=ball, loss_fn=losses.margin))
        x_adv = attack(KEY, faint, x, LABELS[:1], 0.1)
        # 1e-4: all but the rounding of the radius.
        assert helpers.norms(ball.name, np.float64(x_adv) - x) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("targeted", [False, True])
def test_a_jump_to_nan_is_never_a_success(targeted):
    """A network that breaks off the image: no answer is neither a wrong one nor a target."""
    x = np.full((2, *helpers.SHAPE), 0.5, np.float32)
    logits_fn = lambda z: (
        jnp.where(jnp.abs(z - 0.5).max((1, 2, 3)) > 0.05, jnp.nan, 1)[:, None] * binary()(z)
    )
    y = np.asarray(metrics.predictions(logits_fn(x)))
    y = 1 - y if targeted else y
    attack = jax.jit(lambda x: attacks.fgsm(KEY, logits_fn, x, y, 0.1, targeted=targeted))
    x_adv = np.asarray(attack(x))
    assert np.all(np.isfinite(x_adv))
    helpers.assert_same_bits(x_adv, x)
