"""Planes, and classes on them: a known geometry, shared layers, models on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import boundary, models
from advjax.boundary import affine

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A plane with x1 at the origin and coordinates that are the first two pixels.
FLAT = [
    jnp.zeros((2, 2, 1)),
    jnp.zeros((2, 2, 1)).at[0, 0].set(1),
    jnp.zeros((2, 2, 1)).at[0, 1].set(1),
]
NOISE = jax.random.normal(jax.random.key(6), (3, 1, 2, 2, 1))


def stripes(x):
    """Class by the first pixel: below 0, in [0, 1], above 1."""
    first = x.reshape(len(x), -1)[:, 0]
    return (first >= -1e-4).astype(jnp.int32) + (first > 1 + 1e-4)


def numpy_plane(x1, x2, x3, expansion, density, std=1.0):
    """Gram and Schmidt, in float64."""
    x1, x2, x3 = (np.asarray(x, np.float64) / std for x in (x1, x2, x3))
    first = (x2 - x1) / np.linalg.norm(x2 - x1)
    along = np.sum((x3 - x1) * first)
    second = x3 - x1 - along * first
    height = np.linalg.norm(second)
    second /= height
    corners = np.array([[0, 0], [np.linalg.norm(x2 - x1), 0], [along, height]])
    low, high = corners.min(0), corners.max(0)
    grid = [
        np.linspace(
            low[i] - expansion * (high - low)[i], high[i] + expansion * (high - low)[i], density
        )
        for i in range(2)
    ]
    points = x1 + grid[0][:, None, None, None, None] * first + grid[1][:, None, None, None] * second
    return points * std, corners


@pytest.mark.parametrize("std", [1.0, (0.2, 0.3, 0.5)])
def test_plane_against_numpy(std):
    images = jax.random.uniform(jax.random.key(0), (3, 5, 4, 3))
    plane = boundary.plane(*images, expansion=0.5, density=7, std=jnp.asarray(std))
    points, corners = numpy_plane(*images, 0.5, 7, np.asarray(std))
    rows, columns = np.divmod(np.arange(49), 7)
    found = plane.at(plane.across[rows], plane.down[columns]).reshape(7, 7, 5, 4, 3)
    np.testing.assert_allclose(found, points, atol=2e-5)  # float32 of values up to 3
    np.testing.assert_allclose(plane.corners, corners, atol=2e-5)
    for image, corner in zip(images, plane.corners, strict=True):
        np.testing.assert_allclose(plane.at(*corner[:, None])[0], image, atol=2e-6)
    normalised = plane.first / jnp.asarray(std), plane.second / jnp.asarray(std)
    gram = [[float(jnp.sum(a * b)) for a in normalised] for b in normalised]
    np.testing.assert_allclose(gram, np.eye(2), atol=1e-5)


def test_a_known_geometry():
    plane = boundary.plane(*FLAT, expansion=5.0, density=111)  # a point each tenth, -5 ... 6
    labels = boundary.label_map(stripes, plane)
    assert labels.shape == (111, 111) and labels.dtype == jnp.int32
    shares = boundary.region_shares(labels, 3)
    expected = np.array([50, 11, 50]) / 111
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    entropy = np.log(np.sum(expected**10)) / (1 - 10)
    np.testing.assert_allclose(boundary.renyi_entropy(shares), entropy, rtol=1e-5)
    for limit, area in ((0.5, 1.0), (0.45, 11 / 111)):
        found = boundary.triple_area(shares, jnp.array([0, 1, 2]), limit)
        np.testing.assert_allclose(found, area, atol=1e-6)


def test_a_linear_classifier():
    """A half-plane through the corner of the box cuts off a share that geometry gives."""
    plane = boundary.plane(*FLAT, expansion=0.0, density=101)

    def logits_fn(x):
        a, b = x[:, 0, 0, 0], x[:, 0, 1, 0]
        return jnp.stack([jnp.full_like(a, 0.5), a + b, jnp.full_like(a, -9.0)], axis=-1)

    shares = boundary.region_shares(boundary.label_map(logits_fn, plane), 3)
    # a + b < 1/2 is an eighth of the unit square; the grid resolves its edge to one point in 100.
    np.testing.assert_allclose(shares, [1 / 8, 7 / 8, 0], atol=0.01)


NETWORKS = ["mlp", "cnn", "preact_resnet_nano", "vit_nano"]


@pytest.mark.study
@pytest.mark.parametrize("name", NETWORKS)
def test_sharing_the_affine_start_changes_nothing(name):
    net = models.make(name, 5, mean=0.4, std=0.3)
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    logits_fn = advjax.bind(net, net.init(jax.random.key(2), images))
    plane = boundary.plane(*images, density=9)
    a, b = (c.ravel() for c in jnp.meshgrid(plane.across, plane.down, indexing="ij"))
    direct = jax.jit(lambda f, p: f(p.at(a, b)))(logits_fn, plane)
    shared = jax.jit(lambda f, p: boundary.on_plane(f, p)(a, b))(logits_fn, plane)
    # Summed in another order; relative to the largest logit.
    np.testing.assert_allclose(shared, direct, atol=2e-5 * float(jnp.abs(direct).max()))
    np.testing.assert_array_equal(shared.argmax(-1), direct.argmax(-1))


def num_operations(function, name, *args):
    """How many images go through each such operation: the leading axis of its operand."""
    closed = jax.make_jaxpr(function)(*args)
    found = []

    def walk(jaxpr):
        for step in jaxpr.eqns:
            if step.primitive.name == name:
                found.append(step.invars[0].aval.shape[0])
            for value in step.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(closed.jaxpr)
    return found


def test_the_first_layer_is_computed_for_three_images():
    net = models.make("mlp", 5, mean=0.4, std=0.3, hidden=(6,))
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    logits_fn = advjax.bind(net, net.init(jax.random.key(2), images))
    plane = boundary.plane(*images, density=9)
    points = num_operations(
        lambda a, b: boundary.on_plane(logits_fn, plane)(a, b), "dot_general",
        jnp.zeros(50), jnp.zeros(50),
    )  # fmt: skip
    assert sorted(points)[-1] == 50 and sorted(points)[:-1].count(50) == 0
    assert len(points) >= 4  # the first layer at three images, the second at all points


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(len(x) * 4, 1).sum(-1).reshape(len(x), 4) * 2 - 1,  # merges the batch
        lambda x: jnp.transpose(x, (1, 2, 3, 0)).reshape(4, -1).T ** 2,  # the batch goes last
        lambda x: jax.lax.cond(x.sum() > 0, lambda: x, lambda: x)[:, 0, :, 0],
        lambda x: jnp.concatenate([x, jnp.ones_like(x)], -1).sum((1, 2)) + x[:, 0, 0],
        lambda x: x.reshape(len(x), -1) * x.reshape(len(x), -1),
        lambda x: 3 - jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=2)[:, 0, :, 0],
        lambda x: jnp.zeros((len(x), 2)),
        lambda x: x.reshape(len(x), -1) if len(x) == 1 else jnp.tanh(x).reshape(len(x), -1),
        # Images that do not stay the first axis, one entry each: the mean over flipped copies, over
        # noisy ones, rows before images, images backwards, all pixels as one batch.
        lambda x: jnp.concatenate([x, x[:, ::-1]]).reshape(2, len(x), -1).max(axis=0),
        lambda x: jnp.tanh((x[None] + NOISE).reshape(-1, 4)).reshape(3, len(x), 4).mean(axis=0),
        lambda x: jnp.tanh(x.transpose(1, 0, 2, 3).reshape(-1, 2)).reshape(2, len(x), 2).sum(0),
        lambda x: jnp.tanh(x[::-1] * 2)[::-1, 0],
        lambda x: (x.reshape(-1, 2) @ jnp.array([[1.0, 2.0], [3.0, -4.0]])).reshape(len(x), -1),
        lambda x: jnp.tile(x, (2, 1, 1, 1))[len(x) :, 0],
    ],
)  # fmt: skip
def test_any_program(function):
    keys = jax.random.split(jax.random.key(3), 3)
    x, u, v = (jax.random.normal(key, (2, 2, 1)) for key in keys)
    a, b = jnp.array([0.0, 1.0, -2.0]), jnp.array([0.5, 0.0, 3.0])
    expected = function(x + a[:, None, None, None] * u + b[:, None, None, None] * v)
    np.testing.assert_allclose(
        affine.on_points(function, x, u, v, a, b), expected, rtol=1e-5, atol=1e-5
    )


def test_neither_batch_size_nor_jit_nor_labels_matter():
    net = models.make("cnn", 4)
    images = jax.random.uniform(jax.random.key(4), (3, 8, 8, 1))
    logits_fn = advjax.bind(net, net.init(jax.random.key(5), images))
    plane = boundary.plane(*images, density=13)
    expected = boundary.label_map(logits_fn, plane)
    assert len(np.unique(expected)) > 1
    for labels_fn, batch_size in (
        (logits_fn, 7), (logits_fn, 169), (lambda x: logits_fn(x).argmax(-1), 50),
    ):  # fmt: skip
        labels = boundary.label_map(labels_fn, plane, batch_size=batch_size)
        np.testing.assert_array_equal(labels, expected)
    jitted = jax.jit(boundary.label_map)(logits_fn, plane)
    np.testing.assert_array_equal(jitted, expected)
    host = boundary.label_map(lambda x: np.array(logits_fn(np.array(x))), plane, batch_size=50)
    np.testing.assert_array_equal(host, expected)


@pytest.mark.parametrize("error", [AssertionError, RuntimeError, TypeError, ValueError])
def test_a_host_model_may_refuse_a_tracer_by_any_error(error):
    def api(x):
        if not isinstance(x, np.ndarray):
            raise error("need numpy")
        return stripes(x)

    plane = boundary.plane(*FLAT, density=9)
    np.testing.assert_array_equal(
        boundary.label_map(api, plane), boundary.label_map(stripes, plane)
    )
    with pytest.raises(error, match="need numpy"):
        boundary.label_map(lambda x: api(jnp.asarray(x)), plane)


def test_a_traced_expansion_of_known_images():
    planes = jax.jit(lambda expansion: boundary.plane(*FLAT, expansion=expansion, density=4))(2.0)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        planes, boundary.plane(*FLAT, expansion=2.0, density=4),
    )  # fmt: skip


def test_memory_does_not_grow_with_the_density():
    """But for the map itself: the points of a finer plane are never there together."""
    net = models.make("cnn", 4)
    x = jnp.zeros((3, 16, 16, 1))
    logits_fn = advjax.bind(net, net.init(jax.random.key(5), x))

    def temporary(density):
        plane = jax.eval_shape(
            lambda: boundary.plane(*jnp.eye(256)[:3].reshape(x.shape), density=density)
        )
        label_map = jax.jit(lambda f, plane: boundary.label_map(f, plane, batch_size=100))
        return label_map.lower(logits_fn, plane).compile().memory_analysis().temp_size_in_bytes

    coarse, fine = temporary(20), temporary(80)
    assert fine - coarse <= 2 * 4 * (80**2 - 20**2)  # the map, and one copy of it
    assert fine - coarse < 80**2 * 16 * 16 * 4 / 50  # a fiftieth of the images


def test_clip():
    plane = boundary.plane(*FLAT, expansion=1.0, density=31)
    outside = boundary.region_shares(boundary.label_map(stripes, plane), 3)
    inside = boundary.region_shares(boundary.label_map(stripes, plane, clip=True), 3)
    assert outside[0] > 0.3 and outside[2] > 0.3
    np.testing.assert_array_equal(inside, [0, 1, 0])


def test_nan_logits_are_no_class():
    plane = boundary.plane(*FLAT, expansion=0.0, density=3)
    labels = boundary.label_map(
        lambda x: jnp.log(x[:, 0, 0, :] - 0.1) * jnp.ones((len(x), 3)), plane
    )
    assert set(np.unique(labels)) == {-1, 0}
    with pytest.raises(ValueError, match=r"from 0 \.\.\. 2, got -1 \.\.\. 0 at 3 of 9 points"):
        boundary.region_shares(labels, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: boundary.plane(FLAT[0], FLAT[0], FLAT[1]), "not on a line, got edges of length 0"),
        (lambda: boundary.plane(FLAT[0], FLAT[1], FLAT[1] / 2), "not on a line, got edges of"),
        (lambda: boundary.plane(*FLAT, density=1), "need density >= 2, got density=1"),
        (lambda: boundary.plane(*FLAT, expansion=-1.0), "finite expansion >= 0, got"),
        (lambda: boundary.plane(*FLAT, std=0.0), "need std > 0, got std=0.0"),
        (
            lambda: boundary.plane(*FLAT, std=jnp.ones(3)),
            r"one for each of 1 channels, got shape \(3",
        ),
        (lambda: boundary.plane(FLAT[0], FLAT[1], jnp.ones((3, 2, 1))), "images of one shape"),
        (lambda: boundary.plane(*(x.astype(jnp.uint8) for x in FLAT)), "got dtype uint8"),
        (
            lambda: boundary.label_map(lambda x: x[:, 0], boundary.plane(*FLAT)),
            r"classes int\[1000\] or logits f32\[1000, k\] for 1000 images, got float32",
        ),
        (
            lambda: boundary.label_map(stripes, boundary.plane(*FLAT), batch_size=0),
            "need batch_size >= 1",
        ),
        (
            lambda: jax.jit(
                lambda p: boundary.label_map(lambda x: np.zeros(len(np.array(x)), int), p)
            )(boundary.plane(*FLAT)),
            "a labels_fn that jax can trace inside jit",
        ),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_a_host_callable_may_refuse_tracers_in_its_own_words():
    def labels_fn(x):
        if not isinstance(x, np.ndarray):
            raise TypeError("expected np.ndarray")  # as torch.from_numpy does
        return np.asarray(stripes(x))

    plane = boundary.plane(*FLAT, density=5)
    found = boundary.label_map(labels_fn, plane)
    np.testing.assert_array_equal(found, boundary.label_map(stripes, plane))
    with pytest.raises(TypeError, match="no image will do"):

        def broken(x):
            raise TypeError("no image will do")

        boundary.label_map(broken, plane)
