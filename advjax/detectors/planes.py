"""Model X-ray: a backdoor shows in the decision boundary, read from hard labels alone."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from advjax import boundary
from advjax.boundary import LabelsFn, Survey
from advjax.boundary.regions import counted_area
from advjax.core import checks
from advjax.core.typing import Array, Key
from advjax.detectors.detections import Detection

STATISTICS = ("entropy", "area")
OWN = ("true", "predicted", "connected")


def model_xray(
    key: Key,
    logits_fn: LabelsFn,
    x: Array,
    y: Array,
    *,
    num_classes: int,
    statistic: str = "entropy",
    order: ArrayLike = 10.0,
    limit: ArrayLike = 0.5,
    own: str = "true",
    num_planes: int = 20,
    density: int = 100,
    expansion: ArrayLike = 5.0,
    std: ArrayLike = 1.0,
    clip: bool = False,
    batch_size: int = 1000,
    mesh: Mesh | None = None,
    finished: Survey | None = None,
) -> Detection:
    """Model X-ray: on planes through clean images a backdoor's target crowds out the others.

    The statistic is the mean over planes of the Renyi entropy of the class shares (RE), or of the
    area of the three images' own classes (ATS). Both fall where the target spreads, so the score is
    its negative. The target label is the class of the largest mean share.

    Args:
      key: chooses the triples; one key for all models puts all on the same planes.
      logits_fn: images to classes, or to logits, of which only the largest counts; each image by
        itself, whatever its place in the batch; also a callable on the host, see
        `boundary.label_map`.
      x: clean images, f32[b, h, w, c] in [0, 1]; 60 in the paper.
      y: their labels, int32[b], of at least three classes.
      num_classes: k.
      statistic: "entropy" (RE) or "area" (ATS).
      order: of the Renyi entropy.
      limit: a class that fills this share of a plane does not count for ATS.
      own: what of the plane is an image's own: the region of its "true" label, of the "predicted"
        one (none where that is no class), or the "connected" piece around it.
      num_planes: planes.
      density: points a side of each.
      expansion: how far planes reach beyond their images, see `boundary.plane`.
      std: the space in which planes are orthonormal, see `boundary.plane`.
      clip: clips points to [0, 1]; not the published method.
      batch_size: points at a time.
      mesh: spreads the planes over its devices.
      finished: planes that a `boundary.SurveyError` kept.

    Returns:
      A `Detection`; its details are the `Survey`'s fields and, by plane, "entropy" and "area"
      f32[n], and "num_images", how many images the planes go through.

    Static: num_classes, statistic, own, num_planes, density, clip, batch_size, mesh.

    Raises:
      ValueError: an unknown statistic or own, and as `boundary.survey`.
      boundary.SurveyError: a host callable failed, or gave NaN logits or other classes at more than
        0.1 % of a plane's points; the finished planes are in it.

    Source: Su et al., "Model X-ray: Detecting Backdoored Models via Decision Boundary", ACM MM
    2024.
    """
    checks.known("model_xray", "statistic", statistic, STATISTICS)
    checks.known("model_xray", "own", own, OWN)
    survey = functools.partial(
        boundary.survey, num_classes=num_classes, num_planes=num_planes, density=density,
        expansion=expansion, std=std, clip=clip, connected=own == "connected",
        batch_size=batch_size, mesh=mesh, finished=finished,
    )  # fmt: skip
    found = survey(key, logits_fn, x, y)
    said = read_survey(found, statistic=statistic, order=order, limit=limit, own=own)
    is_used = jnp.zeros(len(x), jnp.int32).at[found.triples.ravel()].set(1)
    return said._replace(details={**said.details, "num_images": jnp.sum(is_used)})


def read_survey(
    found: Survey,
    *,
    statistic: str = "entropy",
    order: ArrayLike = 10.0,
    limit: ArrayLike = 0.5,
    own: str = "true",
) -> Detection:
    """What `model_xray` says, from planes that were read before: for ablations.

    Args:
      found: what `boundary.survey` returned.
      statistic: see `model_xray`.
      order: see `model_xray`.
      limit: see `model_xray`.
      own: see `model_xray`; "connected" needs a survey with `connected=True`.

    Returns:
      A `Detection`.

    Static: statistic, own.

    Raises:
      ValueError: an unknown statistic or own, own="connected" of a survey that did not measure it,
        and as `boundary.renyi_entropy` and `boundary.triple_area`.
    """
    checks.known("read_survey", "statistic", statistic, STATISTICS)
    checks.known("read_survey", "own", own, OWN)
    checks.non_negative("read_survey", "limit", limit)
    shares = jnp.asarray(found.shares)
    entropy = boundary.renyi_entropy(shares, order)
    if own == "connected":
        pieces = found.connected_shares
        if checks.is_concrete(pieces) and np.isnan(pieces).any():
            raise ValueError(
                'read_survey: need a survey with connected=True for own="connected", got one whose '
                "connected shares are NaN."
            )
        area = counted_area(jnp.asarray(pieces), limit)
    elif own == "true":
        area = boundary.triple_area(shares, found.triple_labels, limit)
    else:
        labels = jnp.asarray(found.predicted_labels)
        is_class = (labels >= 0) & (labels < shares.shape[-1])  # it is none where logits are NaN
        areas = jnp.take_along_axis(shares, jnp.where(is_class, labels, 0), axis=-1)
        area = counted_area(jnp.where(is_class, areas, 0), limit)
    score = -jnp.mean(entropy if statistic == "entropy" else area)
    target = jnp.argmax(jnp.mean(shares, axis=0)).astype(jnp.int32)
    return Detection(score, target, {**found._asdict(), "entropy": entropy, "area": area})
