"""Decision boundaries, read from hard labels on planes through images."""

from advjax.boundary.planes import LabelsFn, Plane, label_map, on_plane, plane
from advjax.boundary.regions import (
    components,
    connected_shares,
    fragmentation,
    region_shares,
    renyi_entropy,
    reproducibility,
    triple_area,
)
from advjax.boundary.surveys import Survey, SurveyError, sample_triples, survey

__all__ = [
    "LabelsFn",
    "Plane",
    "Survey",
    "SurveyError",
    "components",
    "connected_shares",
    "fragmentation",
    "label_map",
    "on_plane",
    "plane",
    "region_shares",
    "renyi_entropy",
    "reproducibility",
    "sample_triples",
    "survey",
    "triple_area",
]
