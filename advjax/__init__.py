"""advjax: adversarial robustness in JAX.

Attacks on image classifiers and defences for them: at test time, in federated training, and in
trained models that may carry a backdoor. Every attack is a pure function of arrays and a PRNG key,
so a study is one compiled program.

The submodules are loaded when they are first used, so that `import advjax` costs little more than
`import jax`::

    import advjax
    from advjax import attacks, data, evaluation, models, training
"""

import importlib
from typing import TYPE_CHECKING, Any

import jax as _jax

from advjax.core.memory import keep_large_buffers as _keep_large_buffers

__version__ = "0.1.0"

_keep_large_buffers()

_MODULES = {
    "aggregation": "advjax.aggregation",
    "attacks": "advjax.attacks",
    "backdoor": "advjax.backdoor",
    "balls": "advjax.core.balls",
    "boundary": "advjax.boundary",
    "data": "advjax.data",
    "defenses": "advjax.defenses",
    "detectors": "advjax.detectors",
    "evaluation": "advjax.evaluation",
    "federated": "advjax.federated",
    "losses": "advjax.core.losses",
    "metrics": "advjax.core.metrics",
    "models": "advjax.models",
    "parallel": "advjax.core.parallel",
    "poisoning": "advjax.poisoning",
    "traits": "advjax.core.traits",
    "training": "advjax.training",
    "universality": "advjax.universality",
}
_NAMES = {
    "Randomised": ("advjax.core.classifier", "Randomised"),
    "bind": ("advjax.core.classifier", "bind"),
    "stack": ("advjax.core.classifier", "stack"),
}

__all__ = ["__version__", *sorted([*_MODULES, *_NAMES])]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from advjax import (
        aggregation,
        attacks,
        backdoor,
        boundary,
        data,
        defenses,
        detectors,
        evaluation,
        federated,
        models,
        poisoning,
        training,
        universality,
    )
    from advjax.core import balls, losses, metrics, parallel, traits
    from advjax.core.classifier import Randomised, bind, stack


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'advjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
