"""Defense-GAN: the descent against NumPy, three gradients, training, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

import advjax
from advjax import attacks, data, defenses, evaluation, losses, models
from advjax.core import parallel, random
from advjax.defenses import generators

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A linear generator: its nearest image is a least-squares solution.
BASIS = jax.random.normal(jax.random.key(0), (3, 4 * 4)) / 4
LINEAR = defenses.GeneratorFn(
    Partial(lambda basis, z: 0.5 + (z @ basis).reshape(-1, 4, 4, 1), BASIS), latent_size=3
)
X = jax.random.uniform(jax.random.key(1), (5, 4, 4, 1))
Y = jnp.arange(5)
NET = models.make("mlp", num_classes=10)
LOGITS_FN = advjax.bind(NET, NET.init(jax.random.key(2), X))
KEY = jax.random.key(3)
FEW = dict(num_steps=4, num_restarts=3, learning_rate=2.0, momentum=0.7)


def as_numpy(x):
    return np.asarray(x, np.float64)


def nearest_images(x):
    basis, target = as_numpy(BASIS), as_numpy(x).reshape(len(x), -1) - 0.5
    z = np.linalg.lstsq(basis.T, target.T, rcond=None)[0]
    return (0.5 + z.T @ basis).reshape(x.shape)


def test_enough_steps_find_the_nearest_image():
    found = defenses.reconstruct(
        KEY, LINEAR, X, num_steps=400, num_restarts=2, learning_rate=2.0, momentum=0.5
    )
    # What is left of the slowest direction, and rounding.
    np.testing.assert_allclose(found, nearest_images(X), atol=1e-4)


def test_the_descent_is_the_papers():
    basis, x = as_numpy(BASIS), as_numpy(X).reshape(5, -1)
    for i in range(5):
        key = jax.random.fold_in(KEY, i)
        z = as_numpy(jax.random.normal(key, (3, 3))) / np.sqrt(3)
        velocity = np.zeros_like(z)
        for _ in range(4):
            slope = 2 / 16 * (0.5 + z @ basis - x[i]) @ basis.T
            velocity = 0.7 * velocity + slope
            z = z - 2.0 * velocity
        images = 0.5 + z @ basis
        best = ((images - x[i]) ** 2).mean(1).argmin()
        found = defenses.reconstruct(KEY, LINEAR, X, **FEW)[i]
        np.testing.assert_allclose(np.ravel(found), images[best], rtol=1e-4, atol=1e-5)


def test_the_result_depends_on_the_key_and_not_on_the_batch():
    whole = defenses.reconstruct(KEY, LINEAR, X, **FEW)
    chex.assert_equal_shape([whole, X])
    np.testing.assert_allclose(
        defenses.reconstruct(KEY, LINEAR, X[:2], **FEW), whole[:2], atol=1e-6
    )
    keys = jax.vmap(functools.partial(jax.random.fold_in, KEY))(jnp.array([3, 4]))
    np.testing.assert_allclose(
        defenses.reconstruct(keys, LINEAR, X[3:], **FEW), whole[3:], atol=1e-6
    )
    chex.assert_trees_all_equal(whole, defenses.reconstruct(KEY, LINEAR, X, **FEW))
    assert not np.allclose(whole, defenses.reconstruct(jax.random.key(4), LINEAR, X, **FEW))


@pytest.mark.parametrize("one_each", [False, True])
def test_devices_descend_to_their_own_images(one_each):
    mesh = parallel.make_mesh(devices=jax.devices()[:5])
    keys = random.example_keys(KEY, 5) if one_each else KEY

    def reconstruct(key, x):
        return defenses.reconstruct(key, LINEAR, x, **FEW)

    found = jax.jit(jax.shard_map(
        reconstruct, mesh=mesh, in_specs=(P("data") if one_each else P(), P("data")),
        out_specs=P("data"),
    ))(keys, X)  # fmt: skip
    each = [reconstruct(keys[i : i + 1] if one_each else KEY, X[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(found, np.concatenate(each), atol=1e-6)


def test_a_plain_function_and_short_floats():
    plain = defenses.GeneratorFn(lambda z: jnp.tile(z[:, :, None, None], (1, 4, 4, 1)), 1)
    wrapped = defenses.defense_gan(LOGITS_FN, plain, key=KEY, **FEW)
    assert 0 <= evaluation.accuracy(wrapped, X, Y) <= 1
    short = defenses.reconstruct(
        KEY, plain, X.astype(jnp.bfloat16), num_steps=2, learning_rate=np.float32(1)
    )
    assert short.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(short)))


def test_a_mean_over_keys_of_each_example():
    keys = random.example_keys(KEY, 5)
    wrapped = defenses.defense_gan(LOGITS_FN, LINEAR, key=keys, **FEW)
    drawn = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    each = [defenses.defense_gan(LOGITS_FN, LINEAR, key=drawn[:, i], **FEW)(X) for i in range(2)]
    np.testing.assert_allclose(wrapped.mean_of(2)(X), np.mean(each, axis=0), atol=1e-5)


def test_a_descent_that_diverges_is_not_the_best_one():
    # Half of the starts are no images.
    broken = defenses.GeneratorFn(
        lambda z: jnp.where(z > 0, jnp.nan, 0.1 * z)[:, :, None, None], latent_size=1
    )
    found = defenses.reconstruct(
        KEY, broken, jnp.zeros((4, 1, 1, 1)), num_steps=2, num_restarts=16, learning_rate=0.1
    )
    assert np.all(np.isfinite(found))


def wrapped(gradient, key=KEY):
    return defenses.defense_gan(LOGITS_FN, LINEAR, key=key, gradient=gradient, **FEW)


@pytest.fixture(scope="module")
def slopes():
    """Answers to X and the gradient of the first logit, for each kind of gradient."""

    @jax.jit
    def both(classifier, x):
        slope, logits = jax.grad(
            lambda x: (classifier(x)[:, 0].sum(), classifier(x)), has_aux=True
        )(x)
        return logits, slope

    return {name: both(wrapped(name), X) for name in generators.GRADIENTS}


def test_the_classifier_sees_the_reconstruction_whatever_the_gradient(slopes):
    expected = LOGITS_FN(defenses.reconstruct(KEY, LINEAR, X, **FEW))
    for logits, _ in slopes.values():
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_straight_through_is_the_gradient_at_the_reconstruction(slopes):
    image = defenses.reconstruct(KEY, LINEAR, X, **FEW)
    expected = jax.grad(lambda x: LOGITS_FN(x)[:, 0].sum())(image)
    np.testing.assert_allclose(slopes["straight_through"][1], expected, rtol=1e-4, atol=1e-5)


def test_none_is_no_gradient(slopes):
    assert not np.any(slopes["none"][1])


def test_unrolled_is_the_true_gradient(slopes):
    direction = jax.random.normal(jax.random.key(5), X.shape)
    function = jax.jit(lambda x: wrapped("none")(x)[:, 0].sum())
    # Central differences in float32: steps of 1e-2, ReLUs may switch in between.
    difference = (function(X + 1e-2 * direction) - function(X - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(
        jnp.sum(slopes["unrolled"][1] * direction), difference, rtol=0.1, atol=1e-2
    )


def test_bpda_is_pgd_on_the_wrapper():
    pgd = jax.jit(functools.partial(attacks.pgd, num_steps=3))
    loss = {}
    for gradient in ("straight_through", "none"):  # without a gradient PGD is its random start
        x_adv = pgd(KEY, wrapped(gradient), X, Y, 0.2)
        assert float(jnp.max(jnp.abs(x_adv - X))) <= 0.2 + 1e-6
        loss[gradient] = np.mean(losses.cross_entropy(wrapped("none")(x_adv), Y))
    assert loss["straight_through"] > loss["none"]


def test_evaluation_takes_the_wrapper_with_new_keys_and_weights():
    answers = [evaluation.predict(wrapped("none", jax.random.key(k)), X) for k in (3, 3, 4)]
    chex.assert_trees_all_equal(answers[0], answers[1])
    assert not np.allclose(answers[0], answers[2])


def test_one_trace_for_many_learning_rates():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def error(rate):
        found = defenses.reconstruct(
            KEY, LINEAR, X, num_steps=20, num_restarts=1, learning_rate=rate, momentum=0.5
        )
        return jnp.mean((found - X) ** 2)

    slow, quick = (float(error(rate)) for rate in (0.01, 2.0))
    assert quick < slow


MODULE = defenses.Generator((8, 8, 1), latent_size=4, features=4)
DIGITS = data.load("digits", "train").take(200)
TRAIN = functools.partial(
    defenses.train_generator, jax.random.key(0), MODULE, DIGITS,
    critic=defenses.Critic((4,)), batch_size=16, num_critic_steps=2, learning_rate=3e-3,
    progress=False,
)  # fmt: skip


def test_networks():
    for shape in ((8, 8, 1), (28, 28, 1), (7, 9, 3)):
        module = defenses.Generator(shape, latent_size=5, features=4)
        made, _ = module.init_with_output(jax.random.key(0), jnp.ones((2, 5)))
        chex.assert_shape(made, (2, *shape))
        assert made.min() >= 0 and made.max() <= 1


def test_pixels_are_placed_in_order():
    x = jnp.arange(2 * 4.0).reshape(1, 1, 2, 4)
    assert generators._pixels(x)[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.study
def test_training_makes_images_like_the_data_and_goes_on_where_it_was(tmp_path):
    start = TRAIN(num_steps=1)
    trained = TRAIN(num_steps=300, checkpoint_dir=tmp_path)
    chex.assert_trees_all_equal(trained, TRAIN(num_steps=300, checkpoint_dir=tmp_path))
    z = jax.random.normal(jax.random.key(1), (200, 4))
    mean = DIGITS.float_images().mean(0)
    before, after = (float(jnp.mean((f(z).mean(0) - mean) ** 2)) for f in (start, trained))
    assert after < 0.5 * before  # 0.30 of it when this was written


def test_the_same_key_gives_the_same_generator():
    first, again = (TRAIN(num_steps=3) for _ in range(2))
    chex.assert_trees_all_equal(first, again)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (
            lambda: defenses.reconstruct(KEY, LINEAR, jnp.zeros((2, 8, 8, 1))),
            r"reconstruct: need a generator of images of shape \(8, 8, 1\), got one that makes "
            r"\(4, 4, 1\)",
        ),
        (
            lambda: wrapped("none")(jnp.zeros((2, 4, 4, 3))),
            r"need a generator of images of shape \(4, 4, 3\)",
        ),
        (
            lambda: defenses.train_generator(
                KEY, defenses.Generator((28, 28, 1)), DIGITS, num_steps=1
            ),
            r"train_generator: need a generator of images of shape \(8, 8, 1\), got one that makes "
            r"\(28, 28, 1\)",
        ),
        (
            lambda: defenses.reconstruct(KEY, defenses.GeneratorFn(LINEAR.function, 7), X),
            "need a generator of latents of length 7, got another one",
        ),
        (lambda: wrapped("bpda"), "unknown gradient 'bpda'; known: straight_through, unrolled"),
        (lambda: defenses.reconstruct(KEY, LINEAR, X, num_steps=0), "need num_steps >= 1"),
        (lambda: defenses.reconstruct(KEY, LINEAR, X, num_restarts=0), "need num_restarts >= 1"),
        (lambda: defenses.reconstruct(KEY, LINEAR, X, learning_rate=-1), "learning_rate >= 0"),
        (lambda: defenses.reconstruct(KEY, LINEAR, 255 * X), "need images in"),
        (lambda: TRAIN(num_steps=0), "train_generator: need num_steps >= 1, got num_steps=0"),
        (lambda: TRAIN(num_steps=1, penalty=-1.0), "need a finite penalty >= 0"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)
