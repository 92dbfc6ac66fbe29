"""How strong the attacks are: the numbers of docs/strength.md, on the reference networks.

    PYTHONPATH=. python benchmarks/strength.py
    PYTHONPATH=. python benchmarks/strength.py --parts=distances
    PYTHONPATH=. python benchmarks/strength.py --num_images=8 --parts=balls      # does it run?

Prints what our attacks leave and, beside it, what official AutoAttack and Foolbox left of the same
images (evasion.json in the folder of the reference networks, `--reference`). One key, 0. About ten
minutes on two CPU cores, most of it AutoAttack and Square.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import numpy as np

import advjax
from advjax import attacks, balls, metrics, models

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
BUDGETS = (
    ("mnist_standard", balls.linf, 0.05),
    ("mnist_standard", balls.l2, 1.0),
    ("mnist_adversarial", balls.linf, 0.2),
    ("mnist_adversarial", balls.l2, 2.0),
)
OFFICIAL = {"auto_attack": "standard_fraction_correct", "apgd": "apgd_ce_fraction_correct"}


def load(folder: pathlib.Path, name: str, num_images: int):
    """The network and the first test images with their labels."""
    with np.load(folder / "mnist_test256.npz") as file:
        x, y = file["x"][..., None].astype(np.float32) / 255, file["y"].astype(np.int32)
    weights = models.from_reference_npz(str(folder / f"{name}.npz"))
    return advjax.bind(models.make("cnn", 10), weights), x[:num_images], y[:num_images]


def print_balls(folder: pathlib.Path, stored: dict, num_images: int) -> None:
    """Shares that stay correct, in percent, beside the official ones."""
    for name, ball, epsilon in BUDGETS:
        logits_fn, x, y = load(folder, name, num_images)
        norm = {"linf": "Linf", "l2": "L2"}[ball.name]
        theirs = stored[name]["autoattack_first128"][f"{norm}@{epsilon}"]
        for attack in ("auto_attack", "apgd", "square"):
            start = time.perf_counter()
            function = getattr(attacks, attack)
            if attack == "auto_attack":  # on the host: each part gets what is left
                x_adv = function(jax.random.key(0), logits_fn, x, y, epsilon, ball=ball)
            else:
                options = {"num_queries": 5000} if attack == "square" else {}
                run = jax.jit(functools.partial(function, ball=ball, **options))
                x_adv = run(jax.random.key(0), logits_fn, x, y, epsilon)
            correct = float(np.mean(metrics.is_correct(logits_fn(x_adv), y)))
            official = ""
            if attack in OFFICIAL:
                official = f", the official one {theirs[OFFICIAL[attack]]:.2%}"
            print(
                f"{name}, {ball.name} {epsilon}: {attack} leaves {correct:.2%}{official} "
                f"({time.perf_counter() - start:.0f} s)", flush=True,
            )  # fmt: skip


def print_distances(folder: pathlib.Path, stored: dict, num_images: int) -> None:
    """L2 distances of the first correct images beside Foolbox's, and the ratio of the medians."""
    carlini_wagner = functools.partial(
        attacks.carlini_wagner_l2, num_steps=200, num_search_steps=5, learning_rate=0.1,
        initial_constant=0.01,
    )  # fmt: skip
    fab = functools.partial(attacks.fab, ball=balls.l2)
    runs = {
        "carlini_wagner_l2": (carlini_wagner, "cw_l2_5x200_lr0.1_c0.01_first64_correct"),
        "ddn": (attacks.ddn, "cw_l2_5x200_lr0.1_c0.01_first64_correct"),
        "fab": (fab, "cw_l2_5x200_lr0.1_c0.01_first64_correct"),
        "fab, 2 restarts": (
            functools.partial(fab, num_restarts=2), "cw_l2_5x200_lr0.1_c0.01_first64_correct"
        ),
        "deepfool": (attacks.deepfool, "deepfool_l2_first64_correct"),
    }  # fmt: skip
    for name in ("mnist_standard", "mnist_adversarial"):
        logits_fn, x, y = load(folder, name, 256)
        first = np.flatnonzero(np.asarray(metrics.is_correct(logits_fn(x), y)))[: num_images // 2]
        for title, (attack, key) in runs.items():
            result = jax.jit(attack)(jax.random.key(0), logits_fn, x[first], y[first])
            ours = {
                "median": float(np.median(result.distance)),
                "mean": float(np.mean(result.distance)),
                "success": float(np.mean(result.success)),
            }
            said = [
                "median {median:.3f}, mean {mean:.3f}, success {success:.1%}".format(**side)
                for side in (ours, stored[name][key])
            ]
            ratio = ours["median"] / stored[name][key]["median"]
            print(f"{name}: {title}: {said[0]}; Foolbox: {said[1]}; ratio {ratio:.3f}", flush=True)


def print_pixels(folder: pathlib.Path, stored: dict, num_images: int) -> None:
    """Images that `one_pixel` breaks with 399 individuals and 20 generations."""
    del stored
    logits_fn, x, y = load(folder, "mnist_standard", 256)
    first = np.flatnonzero(np.asarray(metrics.is_correct(logits_fn(x), y)))[: num_images // 4]
    for num_pixels in (1, 3, 5):
        attack = jax.jit(functools.partial(
            attacks.one_pixel, num_pixels=num_pixels, population=399, generations=20
        ))  # fmt: skip
        broken = [
            int(np.sum(~metrics.is_correct(
                logits_fn(attack(jax.random.key(seed), logits_fn, x[first], y[first])), y[first]
            )))
            for seed in (0, 1)
        ]  # fmt: skip
        print(f"one_pixel, {num_pixels} pixels: {broken} of {len(first)} (two keys)", flush=True)


PARTS = {"balls": print_balls, "distances": print_distances, "pixels": print_pixels}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="with commas")
    add("--num_images", type=int, default=128, help="half for distances, a quarter for pixels")
    add("--reference", type=pathlib.Path, default=REPOSITORY.parent / "shared" / "reference")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"argument --parts: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if not 4 <= args.num_images <= 256:
        parser.error(f"argument --num_images: need 4 to 256, got {args.num_images}")
    if not (args.reference / "evasion.json").is_file():
        parser.error(f"argument --reference: {args.reference} has no evasion.json")
    stored = json.loads((args.reference / "evasion.json").read_text())
    for part in parts:
        PARTS[part](args.reference, stored, args.num_images)


if __name__ == "__main__":
    main()
