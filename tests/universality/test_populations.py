"""Padded networks are the unpadded ones; architectures are sampled, grouped and trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import advjax
from advjax import data, universality
from advjax.core import losses
from advjax.universality import networks, populations

KEY = jax.random.key(0)
X = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
MODULES = {
    "fully_connected": networks.PaddedNetwork(10, "fully_connected", depth=2, padding=48),
    "cnn": networks.PaddedNetwork(10, "cnn", depth=2, padding=8),
}
WIDTHS = {"fully_connected": 33, "cnn": 5}
ADAM = optax.adam(5e-3)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def variables_of(kind):
    return networks.initial_variables(
        MODULES[kind], KEY, X, {"width": jnp.int32(WIDTHS[kind]), "dropout": jnp.float32(0.2)}
    )


@pytest.mark.study
@pytest.mark.parametrize("kind", MODULES)
def test_a_padded_network_is_the_unpadded_one(kind):
    module, variables = MODULES[kind], variables_of(kind)
    smaller, params = networks.unpadded(module, variables)
    assert params["params"]["hidden2"]["kernel"].shape[-2:] == (WIDTHS[kind], WIDTHS[kind])
    labels = jnp.zeros(4, int)
    gradients = [
        jax.grad(lambda x, m=m, v=v: jnp.sum(losses.cross_entropy(m.apply(v, x), labels)))
        for m, v in ((module, variables), (smaller, params))
    ]
    # 1e-6: the zeros add nothing, but sums of another length are added in another order.
    np.testing.assert_allclose(
        module.apply(variables, X), smaller.apply(params, X), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(gradients[0](X), gradients[1](X), rtol=1e-5, atol=1e-7)


def test_the_unpadded_network_is_numpys():
    _, variables = networks.unpadded(MODULES["fully_connected"], variables_of("fully_connected"))
    layers = variables["params"]
    h = X.reshape(4, -1).astype(np.float64)
    for name in ("hidden1", "hidden2"):
        h = np.maximum(h @ layers[name]["kernel"] + layers[name]["bias"], 0)
    logits = h @ layers["logits"]["kernel"] + layers["logits"]["bias"]
    padded = MODULES["fully_connected"].apply(variables_of("fully_connected"), X)
    np.testing.assert_allclose(padded, logits, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_the_scale_of_the_weights_is_that_of_the_unpadded_network():
    module = networks.PaddedNetwork(10, "fully_connected", depth=2, padding=512)
    variables = networks.initial_variables(module, KEY, X, {"width": 200, "dropout": 0.0})
    params = networks.unpadded(module, variables)[1]["params"]
    for name, fan_in, gain in (("hidden1", 64, 2), ("hidden2", 200, 2), ("logits", 200, 1)):
        # 2000 weights and more: their deviation is known to 1.6 %, three times that is 5 %.
        np.testing.assert_allclose(np.std(params[name]["kernel"]) ** 2, gain / fan_in, rtol=0.1)


def train(dataset, chosen, num_epochs, method):
    groups = universality.group_architectures(chosen, 10, paddings=(64,))
    assert len(groups) == 1
    (result,) = universality.train_architectures(
        KEY, groups, dataset, optimizer=ADAM, num_epochs=num_epochs, batch_size=32, method=method
    )
    return result


@pytest.fixture(scope="module")
def trained():
    """Three networks of one program, and the data that they saw."""
    dataset = data.load("digits", "train").take(320)
    chosen = populations.Architectures(
        np.array([3, 7, 11], np.int32), np.full(3, 2, np.int32),
        np.array([30, 40, 64], np.int32), np.array([0.0, 0.5, 0.2], np.float32),
    )  # fmt: skip
    return dataset, chosen, train(dataset, chosen, 8, "map")


def test_padding_stays_zero_and_the_networks_learn(trained):
    dataset, chosen, result = trained
    kernel = np.asarray(result.variables["params"]["hidden2"]["kernel"])
    bias = np.asarray(result.variables["params"]["hidden1"]["bias"])
    for i, width in enumerate(chosen.width):
        assert not kernel[i, width:].any() and not kernel[i, :, width:].any()
        assert not bias[i, width:].any() and bias[i, :width].any()
    logits_fn = advjax.bind(result.module, result.variables)
    logits = jax.vmap(lambda f: f(dataset.float_images()))(logits_fn)
    assert np.all(np.mean(np.argmax(logits, -1) == dataset.labels, axis=1) > 0.7)


def test_neither_the_company_nor_the_method_matters(trained):
    dataset, chosen, _ = trained
    # Two epochs: after eight, sums in another order are 0.14 of the logits on some machines.
    result = train(dataset, chosen, 2, "map")
    again = train(dataset, chosen.take([2, 0]), 2, "vmap")
    np.testing.assert_array_equal(again.members.index, [11, 3])
    for i, j in ((0, 2), (1, 0)):
        ours, theirs = (
            advjax.bind(r.module, jax.tree.map(lambda leaf, k=k: leaf[k], r.variables))(X)
            for r, k in ((again, i), (result, j))
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_samples_are_in_range_and_do_not_depend_on_their_number():
    some = universality.sample_architectures(KEY, 200)
    assert set(some.depth) == {1, 2, 3, 4}
    assert some.width.min() >= 30 and some.width.max() <= 2000
    assert some.dropout.min() >= 0 and some.dropout.max() <= 0.5
    # Log-uniform: half of 200 lie below the geometric mean of the ends, give or take 4 deviations.
    assert abs(np.mean(some.width < np.sqrt(30 * 2000)) - 0.5) < 4 * 0.5 / np.sqrt(200)
    fewer = universality.sample_architectures(KEY, 5)
    for a, b in zip(fewer, some, strict=True):
        np.testing.assert_array_equal(a, b[:5])


def test_every_architecture_is_in_one_group_that_holds_it():
    some = universality.sample_architectures(KEY, 100)
    groups = universality.group_architectures(some, 10, size=8)
    assert sorted(np.concatenate([g.members.index for g in groups])) == list(range(100))
    for group in groups:
        assert len(group.members.index) <= 8
        assert np.all(group.members.width <= group.module.padding)
        assert np.all(group.members.depth == group.module.depth)


@pytest.mark.parametrize("kind", MODULES)
def test_parameters_are_counted_without_padding(kind):
    width = max(WIDTHS[kind], populations.RANGES[kind].width[0])
    members = populations.Architectures(
        np.zeros(1, np.int32), np.full(1, 2, np.int32), np.full(1, width, np.int32),
        np.zeros(1, np.float32),
    )  # fmt: skip
    (group,) = universality.group_architectures(members, 10, kind=kind)
    plain = group.module.clone(padding=width).init(KEY, X)["params"]
    number = sum(leaf.size for leaf in jax.tree.leaves(plain))
    assert populations.num_parameters(group, (8, 8, 1)) == [number]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(width=(20, 100)), r"need 30 <= width <= 2000 for fully_connected, got width=\(20"),
        (dict(depth=(1, 5)), r"need 1 <= depth <= 4 for fully_connected, got depth=\(1, 5\)"),
        (dict(dropout=(0.2, 0.1)), r"need 0.0 <= dropout <= 0.5 .* got dropout=\(0.2, 0.1\)"),
        (dict(kind="cnn", width=(4, 100)), "need 4 <= width <= 64 for cnn"),
        (dict(kind="tree"), "unknown kind 'tree'; known: fully_connected, cnn"),
    ],
)
def test_an_architecture_out_of_range_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        universality.sample_architectures(KEY, 3, **options)
    assert "\n" not in str(caught.value)


def test_networks_of_too_few_classes_are_refused():
    groups = universality.group_architectures(
        universality.sample_architectures(jax.random.key(0), 1), 9
    )
    with pytest.raises(ValueError, match=r"need networks of 10 classes, .* got num_classes=9"):
        next(universality.train_architectures(KEY, groups, data.load("digits", "train")))


def test_what_no_array_holds_is_one_sentence():
    some = universality.sample_architectures(KEY, 3, width=(200, 300))
    with pytest.raises(ValueError, match=r"need paddings up to the largest width \d+, got \[64\]"):
        universality.group_architectures(some, 10, paddings=(64,))
    wrong = some._replace(width=some.width * 100)
    with pytest.raises(ValueError, match="group_architectures: need 30 <= width <= 2000"):
        universality.group_architectures(wrong, 10)
