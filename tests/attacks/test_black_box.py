"""Black-box attacks: what they ask, what they find where the best is known, what is no answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advjax import attacks, balls, losses, metrics
from advjax.attacks import decisions, pixels
from advjax.core import random
from tests import helpers

KEY = jax.random.key(0)
NETWORK = helpers.mlp_network(0)
X = helpers.images(0, 6)
Y = np.asarray(metrics.predictions(NETWORK(X)))
SMALL = dict(population=12, generations=4)


def counting(logits_fn):
    """The classifier, and a list that gets the number of images whenever it runs."""
    counts = []

    def counted(x):
        jax.debug.callback(lambda: counts.append(x.shape[0]))
        return logits_fn(x)

    return counted, counts


def answer(logits_fn, x):
    return np.asarray(metrics.predictions(logits_fn(x)))


def silent_where_moved(x):
    """Right about the clean images X, and without an answer everywhere else."""
    is_clean = jnp.any(jnp.all(x[:, None] == X, axis=(2, 3, 4)), axis=1)
    return jnp.where(is_clean[:, None], NETWORK(x), jnp.nan)


# ---------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    "attack, options, per_image",
    [
        (attacks.one_pixel, dict(population=7, generations=3), 7 * (3 + 1)),
        (attacks.one_pixel, dict(num_pixels=2, population=4, generations=1), 4 * 2),
        (attacks.nes, dict(num_steps=3, num_samples=8), 3 * (8 + 1) + 1),
        (attacks.spsa, dict(num_steps=2, num_samples=4), 2 * (4 + 1) + 1),
    ],
)
def test_queries_are_those_that_the_docstring_counts(attack, options, per_image):
    logits_fn, counts = counting(NETWORK)
    jax.block_until_ready(jax.jit(functools.partial(attack, **options), static_argnums=1)(
        KEY, logits_fn, X, Y, 0.3
    ))  # fmt: skip
    jax.effects_barrier()
    assert sum(counts) == len(X) * per_image


@pytest.mark.parametrize("ball, search", [(balls.l2, 6), (balls.linf, 8)])  # of log2(16) = 4
def test_queries_of_hop_skip_jump(ball, search):
    logits_fn, counts = counting(NETWORK)
    attack = functools.partial(
        attacks.hop_skip_jump, num_steps=5, num_samples=10, num_starts=20, ball=ball
    )
    jax.block_until_ready(jax.jit(attack, static_argnums=1)(KEY, logits_fn, X, Y))
    jax.effects_barrier()
    directions = 10 * (1 + 2 + 2 + 2 + 3)  # 10 ceil(sqrt(t))
    # 2: is the image adversarial by itself, and is the one that is returned.
    assert sum(counts) == len(X) * (20 + search + directions + 5 * (16 + search) + 2)


@pytest.mark.parametrize("attack", [attacks.one_pixel, attacks.nes, attacks.hop_skip_jump])
def test_no_gradient_is_taken(attack):
    @jax.custom_jvp
    def opaque(x):
        return NETWORK(x)

    @opaque.defjvp
    def refuse(primals, tangents):
        raise AssertionError("a derivative was asked for")

    epsilon = () if attack is attacks.hop_skip_jump else (0.1,)
    jax.eval_shape(lambda x: attack(KEY, opaque, x, Y, *epsilon), X)


# ------------------------------------------------------------------------------------- one pixel


def test_every_position_is_as_likely_and_none_is_beyond():
    x = jnp.zeros((3, 5, 1))
    place = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(0, 1, 3001)]), axis=-1).reshape(-1, 2)
    rows, columns = (np.asarray(i) for i in pixels._position(place, x))
    counts = np.zeros((3, 5), int)
    np.add.at(counts, (rows, columns), 1)
    # 1 %: a grid of 3001 points is not a multiple of 3 or 5, and its last point is counted too.
    np.testing.assert_allclose(counts, place.shape[0] / 15, rtol=0.01)


@pytest.fixture(scope="module")
def decided_by_one_pixel():
    """Attacks images whose class one pixel decides: class 1 where all its channels are below 0.1.

    The place is an argument, so that all places share one compiled program.
    """

    def logits_fn(place, x):
        pixel = x[:, place[0], place[1]]
        score = 0.1 - jnp.max(pixel, axis=-1)
        return jnp.stack([-score, score], axis=-1)

    attack = functools.partial(attacks.one_pixel, population=60, generations=12)
    run = jax.jit(attack)
    x = np.full((4, 3, 5, 2), 0.9, np.float32)
    return lambda place: (run(KEY, Partial(logits_fn, jnp.array(place)), x, np.int32([0] * 4)), x)


@pytest.mark.parametrize("place", [(0, 0), (0, 4), (2, 0), (2, 4), (1, 2)])
def test_finds_the_pixel_that_decides_at_the_edges_too(decided_by_one_pixel, place):
    x_adv, x = decided_by_one_pixel(place)
    changed = np.argwhere(np.any(np.asarray(x_adv) != x, axis=-1))
    # 60 first individuals over 15 pixels: four are on it, and they need not be dark yet.
    assert np.all(np.asarray(x_adv)[:, place[0], place[1]] < 0.1)
    np.testing.assert_array_equal(changed[:, 1:], [place] * 4)


@pytest.mark.parametrize("num_pixels", [1, 5])
def test_changes_no_more_pixels_than_it_may(num_pixels):
    attack = functools.partial(attacks.one_pixel, num_pixels=num_pixels, **SMALL)
    x_adv = np.asarray(jax.jit(attack)(KEY, NETWORK, X, Y, 1.0))
    changed = np.any(x_adv != X, axis=-1).sum((1, 2))
    assert changed.max() == num_pixels  # and some do use them all


def test_all_pixels_may_change_and_one_more_is_refused():
    attack = functools.partial(attacks.one_pixel, **SMALL)
    assert jax.eval_shape(lambda: attack(KEY, NETWORK, X, Y, num_pixels=16)).shape == X.shape
    with pytest.raises(ValueError, match=r"one_pixel: need num_pixels <= 16 for images of 4 x 4, "):
        attack(KEY, NETWORK, X, Y, num_pixels=17)


def test_one_pixel_stays_in_the_ball_in_bfloat16():
    """0.1 is rounded up there."""
    x, y = jnp.zeros((2, 3, 3, 1), jnp.bfloat16), jnp.zeros(2, jnp.int32)

    def logits_fn(x):  # the brighter any pixel, the better
        brightest = x.astype(jnp.float32).max(axis=(1, 2, 3))
        return jnp.stack([0.05 + 0 * brightest, brightest], axis=-1)

    x_adv = attacks.one_pixel(jax.random.key(0), logits_fn, x, y, 0.1, population=20, generations=3)
    assert 0.05 < float(x_adv.max()) <= 0.1


def test_where_two_pixels_coincide_the_later_is_painted():
    genome = jnp.array([[0.0, 0.3, 0.2], [0.1, 0.3, 0.7], [1.0, 1.0, 0.4]])
    image = np.asarray(pixels.paint(genome, jnp.zeros((4, 4, 1)), 1.0))[..., 0]
    assert image[0, 1] == np.float32(0.7)
    assert image[3, 3] == np.float32(0.4)
    assert np.count_nonzero(image) == 2


def test_a_colour_beyond_epsilon_is_the_nearest_allowed():
    genome = jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.55]])
    x = jnp.full((2, 2, 1), 0.5)
    image = np.asarray(pixels.paint(genome, x, 0.125))[..., 0]
    np.testing.assert_array_equal(image, np.float32([[0.625, 0.375], [0.55, 0.5]]))


@pytest.mark.parametrize("population", [4, 5, 40])
def test_three_others_are_others_and_three(population):
    for seed in range(20):
        uniform = jax.random.uniform(jax.random.key(seed), (3, population))
        others = pixels._three_others(uniform)
        together = np.stack([np.arange(population), *others])
        assert together.min() >= 0
        assert together.max() < population
        assert all(len(set(column)) == 4 for column in together.T)


def test_individuals_in_batches_are_the_same_individuals():
    attack = functools.partial(attacks.one_pixel, num_pixels=2, **SMALL)
    whole = jax.jit(attack)(KEY, NETWORK, X, Y, 0.5)
    # 5 does not divide 12.
    parts = jax.jit(functools.partial(attack, batch_size=5))(KEY, NETWORK, X, Y, 0.5)
    # 1e-6: a product of another shape may add its terms in another order.
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_what_has_succeeded_is_done():
    attack = functools.partial(attacks.one_pixel, population=4)
    few, many = (
        np.asarray(jax.jit(functools.partial(attack, generations=n))(KEY, NETWORK, X, Y, 1.0))
        for n in (1, 30)
    )
    done, later = (answer(NETWORK, x_adv) != Y for x_adv in (few, many))
    assert done.any()
    assert later.sum() > done.sum()
    helpers.assert_same_bits(many[done], few[done])


def test_the_published_strategy_finds_the_same_kind_of_pixel():
    attack = functools.partial(attacks.one_pixel, population=40, generations=20)
    found = [
        np.mean(answer(NETWORK, jax.jit(functools.partial(attack, strategy=s))(
            KEY, NETWORK, X, Y, 1.0
        )) != Y)
        for s in pixels.STRATEGIES
    ]  # fmt: skip
    # All pairs of one of 16 pixels and one of 41 grey levels: the best that one pixel can do.
    best = np.zeros(len(X), bool)
    for pixel in range(16):
        for value in np.linspace(0, 1, 41, dtype=np.float32):
            image = X.reshape(len(X), 16).copy()
            image[:, pixel] = value
            best |= answer(NETWORK, image.reshape(X.shape)) != Y
    assert found == [best.mean()] * 2


# ------------------------------------------------------------------------------ gradient estimates


@pytest.mark.parametrize("attack", [attacks.nes, attacks.spsa])
def test_one_step_on_a_linear_classifier_is_the_best_step(attack):
    signs = np.where(np.arange(8) % 3 == 0, -1, 1).astype(np.float32)
    weights = np.stack([0 * signs, signs], axis=1)
    logits_fn = Partial(helpers.linear, (jnp.asarray(weights), jnp.zeros(2)))
    x = np.full((3, 2, 4, 1), 0.5, np.float32)
    run = functools.partial(
        attack, num_steps=1, num_samples=1000, sigma=0.01, loss_fn=losses.margin
    )
    # An estimate of +-1 from 500 pairs is off by sqrt(9 / 500) = 0.13 at most: seven deviations.
    x_adv = jax.jit(functools.partial(run, step_size=0.25))(
        KEY, logits_fn, x, np.int32([0] * 3), 0.25
    )
    np.testing.assert_array_equal(x_adv, x + 0.25 * signs.reshape(2, 4, 1))
    x_adv = jax.jit(functools.partial(run, ball=balls.l2))(
        KEY, logits_fn, x, np.int32([0] * 3), 0.25
    )
    gain = helpers.linear((weights[:, 1], 0), np.asarray(x_adv) - x)
    # The best is epsilon times the norm of the weights; the cosine is 1 / sqrt(1 + 0.13^2) or more
    # on average, and 0.9 leaves room for the draw.
    assert np.all(gain >= 0.9 * 0.25 * np.sqrt(8))
    assert np.all(gain <= 0.25 * np.sqrt(8) * (1 + 1e-5))  # rounding of the sum


@pytest.mark.parametrize("attack", [attacks.nes, attacks.spsa])
def test_pixels_at_the_ends_of_the_box_are_estimated_too(attack):
    weights = np.zeros((4, 2), np.float32)
    weights[:, 1] = [1, -1, 1, -1]
    logits_fn = Partial(helpers.linear, (jnp.asarray(weights), jnp.zeros(2)))
    x = np.float32([0, 1, 1, 0]).reshape(1, 2, 2, 1)  # two can rise or fall as wanted, two cannot
    run = functools.partial(attack, num_steps=1, num_samples=400, sigma=0.01, step_size=0.5)
    x_adv = jax.jit(run)(KEY, logits_fn, x, np.int32([0]), 0.5)
    np.testing.assert_array_equal(np.ravel(x_adv), np.float32([0.5, 0.5, 1, 0]))


# ------------------------------------------------------------------------------------ HopSkipJump


WEIGHTS = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32) / 4
LINEAR = Partial(helpers.linear, (jnp.asarray(WEIGHTS), jnp.asarray(-0.5 * WEIGHTS.sum(0))))
X_LINEAR = np.random.default_rng(1).uniform(0.4, 0.6, size=(8, 4, 4, 1)).astype(np.float32)
Y_LINEAR = answer(LINEAR, X_LINEAR)


def closed_form(ball):
    """Distance to the hyperplane between the two classes; the box is far away."""
    gap = np.abs(np.asarray(LINEAR(X_LINEAR), np.float64) @ [1, -1])
    normal = WEIGHTS.astype(np.float64) @ [1, -1]
    return gap / np.linalg.norm(normal, {"l2": 2, "linf": 1}[ball.name])


@functools.cache
def compiled(ball):
    attack = functools.partial(attacks.hop_skip_jump, num_steps=25, num_samples=200, ball=ball)
    return jax.jit(attack)


# l2: an angle a between the estimate and the normal leaves a share 1 - cos(a) of the way; 1000
# answers in 16 dimensions estimate it to a few degrees, and 25 steps repeat that. linf: the sign of
# a coordinate of the normal near zero stays uncertain, and costs its part of the l1 norm.
@pytest.mark.parametrize("ball, share", [(balls.l2, 0.01), (balls.linf, 0.05)], ids=str)
def test_approaches_the_closed_form_distance(ball, share):
    found = compiled(ball)(KEY, LINEAR, X_LINEAR, Y_LINEAR)
    assert np.all(found.success)
    ratio = np.asarray(found.distance) / closed_form(ball)
    assert ratio.max() <= 1 + share
    assert ratio.min() >= 1 - 1e-4  # logits near the boundary round at 1e-7, distances are 1e-2


def test_the_first_image_is_the_nearest_adversarial_one():
    """Of two kinds of noise, not the first in their order."""
    x, y = jnp.full((1, 2, 2, 1), 0.5), jnp.array([0])
    far, near = jnp.array([0.9, 0.5, 0.5, 0.5]), jnp.array([0.8, 0.5, 0.5, 0.5])
    candidates = jnp.stack([far, near, far]).reshape(1, 3, 2, 2, 1)

    def logits_fn(x):
        first = x[:, 0, 0, 0]
        return jnp.stack([0 * first, first - 0.7], axis=-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions, "_noisy", lambda *_: candidates)
        patch.setattr(decisions, "_to_boundary", lambda ask, clean, found, ball: found)
        found = attacks.hop_skip_jump(jax.random.key(0), logits_fn, x, y, num_steps=0)
    np.testing.assert_allclose(found.x_adv[0, 0, 0, 0], 0.8)


def test_only_the_answers_matter():
    def one_hot(x):
        return jax.nn.one_hot(jnp.argmax(LINEAR(x), axis=-1), 2)

    logits = compiled(balls.l2)(KEY, LINEAR, X_LINEAR, Y_LINEAR)
    answers = compiled(balls.l2)(KEY, Partial(one_hot), X_LINEAR, Y_LINEAR)
    jax.tree.map(helpers.assert_same_bits, logits, answers)


def test_the_result_is_what_it_says():
    y = np.where(np.arange(8) < 2, (Y_LINEAR + 1) % 2, Y_LINEAR).astype(np.int32)
    found = compiled(balls.l2)(KEY, LINEAR, X_LINEAR, y)
    assert np.all(found.success)
    assert np.all(answer(LINEAR, found.x_adv) != y)
    helpers.assert_in_ball_and_box(found.x_adv, X_LINEAR, "linf", 1.0)
    delta = np.asarray(found.x_adv, np.float64) - X_LINEAR
    # 1e-6: the distance is a sum of 16 squares in float32.
    np.testing.assert_allclose(found.distance, helpers.norms("l2", delta), rtol=1e-6)
    helpers.assert_same_bits(found.x_adv[:2], X_LINEAR[:2])  # wrong already
    np.testing.assert_array_equal(found.distance[:2], 0)
    assert np.all(found.distance[2:] > 0)


def test_examples_do_not_influence_each_other():
    keys = random.example_keys(KEY, 8)
    together = compiled(balls.l2)(KEY, LINEAR, X_LINEAR, Y_LINEAR)
    part = compiled(balls.l2)(keys[2:5], LINEAR, X_LINEAR[2:5], Y_LINEAR[2:5])
    # A rounding can turn an answer at the boundary, so that the ways part; both end nearby, within
    # the 1 % of test_approaches_the_closed_form_distance.
    np.testing.assert_allclose(part.distance, together.distance[2:5], rtol=0.01)


def test_what_is_not_found_comes_back():
    never = Partial(lambda x: x.reshape(len(x), 16)[:, :2] * 0 + jnp.array([1.0, 0.0]))
    found = compiled(balls.l2)(KEY, never, X_LINEAR, np.zeros(8, np.int32))
    assert not np.any(found.success)
    assert np.all(np.isposinf(found.distance))
    helpers.assert_same_bits(found.x_adv, X_LINEAR)


def test_starts_may_be_given_and_targets_are_reached():
    target = np.int32([(y + 1) % 2 for y in Y_LINEAR])
    normal = WEIGHTS[:, target].T - WEIGHTS[:, Y_LINEAR].T
    start = np.clip(X_LINEAR + 0.4 * np.sign(normal).reshape(X_LINEAR.shape), 0, 1)
    is_start = answer(LINEAR, start) == target
    assert is_start.any()
    attack = functools.partial(attacks.hop_skip_jump, num_steps=5, targeted=True)
    found = jax.jit(attack)(KEY, LINEAR, X_LINEAR, target, start=start)
    np.testing.assert_array_equal(found.success, is_start)
    assert np.all(answer(LINEAR, found.x_adv)[is_start] == target[is_start])
    way = helpers.norms("l2", start.astype(np.float64) - X_LINEAR)
    assert np.all(np.asarray(found.distance)[is_start] < way[is_start])


def test_short_floats_stay_short_and_inside():
    x = jnp.asarray(X_LINEAR, jnp.bfloat16)
    y = answer(LINEAR, x)
    found = compiled(balls.l2)(KEY, LINEAR, x, y)
    assert found.x_adv.dtype == jnp.bfloat16
    assert np.all(answer(LINEAR, found.x_adv)[np.asarray(found.success)] != y[found.success])
    assert np.mean(found.success) >= 0.5  # the grid of bfloat16 is coarse, and it is a search


# -------------------------------------------------------------------------------------- no answer


@pytest.mark.parametrize(
    "attack",
    [
        functools.partial(attacks.one_pixel, **SMALL),
        functools.partial(attacks.nes, num_steps=2, num_samples=4),
        functools.partial(attacks.spsa, num_steps=2, num_samples=4, targeted=True),
    ],
    ids=["one_pixel", "nes", "spsa"],
)
def test_no_answer_is_no_success(attack):
    x_adv = jax.jit(attack)(KEY, Partial(silent_where_moved), X, Y, 0.3)
    helpers.assert_same_bits(x_adv, X)


def test_no_answer_is_no_success_of_hop_skip_jump():
    attack = jax.jit(functools.partial(attacks.hop_skip_jump, num_steps=1, num_samples=10))
    for logits_fn in (Partial(silent_where_moved), jax.tree.map(lambda w: w * jnp.nan, NETWORK)):
        found = attack(KEY, logits_fn, X, Y)
        assert not np.any(found.success)
        assert np.all(np.isposinf(found.distance))
        helpers.assert_same_bits(found.x_adv, X)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "attack, options, sentence",
    [
        (attacks.one_pixel, dict(num_pixels=0), "one_pixel: need num_pixels >= 1, got .*=0"),
        (attacks.one_pixel, dict(population=0), "one_pixel: need population >= 4, got .*=0"),
        (attacks.one_pixel, dict(generations=0), "one_pixel: need generations >= 1, got .*=0"),
        (attacks.one_pixel, dict(batch_size=0), "one_pixel: need batch_size >= 1, got .*=0"),
        (attacks.one_pixel, dict(strategy="cma"), "unknown strategy 'cma'; known: rand1, best1"),
        (attacks.nes, dict(num_samples=0), "nes: need num_samples >= 2, got num_samples=0"),
        (attacks.nes, dict(num_samples=5), "nes: need an even num_samples, .* got num_samples=5"),
        (attacks.nes, dict(num_steps=0), "nes: need num_steps >= 1, got num_steps=0"),
        (attacks.spsa, dict(num_steps=0), "spsa: need num_steps >= 1, got num_steps=0"),
        (attacks.spsa, dict(sigma=-1.0), "spsa: need a finite sigma >= 0, got sigma=-1.0"),
        (attacks.spsa, dict(step_size=np.nan), "spsa: need a finite step_size >= 0"),
        (attacks.hop_skip_jump, dict(num_samples=0), "hop_skip_jump: need num_samples >= 1"),
        (attacks.hop_skip_jump, dict(num_starts=0), "hop_skip_jump: need num_starts >= 1"),
        (attacks.hop_skip_jump, dict(num_steps=-1), "hop_skip_jump: need num_steps >= 0"),
        (attacks.hop_skip_jump, dict(ball=balls.l1), "need ball=balls.l2 or .*, got ball=balls.l1"),
        (attacks.hop_skip_jump, dict(start=X[:2]), r"starts of shape \(6, .*, got \(2, 4, 4, 1\)"),
        (attacks.hop_skip_jump, dict(start=X * 9), "hop_skip_jump: need images in \\[0, 1\\]"),
    ],
)
def test_bad_options_are_one_sentence(attack, options, sentence):
    epsilon = () if attack is attacks.hop_skip_jump else (0.1,)
    with pytest.raises(ValueError, match=sentence) as caught:
        attack(KEY, NETWORK, X, Y, *epsilon, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", [attacks.one_pixel, attacks.hop_skip_jump])
def test_what_is_no_image_is_refused(attack):
    with pytest.raises(ValueError, match=r"need images of shape \[b, h, w, c\], got \(6, 16\)"):
        attack(KEY, lambda x: x[:, :4], X.reshape(6, 16), Y)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(x=np.uint8(X * 255)), "float images in \\[0, 1\\], got dtype uint8"),
        (dict(y=np.int32([9] * 6)), "labels in 0 ... 3, got 9 ... 9"),
        (dict(logits_fn=lambda x: x), r"logits_fn: need logits of shape \[6, k\]"),
    ],
)
def test_bad_input_of_hop_skip_jump(change, sentence):
    arguments = dict(key=KEY, logits_fn=NETWORK, x=X, y=Y) | change
    with pytest.raises(ValueError, match=sentence):
        attacks.hop_skip_jump(**arguments)
