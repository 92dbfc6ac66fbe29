"""Many planes of one classifier, kept as a few numbers each."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from advjax.boundary import planes, regions
from advjax.boundary.planes import LabelsFn
from advjax.core import checks, classifier, parallel
from advjax.core.typing import Array, Key


class Survey(NamedTuple):
    """What is kept of n planes; every score of Model X-ray is a re-reading of it.

    Attributes:
      shares: share of each class, f32[n, k].
      triple_labels: true classes of the three images, int32[n, 3].
      predicted_labels: classes at the three grid points next to them, int32[n, 3].
      connected_shares: shares of the connected pieces around these points, f32[n, 3].
      triples: which images, int32[n, 3].
    """

    shares: Array
    triple_labels: Array
    predicted_labels: Array
    connected_shares: Array
    triples: Array


# Share of a plane's points that may be without a class.
_MOST_MISSING = 1e-3


class SurveyError(RuntimeError):
    """A classifier on the host that failed halfway, or did not answer with classes.

    Attributes:
      finished: the `Survey` of the planes before it, None if it was the first;
        `survey(..., finished=)` goes on.
    """

    def __init__(self, message: str, finished: Survey | None):
        super().__init__(message)
        self.finished = finished


def sample_triples(key: Key, y: Array, num_planes: int) -> Array:
    """Draws triples of images with three different labels.

    The first image is any, the second any of another class, the third any of a third class. The
    triples depend on the key and the labels alone, so that models are compared on the same planes.

    Args:
      key: a key.
      y: labels, int32[b].
      num_planes: how many triples.

    Returns:
      Places in `y`, int32[num_planes, 3]; an image may serve in several triples.

    Static: num_planes.

    Raises:
      ValueError: fewer than three classes, fewer than one plane.
    """
    checks.at_least("sample_triples", "num_planes", num_planes, 1)
    if checks.is_concrete(y) and len(np.unique(np.asarray(y))) < 3:
        raise ValueError(
            "sample_triples: need clean images of at least three classes, got classes "
            f"{np.unique(np.asarray(y)).tolist()}."
        )
    y = jnp.asarray(y)

    def triple(key):
        chosen, is_free = [], jnp.ones(y.shape, bool)
        for key_image in jax.random.split(key, 3):
            logits = jnp.where(is_free, 0.0, -jnp.inf)
            chosen.append(jax.random.categorical(key_image, logits))
            is_free = is_free & (y != y[chosen[-1]])
        return jnp.stack(chosen)

    return jax.vmap(triple)(jax.random.split(key, num_planes)).astype(jnp.int32)


def survey(
    key: Key,
    labels_fn: LabelsFn,
    x: Array,
    y: Array,
    *,
    num_classes: int,
    num_planes: int = 20,
    density: int = 100,
    expansion: ArrayLike = 5.0,
    std: ArrayLike = 1.0,
    clip: bool = False,
    connected: bool = False,
    batch_size: int = 1000,
    mesh: Mesh | None = None,
    finished: Survey | None = None,
) -> Survey:
    """Reads planes through triples of clean images of different classes.

    Args:
      key: chooses the triples, see `sample_triples`.
      labels_fn: images to classes or logits, see `label_map`.
      x: clean images, f32[b, h, w, c] in [0, 1].
      y: their true labels, int32[b], of at least three classes.
      num_classes: k.
      num_planes: how many planes.
      density: points a side.
      expansion: see `plane`.
      std: see `plane`.
      clip: see `label_map`.
      connected: also measures the connected pieces; without, `connected_shares` are NaN.
      batch_size: points at a time.
      mesh: spreads the planes over its devices; the results are those of one.
      finished: what a `SurveyError` kept, of the same key, images and options: it does not say of
        which density, expansion, std and clip it is.

    Returns:
      A `Survey`; in its shares, points without a class (NaN logits, or other classes) are missing,
      at most 0.1 % of a plane.

    Static: num_classes, num_planes, density, clip, connected, batch_size, mesh.

    Raises:
      ValueError: see `plane`, `label_map` and `sample_triples`; more than 0.1 % of a plane's points
        are without a class.
      SurveyError: for a `labels_fn` on the host that raises an error, or whose answers would be one
        of the above; the planes before are in it.
    """
    checks.images("survey", x)
    checks.four_axes("survey", x)
    checks.labels("survey", y, x)
    checks.at_least("survey", "num_classes", num_classes, 3)
    if checks.is_concrete(y) and np.size(y):
        low, high = np.asarray(y).min(), np.asarray(y).max()  # jnp would trace a constant
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"survey: need labels in 0 ... {num_classes - 1}, got {low} ... {high}."
            )
    is_traceable = planes.is_traceable(labels_fn, jnp.shape(x)[1:])
    if is_traceable:
        labels_fn = parallel.place(classifier.as_pytree(labels_fn), mesh)
    x, y = parallel.place((jnp.asarray(x), jnp.asarray(y)), mesh)
    triples = sample_triples(key, y, num_planes)
    if checks.is_concrete(x, triples):
        # Images that lie on a line are named before any work; inside `map` nothing could be seen.
        for triple in np.asarray(triples):
            planes.plane(*x[triple], expansion=expansion, density=density, std=std)

    options = {
        "num_classes": num_classes, "density": density, "clip": clip, "connected": connected,
        "batch_size": batch_size,
    }  # fmt: skip
    where = (x, y, jnp.asarray(expansion), jnp.asarray(std))
    if not is_traceable:
        if not checks.is_concrete(*where, triples):
            raise ValueError(
                "survey: need a labels_fn that jax can trace inside jit, vmap and the like; this "
                "one needs the values of its images."
            )
        return _on_host(labels_fn, where, np.asarray(triples), options, finished)
    found = _read_planes(labels_fn, where, triples, tuple(options.items()), mesh)
    if checks.is_concrete(found.shares):
        missing = _missing(found.shares)
        if missing.max() > _MOST_MISSING:
            raise ValueError(
                f"survey: need labels_fn to answer with classes 0 ... {num_classes - 1}; on plane "
                f"{missing.argmax()} it did not at {missing.max():.1%} of the points (NaN logits, "
                "or other classes)."
            )
    return found


def _missing(shares: Array) -> np.ndarray:
    """The share of each plane's points that are without a class."""
    return 1 - np.asarray(shares, np.float64).sum(-1)


def _read(
    labels_fn, where, triple, *, num_classes, density, clip, connected, batch_size,
    labels_on=planes.label_map,
) -> Survey:  # fmt: skip
    """One plane, as a survey without the axis of planes."""
    x, y, expansion, std = where
    plane = planes.plane(*x[triple], expansion=expansion, density=density, std=std)
    labels = labels_on(labels_fn, plane, batch_size=batch_size, clip=clip)
    positions = jnp.stack(
        [
            jnp.argmin(jnp.abs(axis[:, None] - plane.corners[:, number]), axis=0)
            for number, axis in enumerate((plane.across, plane.down))
        ],
        axis=-1,
    )
    pieces = regions.connected_shares(labels, positions) if connected else jnp.full(3, jnp.nan)
    predicted = labels[positions[:, 0], positions[:, 1]]
    shares = regions.shares_of(labels, num_classes)
    return Survey(shares, y[triple], predicted, pieces, triple)


@functools.partial(jax.jit, static_argnames=("options", "mesh"))
def _read_planes(labels_fn, where, triples, options, mesh) -> Survey:
    """All planes in one program; compiled here, since models of one architecture share it."""
    read = functools.partial(_read, labels_fn, where, **dict(options))
    if mesh is None:
        return jax.lax.map(read, triples)
    num_planes = len(triples)
    rows = jnp.arange(parallel.padded(num_planes, mesh.size)) % num_planes
    dealt = parallel.place(triples[rows.reshape(-1, mesh.size).T], mesh, axis=0)  # like cards
    found = jax.vmap(lambda part: jax.lax.map(read, part))(dealt)
    return jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[:num_planes],
        parallel.place(found, mesh),
    )


def _on_host(labels_fn, where, triples: np.ndarray, options, finished: Survey | None) -> Survey:
    """The planes one after the other; what was read is kept if the classifier fails."""
    found: list[Survey] = []
    if finished is not None:
        found = [Survey(*parts) for parts in zip(*map(np.asarray, finished), strict=True)]
        if not np.array_equal([one.triples for one in found], triples[: len(found)]):
            raise ValueError("survey: need `finished` of the same key and images, got others.")
        if finished.shares.shape[1] != options["num_classes"]:
            raise ValueError(
                f"survey: need `finished` of num_classes={options['num_classes']}, got one of "
                f"{finished.shares.shape[1]}."
            )
        has_pieces = not np.isnan(finished.connected_shares).all()
        if has_pieces != options["connected"]:
            raise ValueError(
                f"survey: need `finished` of connected={options['connected']}, got one of "
                f"{has_pieces}."
            )

    def stacked() -> Survey | None:
        if not found:
            return None
        return Survey(*(jnp.asarray(np.stack(parts)) for parts in zip(*found, strict=True)))

    def read(triple: np.ndarray) -> Survey:
        one = _read(labels_fn, where, triple, labels_on=planes.label_map_on_host, **options)
        missing = float(_missing(one.shares))
        if missing > _MOST_MISSING:
            raise ValueError(
                f"need classes 0 ... {options['num_classes'] - 1}, got NaN logits or other classes "
                f"at {missing:.1%} of the points"
            )
        return Survey(*map(np.asarray, one))

    for triple in tqdm(triples[len(found) :], desc="planes", leave=False, disable=None):
        try:
            found.append(read(triple))
        except Exception as error:
            raise SurveyError(
                f"survey: labels_fn failed on plane {len(found) + 1} of {len(triples)} "
                f"({type(error).__name__}: {error}); the planes before it are in the error's "
                "`finished`.",
                stacked(),
            ) from error
    result = stacked()
    assert result is not None  # num_planes is at least 1
    return result
