"""How much an attack harmed: the accuracy without it against the accuracy under it."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core import checks
from advjax.core.typing import Array
from advjax.federated.simulation import History


def _accuracy(caller: str, run: History | ArrayLike, at: str) -> Array:
    """The best or the last accuracy of a run, or of each run; a number stands for itself."""
    checks.known(caller, "at", at, ("best", "final"))
    accuracy = jnp.asarray(run.accuracy if isinstance(run, History) else run)
    if accuracy.ndim == 0:
        return accuracy
    return jnp.max(accuracy, axis=-1) if at == "best" else accuracy[..., -1]


def attack_impact(
    clean: History | ArrayLike,
    attacked: History | ArrayLike,
    *,
    at: str = "best",
    relative: bool = True,
) -> Array:
    """The share of the accuracy that an attack takes, phi = 100 (acc - acc_attacked) / acc.

    Args:
      clean: the run without the attack, under the same rule: a `History`, accuracies
        f32[..., rounds], or one accuracy.
      attacked: the run under attack.
      at: "best" compares the best accuracies over the rounds, "final" the last.
      relative: divide by the accuracy without the attack, as Zhang et al. do; otherwise the drop
        itself in points, as Shejwalkar and Houmansadr have it.

    Returns:
      f32[...], in percent; negative where the attack helped.

    Static: at, relative.

    Example:
      >>> from advjax import federated
      >>> float(federated.attack_impact([0.5, 0.8], [0.5, 0.2]))
      37.5
      >>> round(float(federated.attack_impact([0.5, 0.8], [0.5, 0.2], at="final")), 3)
      75.0

    Source: H. Zhang, Z. Yao, L. Y. Zhang, S. Hu, C. Chen, A. Liew, Z. Li, "Denial-of-Service or
    Fine-Grained Control: Towards Flexible Model Poisoning Attacks on Federated Learning", IJCAI
    2023; V. Shejwalkar, A. Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning
    Attacks and Defenses for Federated Learning", NDSS 2021.
    """
    before = _accuracy("attack_impact", clean, at)
    drop = before - _accuracy("attack_impact", attacked, at)
    return 100 * (drop / before if relative else drop)


def attack_deviation(
    clean: History | ArrayLike,
    attacked: History | ArrayLike,
    target_drop: ArrayLike,
    *,
    at: str = "best",
) -> Array:
    """How far the drop of the accuracy is from what the attacker wanted, in points.

    |xi - 100 (acc - acc_attacked)|.

    Args:
      clean: the run without the attack: a `History`, accuracies f32[..., rounds], or one accuracy.
      attacked: the run under attack.
      target_drop: the drop that the attacker wanted, xi, in points of accuracy.
      at: "best" or "final", as for `attack_impact`.

    Returns:
      f32[...].

    Static: at.

    Source: Zhang et al., IJCAI 2023, as for `attack_impact`.
    """
    before = _accuracy("attack_deviation", clean, at)
    drop = 100 * (before - _accuracy("attack_deviation", attacked, at))
    return jnp.abs(target_drop - drop)
