"""Why adversarial examples are universal: laws of the adversarial error, on many networks."""

from advjax.universality.errors import AdversarialError, adversarial_error
from advjax.universality.gaps import LogitGaps, logit_gaps, random_logits
from advjax.universality.laws import PowerLaw, fit_power_law
from advjax.universality.networks import PaddedNetwork
from advjax.universality.populations import (
    Architectures,
    group_architectures,
    sample_architectures,
    train_architectures,
)
from advjax.universality.responses import (
    LinearResponse,
    MeanField,
    explained_variance,
    linear_response,
    mean_field,
)
from advjax.universality.searches import Correlations, Search, architecture_search, correlations

__all__ = [
    "AdversarialError",
    "Architectures",
    "Correlations",
    "LinearResponse",
    "LogitGaps",
    "MeanField",
    "PaddedNetwork",
    "PowerLaw",
    "Search",
    "adversarial_error",
    "architecture_search",
    "correlations",
    "explained_variance",
    "fit_power_law",
    "group_architectures",
    "linear_response",
    "logit_gaps",
    "mean_field",
    "random_logits",
    "sample_architectures",
    "train_architectures",
]
