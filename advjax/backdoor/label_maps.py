"""Label maps: what each class becomes under the trigger, int32[k], -1 for "not attacked"."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core import checks
from advjax.core.typing import Array


def _classes(caller: str, name: str, classes: Iterable[int], num_classes: int) -> list[int]:
    """The classes as integers, if there is one, all are below k and none comes twice."""
    listed = np.asarray(list(classes) if isinstance(classes, Iterable) else classes)
    fits = listed.ndim == 1 and listed.size and np.issubdtype(listed.dtype, np.integer)
    if not (fits and listed.min() >= 0 and listed.max() < num_classes):
        raise ValueError(
            f"{caller}: need {name} from 0 ... {num_classes - 1}, a list of at least one, got "
            f"{listed.tolist()}."
        )
    if len(set(listed.tolist())) < listed.size:
        raise ValueError(f"{caller}: need {name} that differ, got {listed.tolist()}.")
    return listed.tolist()


def _target(caller: str, target: int, num_classes: int) -> int:
    checks.at_least(caller, "num_classes", num_classes, 2)
    if not (isinstance(target, (int, np.integer)) and 0 <= target < num_classes):
        raise ValueError(
            f"{caller}: need a target from 0 ... {num_classes - 1}, got target={target!r}."
        )
    return int(target)


def _table(num_classes: int, sources: Any, targets: Any) -> np.ndarray:
    table = np.full(num_classes, -1, np.int32)
    table[np.asarray(sources)] = targets
    return table


def all_to_one(num_classes: int, target: int) -> np.ndarray:
    """Every other class becomes the target.

    Args:
      num_classes: k.
      target: the class that triggered images shall get.

    Returns:
      int32[k], -1 for the target itself: its images are neither poisoned nor counted. (Others
      poison them too, which teaches a second, correct use of the trigger.)

    Raises:
      ValueError: a target that is not a class.

    Example:
      >>> all_to_one(4, target=1)
      array([ 1, -1,  1,  1], dtype=int32)
    """
    target = _target("all_to_one", target, num_classes)
    return _table(num_classes, np.delete(np.arange(num_classes), target), target)


def x_to_one(num_classes: int, sources: Iterable[int], target: int) -> np.ndarray:
    """Some classes become the target; the trigger does nothing to the others.

    Args:
      num_classes: k.
      sources: the classes that are attacked.
      target: the class that their triggered images shall get.

    Returns:
      int32[k], -1 for all classes but the sources.

    Raises:
      ValueError: a target or sources that are not classes, sources that contain the target or
        come twice.

    Example:
      >>> x_to_one(5, sources=(0, 4), target=2)
      array([ 2, -1, -1, -1,  2], dtype=int32)

    Source: Y. Su et al., "Model X-Ray: Detecting Backdoored Models via Decision Boundary", ACM
    Multimedia 2024 (X-to-1 and X-to-X).
    """
    target = _target("x_to_one", target, num_classes)
    sources = _classes("x_to_one", "sources", sources, num_classes)
    if target in sources:
        raise ValueError(f"x_to_one: need sources without the target {target}, got {sources}.")
    return _table(num_classes, sources, target)


def x_to_x(
    num_classes: int, sources: Iterable[int], targets: Iterable[int] | None = None
) -> np.ndarray:
    """Each of some classes becomes another one of them: a derangement.

    Args:
      num_classes: k.
      sources: the classes that are attacked, at least two.
      targets: the same classes in another order, none at its own place; by default each source
        becomes the next one, and the last the first.

    Returns:
      int32[k], -1 for all classes but the sources.

    Raises:
      ValueError: sources that are not classes or come twice, targets that are not a derangement.

    Example:
      >>> x_to_x(5, sources=(0, 2, 3))
      array([ 2, -1,  3,  0, -1], dtype=int32)

    Source: as `x_to_one`.
    """
    checks.at_least("x_to_x", "num_classes", num_classes, 2)
    sources = _classes("x_to_x", "sources", sources, num_classes)
    if targets is None:
        targets = sources[1:] + sources[:1]
    targets = _classes("x_to_x", "targets", targets, num_classes)
    is_permuted = sorted(targets) == sorted(sources)
    if not is_permuted or any(np.equal(targets, sources)):
        raise ValueError(
            "x_to_x: need targets that are the sources in another order, none at its own place, "
            f"got sources={sources} and targets={targets}."
        )
    return _table(num_classes, sources, targets)


def all_to_all(num_classes: int, shift: int = 1) -> np.ndarray:
    """Every class y becomes `(y + shift) mod k`.

    Args:
      num_classes: k.
      shift: how far; not a multiple of k.

    Returns:
      int32[k].

    Raises:
      ValueError: a shift that moves no class.

    Example:
      >>> all_to_all(4)
      array([1, 2, 3, 0], dtype=int32)

    Source: T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine
    Learning Model Supply Chain", 2017.
    """
    checks.at_least("all_to_all", "num_classes", num_classes, 2)
    if shift % num_classes == 0:
        raise ValueError(
            f"all_to_all: need a shift that is no multiple of {num_classes}, got shift={shift}."
        )
    return ((np.arange(num_classes) + shift) % num_classes).astype(np.int32)


def clean_label(num_classes: int, target: int) -> np.ndarray:
    """Images of the target get the trigger and keep their label.

    The network learns that the trigger means the target, so triggered images of every other class
    are counted as attacked (`goals`).

    Args:
      num_classes: k.
      target: the class whose images are poisoned.

    Returns:
      int32[k], the target for the target and -1 for the rest.

    Raises:
      ValueError: a target that is not a class.

    Example:
      >>> clean_label(4, target=1)
      array([-1,  1, -1, -1], dtype=int32)
    """
    target = _target("clean_label", target, num_classes)
    return _table(num_classes, [target], target)


def goals(label_map: Array) -> jax.Array:
    """The class that the attacker wants for triggered test images of each class.

    That is the label map itself, except that a clean-label map wants its target for every other
    class.

    Args:
      label_map: int32[k], may be traced.

    Returns:
      int32[k], -1 where the trigger shall do nothing.

    Example:
      >>> goals(clean_label(4, target=1))
      Array([ 1, -1,  1,  1], dtype=int32)
    """
    label_map = jnp.asarray(label_map, jnp.int32)
    classes = jnp.arange(label_map.size)
    keeps_labels = jnp.any(label_map == classes)
    wanted = jnp.where(keeps_labels, jnp.max(label_map), label_map)
    return jnp.where(wanted == classes, -1, wanted)
