"""Child networks are what their choices say; the controllers improve; a search goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from advjax import data, universality
from advjax.universality import cells, networks, searches

KEY = jax.random.key(0)
X = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)
MODULE = cells.ChildNetwork(10)
DIGITS = data.load("digits", "train")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def child(**chosen):
    return np.array([cells.CHOICES[name].index(chosen.get(name, values[0]))
                     for name, values in cells.CHOICES.items()], np.int32)  # fmt: skip


CHILDREN = {
    "plain": child(),
    "wide": child(channels=8, kernel_1=3, activation_1="tanh", skip_1=True, kernel_2=3),
    "parallel": child(
        channels=6, kernel_2=3, activation_2="elu", skip_2=True, input_2="cell", pool="mean"
    ),
}


def numpy_child(params, chosen):
    """Without masks: arrays of the size that the choices ask for."""
    width = cells.CHANNELS[chosen[0]]
    chosen = dict(zip(cells.CHOICES, chosen, strict=True))

    def convolution(x, name, size):
        kernel = np.asarray(params[f"{name}_kernel"], float)[:, :, : x.shape[-1], :width]
        kernel = kernel if size == 3 else kernel[1:2, 1:2]
        r = size // 2
        padded = np.pad(x, ((0, 0), (r, r), (r, r), (0, 0)))
        y = sum(
            padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
            for i in range(size)
            for j in range(size)
        )
        return y + params[f"{name}_bias"][:width]

    def node(x, number, cell):
        size = cells.CHOICES[f"kernel_{number}"][chosen[f"kernel_{number}"]]
        y = convolution(x, f"cell{cell}_node{number}", size)
        function = (
            lambda z: np.maximum(z, 0), np.tanh, lambda z: np.where(z > 0, z, np.expm1(z))
        )[chosen[f"activation_{number}"]]  # fmt: skip
        return function(y) + (x if chosen[f"skip_{number}"] else 0)

    x = convolution(X.astype(float), "stem", 1)
    for cell in (1, 2):
        first = node(x, 1, cell)
        x = node(x if chosen["input_2"] else first, 2, cell)
        windows = x.reshape(3, x.shape[1] // 2, 2, x.shape[2] // 2, 2, width)
        x = windows.mean((2, 4)) if chosen["pool"] else windows.max((2, 4))
    kernel = np.asarray(params["logits"]["kernel"]).reshape(2, 2, max(cells.CHANNELS), 10)
    x = x.reshape(3, -1) @ kernel[:, :, :width].reshape(-1, 10)
    return x + params["logits"]["bias"]


@pytest.fixture(scope="module")
def apply():
    return jax.jit(MODULE.apply)


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_is_what_its_choices_say(apply, name):
    choices = CHILDREN[name]
    variables = networks.initial_variables(MODULE, KEY, X, {"choices": jnp.asarray(choices)})
    ours = numpy_child(variables["params"], choices)
    # 1e-4: float32 against float64 through five layers.
    np.testing.assert_allclose(apply(variables, X), ours, rtol=1e-4, atol=1e-4)


def test_parameters_are_those_that_are_not_masked():
    # stem 1 -> 2 and bias, twice (two 1x1 of 2 -> 2, two biases), 2x2 pixels of 2 to 10 logits
    assert cells.num_parameters(CHILDREN["plain"][None], (8, 8, 1), 10) == [
        4 + 2 * (4 + 4 + 4) + 90
    ]
    assert cells.num_parameters(CHILDREN["wide"][None], (8, 8, 1), 10) == [
        16 + 2 * (2 * 9 * 64 + 16) + 330
    ]


@pytest.fixture(scope="module")
def search():
    def go_on(controller="reinforce", num_rounds=2, history=None):
        return universality.architecture_search(
            KEY, DIGITS.take(256), DIGITS.take(100), epsilon=0.1, controller=controller,
            num_rounds=num_rounds, num_children=3, num_epochs=1, batch_size=64, history=history,
        )  # fmt: skip

    return go_on


@pytest.mark.study
def test_a_search_that_goes_on_is_one_that_never_stopped(search):
    complete = search()
    again = search(history=search(num_rounds=1))
    for a, b in zip(complete, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert complete.choices.shape == (6, 9)
    assert np.all(complete.choices < np.array(cells.SIZES)) and np.all(complete.choices >= 0)
    assert np.all(complete.adversarial_accuracy <= complete.clean_accuracy)
    assert complete.adversarial_accuracy[complete.best] == complete.adversarial_accuracy.max()


def reward(choices):
    """A toy: the share of the choices that are their last value."""
    return np.mean(choices == np.array(cells.SIZES) - 1, axis=1).astype(np.float32)


@pytest.mark.parametrize("controller", ["evolution", "reinforce"])
def test_a_controller_finds_more_than_chance(controller):
    history = searches.Search(np.zeros((0, 9), np.int32), *[np.zeros(0, np.float32)] * 3)
    for number in range(20):
        choices = searches._propose(jax.random.key(number), controller, history, 16)
        found = searches.Search(choices, *[reward(choices)] * 3)
        history = searches.Search(*map(np.concatenate, zip(history, found, strict=True)))
    rewards = history.adversarial_accuracy
    # By chance a third to a half of the choices are the last of their values.
    assert rewards[:16].mean() < 0.55
    assert rewards[-16:].mean() > 0.75


def test_a_mutation_changes_one_choice_of_the_best():
    choices = np.stack([CHILDREN[name] for name in CHILDREN] * 3)
    rewards = np.arange(9.0)
    children = jax.vmap(lambda k: searches._mutated(k, *map(jnp.asarray, (choices, rewards))))(
        jax.random.split(KEY, 50)
    )
    distance = (np.asarray(children)[:, None] != choices).sum(-1).min(1)
    np.testing.assert_array_equal(distance, 1)
    assert np.all(children < np.array(cells.SIZES)) and np.all(children >= 0)


def test_one_child_has_no_correlations():
    one = universality.Search(*(np.ones(1) for _ in universality.Search._fields))
    assert np.isnan(universality.correlations(one)).all()


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    result = searches.Search(np.zeros((20, 9), int), *rng.uniform(size=(3, 20)))
    ours = universality.correlations(result)
    assert ours.with_clean == stats.pearsonr(*result[1:3])[0]
    assert ours.with_parameters_by_rank == stats.spearmanr(result[1], result[3])[0]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(controller="grid"), "unknown controller 'grid'; known: evolution, reinforce, random"),
        (dict(num_children=0), "need num_children >= 1, got num_children=0"),
        (dict(epsilon=-1.0), "need a finite epsilon >= 0"),
        (
            dict(history=searches.Search(np.zeros((3, 9), int), *[np.zeros(3)] * 3)),
            "need a history of whole rounds of 2 children, got 3 children",
        ),
    ],
)
def test_bad_input_is_one_sentence(options, sentence):
    given = dict(epsilon=0.1, num_children=2) | options
    with pytest.raises(ValueError, match=sentence) as caught:
        universality.architecture_search(KEY, DIGITS, DIGITS, **given)
    assert "\n" not in str(caught.value)
