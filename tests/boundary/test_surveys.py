"""Many planes: the triples, chunks, devices, models on the host that fail halfway."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax
from advjax import boundary, detectors, models, parallel

label_map = jax.jit(boundary.label_map)
connected_shares = jax.jit(boundary.connected_shares)


@pytest.fixture(scope="module")
def setting():
    """A network with labels of five classes, and the options of a small survey."""
    x = jax.random.uniform(jax.random.key(0), (12, 8, 8, 1))
    y = jnp.arange(12) % 5
    net = models.make("mlp", 5, hidden=(8,))
    options = {"num_classes": 5, "num_planes": 5, "density": 11}
    return advjax.bind(net, net.init(jax.random.key(1), x)), x, y, options


def test_triples_have_three_classes():
    y = jnp.array([0, 0, 0, 0, 1, 2, 2])
    triples = np.asarray(boundary.sample_triples(jax.random.key(0), y, 200))
    assert all(len(set(np.asarray(y)[triple])) == 3 for triple in triples)
    assert len(np.unique(triples)) == len(y)  # every image is drawn
    again = boundary.sample_triples(jax.random.key(0), y, 200)
    np.testing.assert_array_equal(triples, again)
    with pytest.raises(ValueError, match=r"at least three classes, got classes \[0, 1\]"):
        boundary.sample_triples(jax.random.key(0), jnp.array([0, 1, 1]), 2)


def test_a_survey_is_its_planes(setting):
    logits_fn, x, y, options = setting
    found = boundary.survey(jax.random.key(2), logits_fn, x, y, connected=True, **options)
    for number, triple in enumerate(np.asarray(found.triples)):
        plane = boundary.plane(*x[triple], density=11)
        labels = label_map(logits_fn, plane)
        np.testing.assert_allclose(found.shares[number], boundary.region_shares(labels, 5))
        np.testing.assert_array_equal(found.triple_labels[number], y[triple])
        rows = [int(np.abs(plane.across - c[0]).argmin()) for c in plane.corners]
        columns = [int(np.abs(plane.down - c[1]).argmin()) for c in plane.corners]
        predicted = np.asarray(labels)[rows, columns]
        np.testing.assert_array_equal(found.predicted_labels[number], predicted)
        pieces = connected_shares(labels, jnp.array([rows, columns]).T)
        np.testing.assert_allclose(found.connected_shares[number], pieces)
    own = jnp.take_along_axis(found.shares, found.predicted_labels, 1)
    assert np.all(np.asarray(found.connected_shares) <= np.asarray(own) + 1e-6)


@pytest.mark.parametrize("statistic", detectors.planes.STATISTICS)
@pytest.mark.parametrize("own", detectors.planes.OWN)
def test_model_xray_reads_its_survey(setting, statistic, own):
    logits_fn, x, y, options = setting
    detect = functools.partial(detectors.model_xray, statistic=statistic, own=own, **options)
    key = jax.random.key(2)
    said = jax.jit(detect)(key, logits_fn, x, y)
    details = said.details
    shares = np.asarray(details["shares"], np.float64)
    entropy = np.log((shares**10).sum(1)) / -9
    np.testing.assert_allclose(details["entropy"], entropy, rtol=1e-4)
    areas = {
        "true": np.take_along_axis(shares, np.asarray(details["triple_labels"]), 1),
        "predicted": np.take_along_axis(shares, np.asarray(details["predicted_labels"]), 1),
        "connected": np.asarray(details["connected_shares"]),
    }[own]
    area = np.where(areas < 0.5, areas, 0).sum(1)
    np.testing.assert_allclose(details["area"], area, atol=1e-6)
    score = -(entropy if statistic == "entropy" else area).mean()
    np.testing.assert_allclose(said.score, score, rtol=1e-4, atol=1e-6)
    assert int(said.target_label) == shares.mean(0).argmax()


def test_a_reading_that_the_survey_cannot_give(setting):
    logits_fn, x, y, options = setting
    found = boundary.survey(jax.random.key(2), logits_fn, x, y, **options)
    for change, message in (
        ({"statistic": "renyi"}, "read_survey: unknown statistic 'renyi'; known: entropy, area"),
        ({"own": "pred"}, "read_survey: unknown own 'pred'; known: true, predicted, connected"),
        ({"own": "connected"}, 'need a survey with connected=True for own="connected"'),
    ):
        with pytest.raises(ValueError, match=message):
            detectors.read_survey(found, **{"statistic": "area", **change})


def test_neither_chunks_nor_devices_matter(setting):
    logits_fn, x, y, options = setting
    key = jax.random.key(2)
    expected = boundary.survey(key, logits_fn, x, y, **options)
    mesh = parallel.make_mesh(devices=jax.devices()[:4])  # five planes do not divide by four
    host = lambda x: np.array(logits_fn(np.array(x)))
    for labels_fn, extra in (
        (logits_fn, {"batch_size": 13}), (logits_fn, {"mesh": mesh}), (host, {"batch_size": 30}),
    ):  # fmt: skip
        found = boundary.survey(key, labels_fn, x, y, **options, **extra)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_a_failing_host_model_leaves_is_kept(setting):
    logits_fn, x, y, options = setting
    key, calls = jax.random.key(2), []

    def api(x, last=None):
        x = np.array(x)  # what jax tries to trace ends here
        calls.append(len(x))
        if last is not None and len(calls) > last:
            raise TimeoutError("no answer")
        return np.array(logits_fn(x))

    with pytest.raises(
        boundary.SurveyError, match=r"on plane 3 of 5 \(TimeoutError: no answer\)"
    ) as failed:
        boundary.survey(key, functools.partial(api, last=2), x, y, **options)
    finished = failed.value.finished
    assert finished.shares.shape == (2, 5)
    calls.clear()
    found = boundary.survey(key, api, x, y, finished=finished, **options)
    assert len(calls) == 3  # one call a plane of 121 points
    expected = boundary.survey(key, logits_fn, x, y, **options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match="of the same key and images"):
        boundary.survey(jax.random.key(3), api, x, y, finished=finished, **options)
    with pytest.raises(ValueError, match="`finished` of num_classes=6, got one of 5"):
        boundary.survey(key, api, x, y, finished=finished, **options | {"num_classes": 6})
    with pytest.raises(ValueError, match="`finished` of connected=True, got one of False"):
        boundary.survey(key, api, x, y, finished=finished, **options | {"connected": True})
    with pytest.raises(boundary.SurveyError, match="plane 1 of 5") as failed:
        calls.clear()
        boundary.survey(key, functools.partial(api, last=0), x, y, **options)
    assert failed.value.finished is None


def spoilt(logits_fn, x, options, triple, where):
    """The classifier with NaN logits at some points of one plane: traceable, and on the host."""
    plane = boundary.plane(*x[triple], density=options["density"])
    points = plane.at(plane.across[where[0]], plane.down[where[1]])

    def traceable(x):
        away = jnp.abs(x[:, None] - points).max(axis=(2, 3, 4)).min(axis=1)
        return jnp.where(away[:, None] < 1e-3, jnp.nan, logits_fn(x))

    return traceable, lambda x: np.array(traceable(np.array(x)))


def test_a_few_points_without_a_class_are_left_out_on_the_host_too(setting):
    logits_fn, x, y, options = setting
    options, key = options | {"num_planes": 3, "density": 45}, jax.random.key(2)
    triples = np.asarray(boundary.sample_triples(key, y, 3))
    plane = boundary.plane(*x[triples[2]], density=45)
    corner = [jnp.abs(axis).argmin() for axis in (plane.across, plane.down)]  # of the first image
    where = (jnp.array([corner[0], 7]), jnp.array([corner[1], 9]))  # 2 points of 2025
    traceable, host = spoilt(logits_fn, x, options, triples[2], where)
    expected = boundary.survey(key, traceable, x, y, **options)
    found = boundary.survey(key, host, x, y, **options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    sums = np.asarray(found.shares, np.float64).sum(-1)
    np.testing.assert_allclose(sums, [1, 1, 1 - 2 / 2025], atol=1e-6)
    assert found.predicted_labels[2, 0] == -1
    # An image whose own point is without a class has no area.
    said = detectors.read_survey(found, statistic="area", own="predicted", limit=2.0)
    own = np.asarray(found.shares)[2][np.asarray(found.predicted_labels)[2, 1:]]
    np.testing.assert_allclose(said.details["area"][2], own.sum(), rtol=1e-5)


def test_wrong_answers_on_the_host_keep_the_planes_before(setting):
    logits_fn, x, y, options = setting
    key = jax.random.key(2)
    triples = np.asarray(boundary.sample_triples(key, y, 5))
    where = (jnp.array([4]), jnp.array([7]))  # 1 point of 121
    traceable, host = spoilt(logits_fn, x, options, triples[2], where)
    with pytest.raises(ValueError, match=r"on plane 2 it did not at 0\.8% of the points"):
        boundary.survey(key, traceable, x, y, **options)
    with pytest.raises(
        boundary.SurveyError, match=r"on plane 3 of 5 .* or other classes at 0\.8% of the points"
    ) as failed:
        boundary.survey(key, host, x, y, **options)
    finished = failed.value.finished
    assert finished.shares.shape == (2, 5)
    good = lambda x: np.array(logits_fn(np.array(x)))
    found = boundary.survey(key, good, x, y, finished=finished, **options)
    expected = boundary.survey(key, logits_fn, x, y, **options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    calls = []

    def shorter(x):
        x = np.array(x)
        calls.append(len(x))
        return np.array(logits_fn(x))[: len(x) - (len(calls) == 2)]

    with pytest.raises(boundary.SurveyError, match=r"plane 2 of 5 .*for 121 images") as failed:
        boundary.survey(key, shorter, x, y, **options)
    assert failed.value.finished.shares.shape == (1, 5)
    with pytest.raises(ValueError, match="survey: need a labels_fn that jax can trace inside jit"):
        jax.jit(lambda x: boundary.survey(key, good, x, y, **options))(x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_classes": 2}, "need num_classes >= 3, got num_classes=2"),
        ({"num_classes": 4}, r"labels in 0 \.\.\. 3, got 0 \.\.\. 4"),
        ({"num_planes": 0}, "need num_planes >= 1"),
        ({"density": 1}, "need density >= 2"),
        ({"x": np.zeros((12, 8, 8, 1), np.uint8)}, "got dtype uint8"),
        ({"x": np.full((12, 8, 8, 1), 0.5, np.float32)}, "not on a line"),
        (
            {"logits_fn": lambda x: jnp.full((len(x), 5), jnp.nan)},
            "did not at 100.0% of the points",
        ),
        ({"logits_fn": lambda x: jnp.full(len(x), 7)}, "did not at 100.0% of the points"),
        ({"statistic": "width"}, "unknown statistic 'width'; known: entropy, area"),
        ({"own": "all"}, "unknown own 'all'; known: true, predicted, connected"),
    ],
)
def test_errors(setting, change, message):
    logits_fn, x, y, options = setting
    arguments = {"logits_fn": logits_fn, "x": x, "y": y, **options, **change}
    with pytest.raises(ValueError, match=message):
        detectors.model_xray(jax.random.key(0), **arguments)
