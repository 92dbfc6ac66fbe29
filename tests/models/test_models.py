"""The zoo: parameter counts, shapes, modes, errors, the reference weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import models

# (classes, image side, channels, count). Published: resnet20 0.27M (He et al. 2016, table 6);
# vgg16 and preact_resnet18/34 as counted for the common CIFAR-10 implementations;
# mobilenet_v3_large and vit_b16 as listed with torchvision's weights. The others are ours.
COUNTS = {
    "mlp": (10, 28, 1, 269_322),
    "cnn": (10, 28, 1, 16 * 10 + 32 * (16 * 9 + 1) + 100 * (7 * 7 * 32 + 1) + 10 * 101),
    "mlp_512": (10, 28, 1, 407_050),
    "cnn_512": (62, 28, 1, 16 * 10 + 32 * (16 * 9 + 1) + 512 * (7 * 7 * 32 + 1) + 62 * 513),
    "alexnet": (10, 32, 3, 2_472_266),
    "resnet20": (10, 32, 3, 269_722),
    "vgg16": (10, 32, 3, 14_728_266),
    "preact_resnet18": (10, 32, 3, 11_171_146),
    "preact_resnet34": (10, 32, 3, 21_279_306),
    "mobilenet_v3_large": (1000, 224, 3, 5_483_032),
    "vit_b16": (1000, 224, 3, 86_567_656),
    "resnet8": (10, 32, 3, 75_290),
    "vgg_nano": (10, 32, 3, 94_986),
    "preact_resnet_nano": (10, 32, 3, 77_722),
    "mobilenet_v3_nano": (10, 32, 3, 117_130),
    "vit_nano": (10, 32, 3, 142_026),
}
SMALL = (
    "mlp",
    "cnn",
    "resnet8",
    "vgg_nano",
    "preact_resnet_nano",
    "mobilenet_v3_nano",
    "vit_nano",
)


# Compilation is most of the time here, so the tests share modules, weights and jitted functions.
@functools.cache
def _network(name, **options):
    """(module, jitted apply)."""
    net = models.make(name, 5, **options)
    return net, jax.jit(net.apply)


@functools.cache
def _variables(name, shape=(2, 8, 8, 3)):
    """(weights, images)."""
    net, _ = _network(name)
    x = jax.random.uniform(jax.random.key(1), shape)
    return jax.jit(net.init)(jax.random.key(0), x), x


def test_every_name_is_counted():
    assert set(COUNTS) == set(models.NAMES)


@pytest.mark.parametrize("name", models.NAMES)
def test_parameter_count_and_output_shape(name):
    num_classes, side, channels, count = COUNTS[name]
    net = models.make(name, num_classes)
    x = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    logits = jax.eval_shape(net.apply, variables, x)
    assert logits.shape == (2, num_classes)
    assert logits.dtype == jnp.float32


def test_total_stride_keeps_the_weights():
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    shapes = [
        jax.tree.map(
            lambda leaf: leaf.shape,
            jax.eval_shape(
                models.make("mobilenet_v3_large", 10, total_stride=s).init, jax.random.key(0), x
            ),
        )
        for s in (None, 8, 1)
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    with pytest.raises(ValueError, match="mobilenet_v3: need total_stride a power of two up to 32"):
        net = models.make("mobilenet_v3_large", 10, total_stride=6)
        jax.eval_shape(net.init, jax.random.key(0), x)


@pytest.mark.parametrize("name", SMALL)
def test_inference(name):
    (net, apply), (variables, x) = _network(name), _variables(name)
    logits = apply(variables, x)
    assert logits.shape == (2, 5)
    assert jnp.isfinite(logits).all()
    # Images do not see each other (float32 rounding aside).
    np.testing.assert_allclose(logits[::-1], apply(variables, x[::-1]), atol=1e-4)
    gradient = jax.jit(jax.grad(lambda x, v: net.apply(v, x)[:, 0].sum()))(x, variables)
    assert jnp.isfinite(gradient).all()
    assert jnp.abs(gradient).max() > 0


@pytest.mark.parametrize("name", ["resnet8", "vgg_nano", "preact_resnet_nano", "mobilenet_v3_nano"])
def test_batch_norm_modes(name):
    (net, apply), (variables, x) = _network(name), _variables(name)
    before = apply(variables, x)
    train = jax.jit(functools.partial(net.apply, train=True, mutable=["batch_stats"]))
    logits, updates = train(variables, x, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(before, logits, rtol=1e-2, atol=0)
    for old, new in zip(
        jax.tree.leaves(variables["batch_stats"]),
        jax.tree.leaves(updates["batch_stats"]),
        strict=True,
    ):
        assert (old != new).any()
    after = apply({**variables, **updates}, x)
    assert not np.allclose(before, after, rtol=1e-2, atol=0)


@pytest.mark.parametrize("part", ["use_norm", "use_shortcuts", "use_global_mean"])
def test_preact_resnet_without_a_part(part):
    """What is left of the names and shapes says which part is gone, and nothing else."""

    def shapes(**options):
        net = models.make("preact_resnet_nano", 10, **options)
        x = jax.ShapeDtypeStruct((2, 8, 8, 1), "f4")
        found = jax.eval_shape(net.init, jax.random.key(0), x)
        assert jax.eval_shape(net.apply, found, x).shape == (2, 10)
        leaves = jax.tree_util.tree_leaves_with_path(found)
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    whole, less = shapes(), shapes(**{part: False})
    gone = {name for name in whole if name not in less}
    word = {"use_norm": "bn", "use_shortcuts": "shortcut", "use_global_mean": None}[part]
    assert gone == {name for name in whole if word and word in name}
    changed = {name for name in less if less[name] != whole[name]}
    assert changed == ({"['params']['logits']['kernel']"} if word is None else set())
    if word is None:  # the last feature map is 2x2
        assert less["['params']['logits']['kernel']"] == (4 * 64, 10)


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg_nano", "vit_nano"])
def test_dropout_only_in_training(name):
    net, _ = _network(name, dropout_rate=0.5)
    (_, apply), (variables, x) = _network(name), _variables(name)

    @jax.jit
    def logits(seed, v):
        rngs = {"dropout": jax.random.key(seed)}
        trained = net.apply(v, x, train=True, rngs=rngs, mutable=["batch_stats"])[0]
        return trained, net.apply(v, x)  # inference needs no rng

    np.testing.assert_allclose(logits(0, variables)[1], apply(variables, x), atol=1e-5)
    np.testing.assert_array_equal(logits(0, variables)[0], logits(0, variables)[0])
    assert (logits(0, variables)[0] != logits(1, variables)[0]).any()


@pytest.mark.parametrize("name", SMALL)
def test_normalisation_is_inside(name):
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.3, 0.1)
    (_, apply), (variables, x) = _network(name), _variables(name)
    expected = apply(variables, (x - jnp.array(mean)) / jnp.array(std))
    logits = _network(name, mean=mean, std=std)[1](variables, x)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name):
    net = models.make(name, 5)
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.bfloat16)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), variables)
    assert jax.eval_shape(net.apply, variables, x).dtype == jnp.float32
    assert jax.eval_shape(net.apply, half, x).dtype == jnp.bfloat16


def test_vmap_over_stacked_weights_equals_a_loop():
    (net, _), (variables, x) = _network("cnn"), _variables("cnn")
    stack = jax.tree.map(lambda a: jnp.stack([a, -2 * a]), variables)

    def gradient(variables):
        return jax.grad(lambda x: net.apply(variables, x)[:, 1].sum())(x)

    stacked, looped = jax.jit(lambda v: (jax.vmap(gradient)(v), jax.lax.map(gradient, v)))(stack)
    np.testing.assert_allclose(stacked, looped, atol=1e-4)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"make: unknown model 'foo'; known: mlp, cnn, resnet20"):
        models.make("foo", 10)
    with pytest.raises(ValueError, match=r"make: model 'cnn' has no option 'depth'; known: "):
        models.make("cnn", 10, depth=3)
    with pytest.raises(ValueError, match="make: need num_classes >= 1, got num_classes=0"):
        models.make("cnn", 0)
    with pytest.raises(ValueError, match=r"make: need num_classes >= 1, got num_classes=2\.5"):
        models.make("cnn", 2.5)


@pytest.mark.parametrize("name", models.NAMES)
def test_bad_images(name):
    net = models.make(name, 10)

    def init(shape, dtype=jnp.float32):
        jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))

    with pytest.raises(ValueError, match=r"need images of shape \[b, h, w, c\], got shape"):
        init((32, 32, 3))
    with pytest.raises(ValueError, match=r"need float images in \[0, 1\], got dtype uint8"):
        init((1, 32, 32, 3), jnp.uint8)
    if not name.startswith("mlp"):
        with pytest.raises(ValueError, match=r"need images of at least \d+x\d+ pixels, got 1x1"):
            init((1, 1, 1, 3))


def test_vit_errors():
    (net, _), (variables, _) = _network("vit_nano"), _variables("vit_nano")
    with pytest.raises(ValueError, match="vit: need image sides divisible by patch=4, got 10x8"):
        net.apply(variables, jnp.zeros((1, 10, 8, 3)))
    with pytest.raises(ValueError, match="vit: need images of the size the weights were made for"):
        net.apply(variables, jnp.zeros((1, 16, 16, 3)))


def test_from_reference_npz_mapping_and_missing_arrays(tmp_path):
    variables, _ = _variables("cnn")
    arrays = {
        f"{layer}_{part}": np.asarray(value)
        for layer, parts in variables["params"].items()
        for part, value in parts.items()
    }
    np.savez(tmp_path / "weights.npz", **arrays)
    for source in (arrays, tmp_path / "weights.npz", str(tmp_path / "weights.npz")):
        loaded = models.from_reference_npz(source)
        jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    del arrays["dense2_bias"]
    with pytest.raises(ValueError, match="from_reference_npz: missing arrays dense2_bias"):
        models.from_reference_npz(arrays)


@pytest.mark.parametrize("name", ["mnist_standard", "mnist_adversarial"])
def test_reference_networks(name, reference_dir):
    expected = json.loads((reference_dir / "evasion.json").read_text())[name]
    with np.load(reference_dir / "mnist_test256.npz", allow_pickle=False) as file:
        x = jnp.asarray(file["x"][..., None] / 255, jnp.float32)
        y = jnp.asarray(file["y"], jnp.int32)
    net, variables = (
        models.make("cnn", 10),
        models.from_reference_npz(reference_dir / f"{name}.npz"),
    )

    @jax.jit
    def correct(x):
        return (net.apply(variables, x).argmax(-1) == y).sum()

    @jax.jit
    def sign(x):
        def loss(x):
            return -jnp.take_along_axis(jax.nn.log_softmax(net.apply(variables, x)), y[:, None], 1)

        return jnp.sign(jax.grad(lambda x: loss(x).sum())(x))

    assert int(correct(x)) == expected["clean_correct_256"]
    # Foolbox's FGSM: the blank background is full of pooling ties, so this also checks them.
    for epsilon, count in zip(expected["linf_epsilons"], expected["fgsm_correct"], strict=True):
        assert abs(int(correct(jnp.clip(x + epsilon * sign(x), 0, 1))) - count) <= 1
