"""Classifiers that hide their gradients are recognised, and broken all the same."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import advjax
from advjax import attacks, metrics
from advjax.attacks import squares
from tests import helpers

pytestmark = pytest.mark.slow

NETWORK = helpers.mlp_network(0, hidden=16)
X = jnp.asarray(helpers.images(0, 48))
Y = jnp.asarray(metrics.predictions(NETWORK(X)))
EPSILON = 0.25
KEY = jax.random.key(0)
# Few steps and queries: the network has sixteen pixels.
AUTO = functools.partial(attacks.auto_attack, num_steps=30, num_queries=300)


def scaled(network, x):
    return 1000 * network(x)


def softmax(network, x):
    return jax.nn.softmax(20 * network(x))


def rounded(network, x):
    return network(jnp.round(x * 7) / 7)


def unanswered(network, x):
    """No answer where the first pixel is dark."""
    return jnp.where(x[:, 0, 0] > 0.1, network(x), jnp.nan)


MASKED = {name: Partial(f, NETWORK) for name, f in
          {"scaled": scaled, "softmax": softmax, "rounded": rounded}.items()}  # fmt: skip
WORDS = {
    "scaled": "large logits mask the gradient",
    "softmax": "returns probabilities",
    "rounded": "gradient of the cross-entropy is zero at 48 of 48",
}


def accuracy(logits_fn, x):
    return float(jnp.mean(metrics.is_correct(logits_fn(x), Y)))


@functools.cache
def bare():
    """What the same attack leaves of the network without a mask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accuracy(NETWORK, AUTO(KEY, NETWORK, X, Y, EPSILON))


def test_an_honest_classifier_shows_no_sign():
    signs = attacks.masking_signs(NETWORK, X, Y)
    assert signs.sentences() == ()
    assert signs.num_images == len(X)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_recognised_and_broken(name):
    logits_fn = MASKED[name]
    by_gradient = jax.jit(functools.partial(attacks.pgd, num_steps=20))(
        KEY, logits_fn, X, Y, EPSILON
    )
    with pytest.warns(attacks.GradientMaskingWarning, match=WORDS[name]):
        x_adv = AUTO(KEY, logits_fn, X, Y, EPSILON)
    helpers.assert_in_ball_and_box(x_adv, X, "linf", np.float32(EPSILON))
    broken = accuracy(logits_fn, x_adv)
    assert broken < accuracy(logits_fn, by_gradient)  # the mask works against PGD
    # Rounding the input moves the boundaries a little; 5 of 48 images.
    assert broken <= bare() + 5 / 48


def test_logits_forty_times_as_large_are_recognised_and_broken():
    """What distillation at temperature 40 leaves when the network is used at 1."""
    scaled = Partial(lambda network, x: 40 * network(x), NETWORK)
    with pytest.warns(attacks.GradientMaskingWarning, match="large logits"):
        x_adv = AUTO(KEY, scaled, X, Y, EPSILON)
    assert accuracy(scaled, x_adv) <= bare() + 1 / 48


def test_square_after_the_gradients_is_reported():
    flat = Partial(rounded, NETWORK)
    with pytest.warns(attacks.GradientMaskingWarning, match="Square, which uses no gradient"):
        AUTO(KEY, flat, X, Y, EPSILON)


def test_no_answer_is_reported_and_no_success():
    logits_fn = Partial(unanswered, NETWORK)
    with pytest.warns(attacks.GradientMaskingWarning, match="does not answer"):
        x_adv = AUTO(KEY, logits_fn, X, Y, 0.05)
    answers = np.asarray(metrics.predictions(logits_fn(x_adv)))
    had_one = np.asarray(metrics.predictions(logits_fn(X))) >= 0
    assert not had_one.all()
    # An image with an answer is never moved to where there is none.
    assert np.all(answers[had_one] >= 0)
    helpers.assert_same_bits(x_adv[~had_one], X[~had_one])


def test_the_cascade_on_the_host_equals_the_one_under_jit():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager = AUTO(KEY, NETWORK, X[:9], Y[:9], EPSILON)
    compiled = jax.jit(lambda *args: AUTO(*args))(KEY, NETWORK, X[:9], Y[:9], EPSILON)
    np.testing.assert_array_equal(
        metrics.is_correct(NETWORK(eager), Y[:9]), metrics.is_correct(NETWORK(compiled), Y[:9])
    )


def test_the_cascade_says_who_broke_what():
    names = {
        "fgsm": attacks.fgsm,
        "pgd": functools.partial(attacks.pgd, num_steps=10),
    }
    wrong = Y.at[0].set((Y[0] + 1) % helpers.NUM_CLASSES)
    asked = []
    result = attacks.cascade(
        KEY, names, NETWORK, X, wrong, 0.05, batch_size=16,
        progress=lambda name, left: asked.append((name, left)),
    )  # fmt: skip
    by = np.asarray(result.broken_by)
    assert by[0] == -1
    np.testing.assert_array_equal(
        result.is_robust, metrics.is_correct(NETWORK(result.x_adv), wrong)
    )
    np.testing.assert_array_equal(by == 2, result.is_robust)
    # PGD only sees what FGSM and the network itself left.
    assert asked == [("fgsm", 47), ("pgd", int((by > 0).sum()))]
    single = jax.jit(attacks.fgsm)(KEY, NETWORK, X, wrong, 0.05)
    is_wrong = ~np.asarray(metrics.is_correct(NETWORK(single), wrong))
    np.testing.assert_array_equal(by <= 0, is_wrong)


def test_a_random_classifier_needs_the_version_for_it():
    def noisy(network, key, x):
        return network(x + 0.05 * jax.random.normal(key, x.shape))

    classifier = advjax.Randomised(Partial(noisy, NETWORK), jax.random.key(1))
    x_adv = attacks.auto_attack(
        KEY, classifier, X[:16], Y[:16], 0.3, version="rand", num_steps=5, num_samples=4
    )
    mean = classifier.mean_of(4)
    before = jnp.mean(metrics.is_correct(mean(X[:16]), Y[:16]))
    after = jnp.mean(metrics.is_correct(mean(x_adv), Y[:16]))
    assert after < before
    with pytest.raises(
        ValueError, match=r'^auto_attack: version="rand" needs an advjax.Randomised'
    ):
        attacks.auto_attack(KEY, NETWORK, X, Y, 0.1, version="rand")
    with pytest.raises(ValueError, match=r"^auto_attack: unknown version 'full'"):
        attacks.auto_attack(KEY, NETWORK, X, Y, 0.1, version="full")


def test_two_and_three_classes_leave_out_what_they_cannot_have():
    for num_classes in (2, 3):
        network = helpers.mlp_network(1, num_classes=num_classes)
        y = jnp.asarray(metrics.predictions(network(X[:8])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x_adv = AUTO(KEY, network, X[:8], y, 0.3)
        assert float(jnp.mean(metrics.is_correct(network(x_adv), y))) < 1


@pytest.mark.parametrize(("num_queries", "ball"), [(2, "linf"), (7, "linf"), (7, "l2")])
def test_square_asks_as_often_as_it_says(num_queries, ball):
    asked = []

    def counted(x):
        jax.debug.callback(lambda x: asked.append(len(x)), x)
        return NETWORK(x)

    attack = functools.partial(attacks.square, num_queries=num_queries, ball=advjax.balls.get(ball))
    jax.block_until_ready(jax.jit(lambda: attack(KEY, counted, X[:3], Y[:3], 0.001))())
    jax.effects_barrier()
    assert asked == [3] * num_queries


def test_square_reaches_every_pixel():
    """Also the last row and column, which the peers' random integers leave out."""
    corners = jax.vmap(lambda key: squares._corner(key, jnp.array(3), 4, 5))(
        jax.random.split(KEY, 200)
    )
    assert {tuple(c) for c in np.asarray(corners)} == {(r, c) for r in range(2) for c in range(3)}


def test_one_image_without_an_answer_changes_nothing_for_the_others():
    """The logarithms of probabilities are taken also when a row is not finite."""

    def partly(network, x):
        answers = jax.nn.softmax(40 * network(x))
        return jnp.where(x[:, 0, 0] > 0.99, jnp.nan, answers)

    logits_fn = Partial(partly, NETWORK)
    fine = X[np.asarray(X[:, 0, 0, 0]) <= 0.99][:7]
    y = jnp.asarray(metrics.predictions(NETWORK(fine)))
    names = {"apgd": functools.partial(attacks.apgd, num_steps=10)}
    alone = attacks.cascade(KEY, names, logits_fn, fine, y, 0.1)
    bad = fine[:1].at[:, 0, 0].set(1.0)
    both = attacks.cascade(
        KEY, names, logits_fn, jnp.concatenate([fine, bad]), jnp.append(y, y[0]), 0.1
    )
    np.testing.assert_array_equal(both.is_robust[:7], alone.is_robust)
    assert not bool(both.is_robust[7])
    assert int(both.broken_by[7]) == -1


def test_bad_input_of_the_cascade_is_one_sentence():
    names = {"fgsm": attacks.fgsm}
    y = np.asarray(Y)
    for message, call in {
        "cascade: need batch_size >= 1": lambda: attacks.cascade(
            KEY, names, NETWORK, X, Y, 0.1, batch_size=0
        ),
        "cascade: need at least one attack": lambda: attacks.cascade(KEY, {}, NETWORK, X, Y, 0.1),
        "fab: need at least one image": lambda: attacks.fab(KEY, NETWORK, X[:0], Y[:0]),
        "auto_attack: need images of shape": lambda: AUTO(
            KEY, lambda x: x @ jnp.ones((16, 4)), X.reshape(len(X), -1), Y, 0.1
        ),
        "auto_attack: need num_samples >= 1": lambda: AUTO(KEY, NETWORK, X, Y, 0.1, num_samples=0),
        "fgsm: need images as an array, got list": lambda: attacks.fgsm(
            KEY, NETWORK, X.tolist(), Y, 0.1
        ),
        "fgsm: need labels as an array, got list": lambda: attacks.fgsm(
            KEY, NETWORK, X, y.tolist(), 0.1
        ),
        "fab: need a classifier of at least two classes": lambda: attacks.fab(
            KEY, lambda x: x.sum((1, 2, 3))[:, None], X, 0 * Y
        ),
        "logits_fn: need logits that are floats": lambda: attacks.fab(
            KEY, lambda x: jnp.zeros((len(x), 4), jnp.int32), X, Y
        ),
        "logits_fn: need one array of logits, got tuple": lambda: attacks.fab(
            KEY, lambda x: (NETWORK(x), 0), X, Y
        ),
    }.items():
        with pytest.raises(ValueError, match="^" + message):
            call()


def test_random_numbers_of_the_host_are_found():
    numbers = np.random.default_rng(0)

    def hidden(x):
        return NETWORK(x) + 0.1 * numbers.normal(size=NETWORK(x).shape[1])

    signs = attacks.masking_signs(hidden, X, Y)
    assert signs.is_random and any("random" in sentence for sentence in signs.sentences())
    assert not attacks.masking_signs(NETWORK, X, Y).is_random
