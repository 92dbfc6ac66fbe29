"""Losses that defend: what all of them promise, their formulas in NumPy, what the attack sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import advjax
from advjax import attacks, balls, data, defenses, models, training
from tests import helpers

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
X = helpers.images(0, 6)
Y = np.arange(6, dtype=np.int32) % helpers.NUM_CLASSES
PARAMS = helpers.mlp_params(1)
NETWORK = Partial(helpers.mlp, PARAMS)
OTHERS = [helpers.mlp_network(seed) for seed in (2, 3)]

pgd = functools.partial(attacks.pgd, num_steps=2)
LOSSES = {
    "adversarial": functools.partial(defenses.adversarial, epsilon=0.1),
    "adversarial-pgd": functools.partial(
        defenses.adversarial, epsilon=0.1, attack=pgd, alpha=jnp.float32(0), predicted_labels=True
    ),
    "least_likely": functools.partial(defenses.least_likely, epsilon=0.1),
    "ensemble-list": functools.partial(
        defenses.ensemble_adversarial, epsilon=0.1, sources=OTHERS
    ),
    "ensemble-stack": functools.partial(
        defenses.ensemble_adversarial, epsilon=0.1, sources=advjax.stack(OTHERS)
    ),
    "trades": functools.partial(defenses.trades, epsilon=0.1, num_steps=2),
    "trades-l2": functools.partial(
        defenses.trades, epsilon=0.5, num_steps=2, step_size=0.2, ball=balls.l2
    ),
    "entropy": functools.partial(defenses.entropy_regularised, weight=0.5),
    "entropy-least_likely": functools.partial(
        defenses.entropy_regularised, weight=-0.5,
        base_loss=functools.partial(defenses.least_likely, epsilon=0.1),
    ),
    "at_temperature": functools.partial(defenses.at_temperature, temperature=jnp.float32(20)),
    "distilled": functools.partial(defenses.distilled, teacher=OTHERS[0], temperature=20.0),
}  # fmt: skip


class Recorder:
    """A classifier that remembers which images it was called with, and by whom."""

    def __init__(self, logits_fn, inference=None):
        self._logits_fn, self.seen = logits_fn, []
        self.inference = inference or logits_fn

    def __call__(self, x):
        self.seen.append(np.asarray(x))
        return self._logits_fn(x)


# ------------------------------------------------------------------------------ the contract


@pytest.fixture(scope="module")
def eager():
    return functools.cache(lambda name: LOSSES[name](KEY, NETWORK, X, Y))


@pytest.mark.parametrize("name", LOSSES)
def test_one_finite_loss_an_image_and_jit_equals_eager(name, eager):
    loss = eager(name)
    assert loss.shape == (6,)
    assert loss.dtype == jnp.float32
    assert np.all(np.isfinite(loss))
    compiled = jax.jit(LOSSES[name])(KEY, NETWORK, X, Y)
    # 1e-5: float32 sums in another order.
    np.testing.assert_allclose(compiled, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adversarial-pgd", "least_likely", "trades"])
def test_same_key_same_loss_other_key_another(name, eager):
    np.testing.assert_array_equal(LOSSES[name](KEY, NETWORK, X, Y), eager(name))
    assert not np.array_equal(LOSSES[name](jax.random.key(1), NETWORK, X, Y), eager(name))


@pytest.mark.parametrize(
    "loss_fn, option, values",
    [
        (defenses.adversarial, "epsilon", [0.0, 0.1]),
        (functools.partial(defenses.adversarial, epsilon=0.1), "alpha", [0.0, 1.0]),
        (functools.partial(defenses.trades, epsilon=0.1, num_steps=2), "beta", [0.0, 6.0]),
        (functools.partial(defenses.distilled, teacher=OTHERS[0]), "temperature", [1.0, 50.0]),
        (defenses.entropy_regularised, "weight", [-1.0, 1.0]),
    ],
)
def test_a_sweep_is_a_vmap(loss_fn, option, values):
    def loss(value):
        return loss_fn(KEY, NETWORK, X, Y, **{option: value})

    swept = jax.vmap(loss)(jnp.array(values))
    # 1e-5: float32 sums in another order.
    np.testing.assert_allclose(swept, [loss(value) for value in values], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adversarial", "adversarial-pgd", "trades"])
def test_no_gradient_flows_through_the_attack(name):
    """The gradient is that of the same loss on the same adversarial images as data."""
    recorder = Recorder(NETWORK)
    LOSSES[name](KEY, recorder, X, Y)
    x_adv = recorder.seen[-1]
    cross_entropy = lambda z: -jax.nn.log_softmax(z)[jnp.arange(6), Y]

    def on_data(params):
        clean, attacked = helpers.mlp(params, X), helpers.mlp(params, x_adv)
        if name == "trades":
            p, log_ratio = jax.nn.softmax(clean), jnp.log(
                jax.nn.softmax(clean) / jax.nn.softmax(attacked)
            )  # fmt: skip
            return jnp.sum(cross_entropy(clean) + 6 * jnp.sum(p * log_ratio, axis=-1))
        alpha = {"adversarial": 0.5, "adversarial-pgd": 0.0}[name]
        return jnp.sum(alpha * cross_entropy(clean) + (1 - alpha) * cross_entropy(attacked))

    def whole(params):
        return jnp.sum(LOSSES[name](KEY, Partial(helpers.mlp, params), X, Y))

    # 1e-4: the logarithm of a quotient of two softmaxes rounds more than a difference of logits.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        jax.jit(jax.grad(whole))(PARAMS), jax.grad(on_data)(PARAMS),
    )  # fmt: skip


# -------------------------------------------------------------------------- formulas in NumPy


def np_logits(params, x):
    hidden = x.reshape(len(x), -1).astype(np.float64) @ params["w1"] + params["b1"]
    return np.maximum(hidden, 0) @ params["w2"] + params["b2"], hidden > 0


def np_softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def np_cross_entropy(params, x, y):
    return -np.log(np_softmax(np_logits(params, x)[0])[np.arange(len(y)), y])


def np_gradient(params, x, targets):
    """Of the cross-entropy with the distribution `targets`, in the pixels."""
    logits, is_on = np_logits(params, x)
    at_hidden = ((np_softmax(logits) - targets) @ params["w2"].T) * is_on
    return (at_hidden @ params["w1"].T).reshape(x.shape)


def np_fgsm(params, x, y, epsilon):
    """One sign step, kept where it is better than the image: first by success, then by loss."""
    one_hot = np.eye(helpers.NUM_CLASSES)[y]
    stepped = np.clip(x + epsilon * np.sign(np_gradient(params, x, one_hot)), 0, 1)

    def rank(images):
        fooled = np_logits(params, images)[0].argmax(-1) != y
        return fooled, np_cross_entropy(params, images, y)

    (fooled, loss), (fooled_before, loss_before) = rank(stepped), rank(x)
    wins = (fooled & ~fooled_before) | ((fooled == fooled_before) & (loss > loss_before))
    return np.where(wins[:, None, None, None], stepped, x)


@pytest.mark.parametrize("predicted", [False, True])
def test_adversarial(predicted):
    attacked = np_logits(PARAMS, X)[0].argmax(-1) if predicted else Y
    x_adv = np_fgsm(PARAMS, X, attacked, 0.2)
    expected = 0.3 * np_cross_entropy(PARAMS, X, Y) + 0.7 * np_cross_entropy(PARAMS, x_adv, Y)
    assert np.any(attacked != Y) == predicted
    loss = defenses.adversarial(
        KEY, NETWORK, X, Y, epsilon=0.2, alpha=0.3, predicted_labels=predicted
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # float32 against float64


def test_ensemble_adversarial_attacks_the_answers_of_the_source():
    params = [helpers.mlp_params(seed) for seed in (2, 3)] + [PARAMS]
    possible = []
    for source in params:
        x_adv = np_fgsm(source, X, np_logits(source, X)[0].argmax(-1), 0.2)
        clean, attacked = (np_cross_entropy(PARAMS, x, Y) for x in (X, x_adv))
        possible.append((clean + attacked) / 2)
    keys = jax.random.split(KEY, 20)
    drawn = set()
    loss_fn = functools.partial(defenses.ensemble_adversarial, epsilon=0.2)
    for sources in (OTHERS, tuple(OTHERS), advjax.stack(OTHERS)):
        compiled = jax.jit(functools.partial(loss_fn, sources=sources))
        for key in keys:
            loss = compiled(key, NETWORK, X, Y)
            # 1e-5: float32 against float64.
            (which,) = [i for i in range(3) if np.allclose(loss, possible[i], rtol=1e-5)]
            drawn.add((type(sources).__name__, which))
    assert len(drawn) == 9  # every source, however they are given


def test_ensemble_adversarial_draws_sources_uniformly():
    """The attack writes into the images which classifier it was given."""
    constant = lambda value: lambda x: jnp.full((x.shape[0], 2), value, jnp.float32)

    def attack(key, logits_fn, x, y, epsilon):
        return x * 0 + logits_fn(x)[0, 0]

    def recover(x):
        return jnp.stack([x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], axis=-1)

    recover.inference = constant(3.0)
    x, y = jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, jnp.int32)
    loss = jax.vmap(
        lambda key: defenses.ensemble_adversarial(
            key, recover, x, y, epsilon=0.0, alpha=0.0, attack=attack,
            sources=[constant(1.0), constant(2.0)],
        )
    )(jax.random.split(KEY, 900))[:, 0]  # fmt: skip
    value = -np.log(np.expm1(np.asarray(loss, np.float64)))  # loss = log(1 + exp(-value))
    counts = [np.sum(np.abs(value - source) < 0.01) for source in (1, 2, 3)]
    # 300 each, with a deviation of 14; five of them.
    assert sum(counts) == 900
    assert np.all(np.abs(np.array(counts) - 300) < 70)


def test_least_likely_and_its_radii():
    num_images = 400
    rng = np.random.default_rng(0)
    linear = Partial(helpers.linear, (rng.normal(size=(16, 3)), np.zeros(3)))
    x = np.full((num_images, 4, 4, 1), 0.5, np.float32)
    y = np.zeros(num_images, np.int32)
    recorder = Recorder(linear)
    loss = defenses.least_likely(KEY, recorder, x, y, epsilon=0.4, alpha=0.2)
    x_adv = recorder.seen[-1]
    per_image = np.abs(x_adv - x).reshape(num_images, -1)
    radii = per_image.max(1)
    # A linear classifier has the same slope everywhere, so every pixel moves by the radius.
    np.testing.assert_allclose(per_image, np.repeat(radii[:, None], 16, 1), atol=1e-6)
    assert radii.max() <= 0.4
    assert len(np.unique(radii)) > 0.9 * num_images
    # A half normal of deviation 0.2, cut off at two deviations, has the mean 0.723 * 0.2 and a
    # deviation of 0.51 * 0.2; five errors of the mean of 400.
    assert abs(radii.mean() - 0.1446) < 5 * 0.102 / 20
    logits = [np.asarray(linear(images)) for images in (x, x_adv)]
    clean, attacked = (-np.log(np_softmax(z)[:, 0]) for z in logits)
    np.testing.assert_allclose(loss, 0.2 * clean + 0.8 * attacked, rtol=1e-4)  # float32
    # Towards the class that is least likely of the others.
    target = 1 + logits[0][0, 1:].argmin()
    assert np.all(np_softmax(logits[1])[:, target] >= np_softmax(logits[0])[:, target])
    recorder = Recorder(linear)
    defenses.least_likely(KEY, recorder, x, y, epsilon=0.4, random_epsilon=False)
    np.testing.assert_allclose(np.abs(recorder.seen[-1] - x), 0.4, rtol=1e-6)


@pytest.mark.parametrize("ball", [balls.linf, balls.l2], ids=repr)
def test_trades(ball):
    epsilon, step_size = 0.5, 0.35
    recorder = Recorder(NETWORK)
    loss = defenses.trades(
        KEY, recorder, X, Y, epsilon=epsilon, beta=3.0, num_steps=2, step_size=step_size, ball=ball
    )
    x_adv = recorder.seen[-1]
    helpers.assert_in_ball_and_box(x_adv, X, ball.name, epsilon)

    noise = [jax.random.normal(jax.random.fold_in(KEY, i), X.shape[1:]) for i in range(len(X))]
    expected = np.clip(X + 1e-3 * np.stack(noise), 0, 1).astype(np.float64)
    p = np_softmax(np_logits(PARAMS, X)[0])
    for _ in range(2):
        # KL(p || q) differs from the cross-entropy of q with p by what does not depend on q.
        gradient = np_gradient(PARAMS, expected, p)
        if ball is balls.linf:
            delta = np.clip(expected + step_size * np.sign(gradient) - X, -epsilon, epsilon)
        else:
            size = np.sqrt(np.sum(gradient**2, axis=(1, 2, 3), keepdims=True))
            delta = expected + step_size * gradient / size - X
            size = np.sqrt(np.sum(delta**2, axis=(1, 2, 3), keepdims=True))
            delta = delta * np.minimum(1, epsilon / size)
        expected = np.clip(X + delta, 0, 1)
    # 1e-4: so near the image the divergence is flat, and its gradient in float32 is rough.
    np.testing.assert_allclose(x_adv, expected, atol=1e-4 if ball is balls.linf else 2e-3)
    q = np_softmax(np_logits(PARAMS, x_adv)[0])
    divergence = np.sum(p * np.log(p / q), axis=-1)
    assert divergence.min() > 1e-3  # the attack did something
    np.testing.assert_allclose(
        loss, np_cross_entropy(PARAMS, X, Y) + 3 * divergence, rtol=1e-4
    )  # float32 against float64


def test_entropy_regularised():
    p = np_softmax(np_logits(PARAMS, X)[0])
    entropy = -np.sum(p * np.log(p), axis=-1)
    base_loss = functools.partial(defenses.least_likely, epsilon=0.3)
    for base, weight in ((training.cross_entropy, 2.0), (base_loss, -0.5)):
        loss = defenses.entropy_regularised(KEY, NETWORK, X, Y, weight=weight, base_loss=base)
        without = base(KEY, NETWORK, X, Y)
        # 1e-5: float32 against float64.
        np.testing.assert_allclose(loss, without + weight * entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adversarial", "least_likely", "ensemble-list"])
def test_entropy_of_the_attacked_images_too(name):
    """`sum of share (CE + weight H)` over the clean and the attacked images, in NumPy."""
    recorder = Recorder(NETWORK, inference=NETWORK)
    loss = defenses.entropy_regularised(
        KEY, recorder, X, Y, weight=0.5, base_loss=LOSSES[name], all_images=True
    )
    assert len(recorder.seen) == 2
    alpha = 1 / 1.3 if name == "least_likely" else 0.5
    expected = 0
    for share, images in zip((alpha, 1 - alpha), recorder.seen, strict=True):
        p = np_softmax(np_logits(PARAMS, images)[0])
        entropy = -np.sum(p * np.log(p), axis=-1)
        expected = expected + share * (np_cross_entropy(PARAMS, images, Y) + 0.5 * entropy)
    assert not np.array_equal(recorder.seen[0], recorder.seen[1])
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)  # float32 against float64


@pytest.mark.parametrize("temperature", [1.0, 40.0])
def test_distillation(temperature):
    softened = lambda params: np_softmax(np_logits(params, X)[0] / temperature)
    targets, answers = softened(helpers.mlp_params(2)), softened(PARAMS)
    np.testing.assert_allclose(
        defenses.distilled(KEY, NETWORK, X, Y, teacher=OTHERS[0], temperature=temperature),
        -np.sum(targets * np.log(answers), axis=-1), rtol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
        defenses.at_temperature(KEY, NETWORK, X, Y, temperature=temperature),
        -np.log(answers[np.arange(len(Y)), Y]), rtol=1e-5,
    )  # fmt: skip


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    def loss(params):
        student = Partial(helpers.mlp, params)
        return jnp.sum(defenses.distilled(KEY, student, X, Y, teacher=NETWORK, temperature=5.0))

    for gradient in jax.tree.leaves(jax.grad(loss)(PARAMS)):
        np.testing.assert_allclose(gradient, 0, atol=1e-6)  # rounding of softmax - softmax


# ------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("name", ["adversarial", "least_likely", "ensemble-list", "trades"])
def test_the_attack_sees_inference_mode(name):
    """Training mode would answer nonsense; the attack never meets it."""
    recorder = Recorder(lambda x: NETWORK(x) * jnp.nan, inference=NETWORK)
    usual = Recorder(NETWORK)
    LOSSES[name](KEY, recorder, X, Y)
    LOSSES[name](KEY, usual, X, Y)
    np.testing.assert_array_equal(recorder.seen[-1], usual.seen[-1])
    assert np.any(usual.seen[-1] != X)
    assert len(recorder.seen) == 2  # the clean images, then the adversarial ones
    np.testing.assert_array_equal(recorder.seen[0], X)


@pytest.mark.study
@pytest.mark.parametrize(
    "loss_fn, sweep",
    [
        (defenses.adversarial, {"epsilon": [0.0, 0.3], "alpha": [0.5, 0.0]}),
        (functools.partial(defenses.trades, num_steps=1), {"epsilon": [0.1, 0.3]}),
        (defenses.at_temperature, {"temperature": [1.0, 30.0]}),
    ],
)
def test_fit_many_sweeps_the_options(loss_fn, sweep):
    digits = data.load("digits", "train").take(64)
    fitted = training.fit_many(
        jax.random.split(KEY, 2), models.make("mlp", 10, hidden=(8,), dropout_rate=0.1), digits,
        loss_fn=loss_fn, hyperparameters={"loss": sweep}, num_epochs=1, batch_size=32,
        progress=False,
    )  # fmt: skip
    assert fitted.loss.shape == (2, 1)
    assert np.all(np.isfinite(fitted.loss))
    assert fitted.loss[0] != fitted.loss[1]


@pytest.mark.study
def test_adversarial_training_defends_the_digits():
    net, digits = models.make("mlp", 10, hidden=(64,)), data.load("digits", "train")
    test = data.load("digits", "test")
    x, y = test.float_images(), test.labels
    errors = {}
    for name, loss_fn in {
        "none": training.cross_entropy,
        "fgsm": functools.partial(defenses.adversarial, epsilon=0.1),
        "trades": functools.partial(defenses.trades, epsilon=0.1, num_steps=5),
    }.items():
        fitted = training.fit(
            KEY, net, digits, loss_fn=loss_fn, num_epochs=30, batch_size=64, progress=False
        )
        logits_fn = advjax.bind(net, fitted.variables)
        errors[name] = 1 - advjax.evaluation.robust_accuracy(
            KEY, pgd, logits_fn, x, y, jnp.array([0.1])
        )[0]  # fmt: skip
    assert errors["fgsm"] < errors["none"] / 1.5
    assert errors["trades"] < errors["none"] / 1.5


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "loss_fn, sentence",
    [
        (
            functools.partial(defenses.adversarial, epsilon=0.1, alpha=1.5),
            "adversarial: need 0 <= alpha <= 1, got alpha=1.5",
        ),
        (
            functools.partial(defenses.adversarial, epsilon=0.1, alpha=float("nan")),
            "adversarial: need 0 <= alpha <= 1, got alpha=nan",
        ),
        (
            functools.partial(defenses.least_likely, epsilon=0.1, alpha=-0.1),
            "least_likely: need 0 <= alpha <= 1, got alpha=-0.1",
        ),
        (
            functools.partial(defenses.ensemble_adversarial, epsilon=0.1, alpha=2, sources=OTHERS),
            "ensemble_adversarial: need 0 <= alpha <= 1, got alpha=2",
        ),
        (
            functools.partial(defenses.ensemble_adversarial, epsilon=0.1, sources=()),
            "ensemble_adversarial: need at least one classifier in sources, got none",
        ),
        (
            functools.partial(defenses.ensemble_adversarial, epsilon=0.1, sources=OTHERS[0]),
            "ensemble_adversarial: need sources as a list of classifiers or as a stack",
        ),
        (functools.partial(defenses.adversarial, epsilon=-1), "need a finite epsilon >= 0"),
        (functools.partial(defenses.least_likely, epsilon=-1), "least_likely: need a finite eps"),
        (functools.partial(defenses.trades, epsilon=-1), "trades: need a finite epsilon >= 0"),
        (
            functools.partial(defenses.trades, epsilon=0.1, beta=-1.0),
            "trades: need beta >= 0, got beta=-1.0",
        ),
        (
            functools.partial(defenses.trades, epsilon=0.1, num_steps=0),
            "trades: need num_steps >= 1, got num_steps=0",
        ),
        (
            functools.partial(defenses.trades, epsilon=0.1, step_size=-1.0),
            "trades: need a finite step_size >= 0",
        ),
        (
            functools.partial(defenses.distilled, teacher=NETWORK, temperature=0.0),
            "distilled: need a finite temperature > 0, got temperature=0.0",
        ),
        (
            functools.partial(defenses.at_temperature, temperature=-2),
            "at_temperature: need a finite temperature > 0, got temperature=-2",
        ),
        (
            functools.partial(defenses.adversarial, epsilon=0.1, alpha=np.array([0.5, 1.5])),
            "adversarial: need 0 <= alpha <= 1",
        ),
        (
            functools.partial(defenses.entropy_regularised, weight=1.0, all_images=True),
            "entropy_regularised: all_images=True needs a base_loss with an image_loss",
        ),
        (
            functools.partial(
                defenses.entropy_regularised,
                weight=1.0,
                all_images=True,
                base_loss=functools.partial(defenses.trades, epsilon=0.1),
            ),
            "entropy_regularised: all_images=True needs a base_loss with an image_loss",
        ),
    ],
)
def test_bad_input_is_one_sentence(loss_fn, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        loss_fn(KEY, NETWORK, X, Y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "share, warmup, radius", [(0.1, 0.4, 0.25), (0.4, 0.4, 1.0), (0.0, 0.0, 1.0)]
)
def test_the_radius_grows_during_the_warmup(share, warmup, radius):
    seen = []

    def attack(key, logits_fn, x, y, epsilon):
        seen.append(float(epsilon))
        return x

    logits_fn = Recorder(NETWORK)
    logits_fn.share_done = share
    defenses.adversarial(KEY, logits_fn, X, Y, epsilon=0.2, attack=attack, warmup=warmup)
    np.testing.assert_allclose(seen, 0.2 * radius, rtol=1e-6)


@pytest.mark.parametrize(
    "loss_fn, name",
    [
        (functools.partial(defenses.least_likely, epsilon=0.1), "least_likely"),
        (functools.partial(defenses.distilled, teacher=NETWORK), "distilled"),
        (defenses.at_temperature, "at_temperature"),
    ],
)
def test_uint8_images_are_refused(loss_fn, name):
    with pytest.raises(ValueError, match=f"{name}: need float images"):
        loss_fn(KEY, NETWORK, (X * 255).astype(jnp.uint8), Y)


def test_a_bad_radius_is_told_in_a_training_too():
    loss = functools.partial(defenses.adversarial, epsilon=-0.1)
    with pytest.raises(ValueError, match=r"adversarial: need .*, got epsilon=-0\.1"):
        jax.eval_shape(lambda x: loss(KEY, NETWORK, x, Y), X)
