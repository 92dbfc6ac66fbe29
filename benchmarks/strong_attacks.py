"""advjax against the fastest correct peer in the strong attacks: CW, DeepFool, AutoAttack, pixels.

    PYTHONPATH=. python benchmarks/strong_attacks.py                     # everything
    PYTHONPATH=. python benchmarks/strong_attacks.py --rows=cw,deepfool  # some of it
    PYTHONPATH=. python benchmarks/strong_attacks.py --smoke             # does it run?

Prints a table and writes benchmarks/results/strong_attacks_cpu.{md,csv,json}. What is timed, and
which peers count as correct, is in benchmarks/README.md. A peer that is not installed is left out.

Cost of the defaults: about ten minutes on two idle CPU cores.
"""

import argparse
import datetime
import functools
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

# At the end of the path: a competitor's process starts without this folder.
sys.path.append(str(pathlib.Path(__file__).resolve().parent))
import evasion as common

PEERS = ("foolbox", "torchattacks", "art", "autoattack")

# The constants of a binary search that starts at 0.01 and never succeeds, for who has no search.
_FIXED_CONSTANTS = (0.01, 0.1, 1.0, 10.0, 100.0)
# ART's: 400 individuals over three parameters, in whole numbers of each.
_POPULATION = 399


class Row(NamedTuple):
    """A task that every competitor does.

    Attributes:
      title: what it is.
      bar: least ratio of the fastest correct peer's wall time to ours, from the project's plan.
      num_images: the first correctly classified test images.
      options: of the attack.
      smoke: options that make it short.
      is_nearest: whether the attack has no budget, so that distances are compared too.
      is_long: one counted run, whatever `--repeats` says.
    """

    title: str
    bar: float
    num_images: int
    options: dict[str, Any]
    smoke: dict[str, Any]
    is_nearest: bool = False
    is_long: bool = False


ROWS = {
    "cw": Row(
        "CW-L2, 5 constants x 100", 1.5, 64, {"num_constants": 5, "num_steps": 100},
        {"num_constants": 2, "num_steps": 5}, is_nearest=True,
    ),
    "deepfool": Row("DeepFool", 2.0, 64, {"num_steps": 50}, {"num_steps": 5}, is_nearest=True),
    "apgd": Row(
        "APGD-CE, 100 steps", 1.4, 512, {"epsilon": 0.15, "num_steps": 100}, {"num_steps": 5}
    ),
    "autoattack": Row(
        "AutoAttack standard", 3.0, 128,
        {"epsilon": 0.05, "num_steps": 100, "num_queries": 5000},
        {"num_steps": 3, "num_queries": 20}, is_long=True,
    ),
    "square": Row(
        "Square, 5,000 queries", 2.0, 128, {"epsilon": 0.05, "num_queries": 5000},
        {"num_queries": 50}, is_long=True,
    ),
    "one_pixel": Row("One pixel, 399 x 11 queries", 10.0, 8, {"generations": 10},
                     {"generations": 1}),
}  # fmt: skip


# ------------------------------------------------------------------------ a competitor's process


class Competitor(NamedTuple):
    """One library, ready to attack.

    Attributes:
      logits: `() -> [n, k]` on all clean images.
      prepare: `number -> (x, y)`, the first images as the library takes them.
      attacks: by row, `(x, y, **options) -> x_adv`, computed when it returns.
      outcome: `(x_adv, number) -> (answers int[n], x_adv f32[n, h, w, c])`, in NumPy.
      about: facts for the report.
    """

    logits: Any
    prepare: Any
    attacks: dict[str, Any]
    outcome: Any
    about: dict


def build_advjax(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import jax

    import advjax
    from advjax import attacks, models, parallel

    parallel.use_cores(setup["threads"])
    mesh = parallel.make_mesh()
    key = jax.random.key(0)
    logits_fn = advjax.bind(models.make("cnn", 10), models.from_reference_npz(weights))
    placed_key, placed_fn = parallel.place((key, logits_fn), mesh)

    @functools.cache
    def compiled(attack, **options):
        return jax.jit(functools.partial(attack, **options))

    def run(attack, x, y, *epsilon, **options):
        x, y = parallel.place((x, y), mesh, axis=0)
        made = compiled(attack, **options)(placed_key, placed_fn, x, y, *epsilon)
        return jax.block_until_ready(made)

    def deepfool(x, y, num_steps):
        # On one device: its queue of open images would run across the devices at every turn.
        attack = compiled(attacks.deepfool, num_steps=num_steps, num_candidates=10)
        return jax.block_until_ready(attack(key, logits_fn, x, y)).x_adv

    def cw(x, y, num_constants, num_steps):
        return run(
            attacks.carlini_wagner_l2, x, y, num_steps=num_steps, num_search_steps=num_constants,
            learning_rate=0.1, initial_constant=0.01,
        ).x_adv  # fmt: skip

    def autoattack(x, y, epsilon, **options):
        # Called eagerly: it compiles its parts itself, and only survivors go on.
        made = attacks.auto_attack(key, logits_fn, x, y, epsilon, mesh=mesh, **options)
        return jax.block_until_ready(made)

    answer = jax.jit(lambda logits_fn, x: logits_fn(x))
    known = {
        "cw": cw,
        "deepfool": deepfool,
        "apgd": lambda x, y, epsilon, **o: run(attacks.apgd, x, y, epsilon, **o),
        "autoattack": autoattack,
        "square": lambda x, y, epsilon, **o: run(attacks.square, x, y, epsilon, **o),
        "one_pixel": lambda x, y, **o: run(attacks.one_pixel, x, y, population=_POPULATION, **o),
    }
    return Competitor(
        logits=lambda: np.asarray(answer(logits_fn, x)),
        prepare=lambda number: (x[:number], y[:number]),
        attacks=known,
        outcome=lambda x_adv, number: (
            np.asarray(answer(logits_fn, np.asarray(x_adv))).argmax(-1), np.asarray(x_adv)
        ),
        about={"rows": list(known), "backend": jax.default_backend()},
    )  # fmt: skip


def _torch_competitor(net, x, y, known: dict) -> Competitor:
    """The competitor whose attacks take and return torch tensors or NumPy arrays in C, H, W."""
    import torch

    def outcome(x_adv, number):
        x_adv = torch.as_tensor(x_adv).detach()
        answers = common._torch_logits(net, x_adv).argmax(-1).numpy()
        return answers, x_adv.numpy().transpose(0, 2, 3, 1)

    return Competitor(
        logits=lambda: common._torch_logits(net, x).numpy(),
        prepare=lambda number: (x[:number], y[:number]),
        attacks=known,
        outcome=outcome,
        about={"rows": list(known)},
    )


def build_foolbox(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import foolbox

    net, x, y = common._torch_network(setup, x, y, weights)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")

    def cw(x, y, num_constants, num_steps):
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=num_constants, steps=num_steps, stepsize=0.1, initial_const=0.01,
            abort_early=True,
        )  # fmt: skip
        return attack(model, x, y, epsilons=None)[1]

    def deepfool(x, y, num_steps):
        attack = foolbox.attacks.L2DeepFoolAttack(steps=num_steps, candidates=10)
        return attack(model, x, y, epsilons=None)[1]

    return _torch_competitor(net, x, y, {"cw": cw, "deepfool": deepfool})


def build_torchattacks(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import torch
    import torchattacks

    net, x, y = common._torch_network(setup, x, y, weights)

    def cw(x, y, num_constants, num_steps):
        best, distance = x.clone(), torch.full((len(x),), torch.inf)
        for constant in _FIXED_CONSTANTS[:num_constants]:
            x_adv = torchattacks.CW(net, c=constant, steps=num_steps, lr=0.1)(x, y)
            found = (x_adv - x).flatten(1).norm(dim=1)
            # It gives back the clean image, at distance 0, where it fails.
            is_nearer = (found > 0) & (found < distance)
            best[is_nearer], distance[is_nearer] = x_adv[is_nearer], found[is_nearer]
        return best

    def apgd(x, y, epsilon, num_steps):
        return torchattacks.APGD(net, eps=epsilon, steps=num_steps, n_restarts=1, loss="ce")(x, y)

    def square(x, y, epsilon, num_queries):
        # Its own default stretches the schedule; AutoAttack and we do not.
        return torchattacks.Square(
            net, eps=epsilon, n_queries=num_queries, resc_schedule=False
        )(x, y)  # fmt: skip

    def autoattack(x, y, epsilon, num_steps, num_queries):
        # Its AutoAttack makes ten steps; this is the cascade with the official numbers.
        steps = {"eps": epsilon, "steps": num_steps}
        return torchattacks.MultiAttack([
            torchattacks.APGD(net, n_restarts=1, loss="ce", **steps),
            torchattacks.APGDT(net, n_restarts=1, n_classes=10, **steps),
            torchattacks.FAB(net, n_restarts=1, n_classes=10, multi_targeted=True, **steps),
            torchattacks.Square(net, eps=epsilon, n_queries=num_queries, resc_schedule=False),
        ])(x, y)  # fmt: skip

    known = {
        "cw": cw,
        "deepfool": lambda x, y, num_steps: torchattacks.DeepFool(net, steps=num_steps)(x, y),
        "apgd": apgd,
        "autoattack": autoattack,
        "square": square,
    }
    return _torch_competitor(net, x, y, known)


def build_art(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import torch
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    net, x, y = common._torch_network(setup, x, y, weights)
    classifier = PyTorchClassifier(
        net,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )

    def one_pixel(x, y, generations):
        attack = evasion.PixelAttack(classifier, th=1, es=1, max_iter=generations, verbose=False)
        return attack.generate(x.numpy(), y.numpy())

    def cw(x, y, num_constants, num_steps):
        attack = evasion.CarliniL2Method(
            classifier, learning_rate=0.1, binary_search_steps=num_constants, max_iter=num_steps,
            initial_const=0.01, batch_size=len(x), verbose=False,
        )  # fmt: skip
        return attack.generate(x.numpy(), y.numpy())

    known = {"cw": cw} if setup["slow_peers"] else {}
    return _torch_competitor(net, x, y, {**known, "one_pixel": one_pixel})


def build_autoattack(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import autoattack as official
    from autoattack.autopgd_base import APGDAttack

    net, x, y = common._torch_network(setup, x, y, weights)

    def apgd(x, y, epsilon, num_steps):
        attack = APGDAttack(
            net, n_iter=num_steps, norm="Linf", n_restarts=1, eps=epsilon, loss="ce", device="cpu"
        )
        return attack.perturb(x, y)

    def cascade(x, y, epsilon, num_steps, num_queries):
        attack = official.AutoAttack(net, eps=epsilon, seed=0, verbose=False, device="cpu")
        for part in (attack.apgd, attack.apgd_targeted, attack.fab):
            part.n_iter = num_steps
        attack.square.n_queries = num_queries
        return attack.run_standard_evaluation(x, y, bs=len(x))

    return _torch_competitor(net, x, y, {"apgd": apgd, "autoattack": cascade})


BUILDERS = {
    "advjax": build_advjax,
    "foolbox": build_foolbox,
    "torchattacks": build_torchattacks,
    "art": build_art,
    "autoattack": build_autoattack,
}


def perform(competitor: Competitor, order: dict) -> dict:
    """One attack; how strong it was is computed outside its time."""
    number = order["num_images"]
    x, y = competitor.prepare(number)
    clean, labels = (np.asarray(values) for values in (x, y))
    if clean.shape[-1] != 1:
        clean = clean.transpose(0, 2, 3, 1)
    stopwatch = common.Stopwatch()
    x_adv = competitor.attacks[order["row"]](x, y, **order["options"])
    times = stopwatch.read()
    answers, x_adv = competitor.outcome(x_adv, number)
    change = (x_adv - clean).reshape(number, -1)
    # Foolbox returns a blank image where its CW fails.
    success = (answers != labels) & (x_adv.reshape(number, -1).max(1) > 0)
    # Where there is a budget, only what keeps to it counts, up to rounding.
    success &= np.abs(change).max(1) <= order["options"].get("epsilon", 1) + 1e-6
    distance = np.linalg.norm(change, axis=1)[success]
    return {
        **times,
        "success": float(success.mean()),
        "distance": float(np.median(distance)) if success.any() else None,
        "largest_change": float(np.abs(change).max()),
    }


# ------------------------------------------------------------------------------- the other side


class Process(common.Process):
    """A competitor's process that runs this file."""

    program = __file__


def measure(args, processes: dict, about: dict, progress) -> list[dict]:
    """Every row: competitors take turns; the first call is the cold one and does not count."""
    results, failed = [], set()
    for row in args.rows:
        turns = [name for name in processes if row in about[name]["rows"]]
        order = {"row": row, "num_images": args.images[row], "options": args.options[row]}
        for repeat in range(args.runs[row] + 1):
            shift = repeat % len(turns)
            for name in turns[shift:] + turns[:shift]:
                progress.set_description(f"{row} {name} {repeat}", refresh=False)
                try:
                    if name in failed:
                        continue
                    result = processes[name].ask(order)
                except common.Failed as error:
                    if name == "advjax":
                        raise
                    common.say(f"{name} is left out from {row} on: {error}")
                    failed.add(name)
                    continue
                finally:
                    progress.update()
                facts = {"row": row, "competitor": name, "repeat": repeat, "counts": repeat > 0}
                results.append({**facts, **result})
    return results


class Line(NamedTuple):
    """The medians of one competitor in one row."""

    row: str
    competitor: str
    runs: int
    wall: float
    cpu: float
    cold: float  # wall time of the first call
    spread: tuple[float, float]  # of the wall time
    success: float
    distance: float | None


def summarise(results: list[dict]) -> list[Line]:
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["row"], result["competitor"]), []).append(result)
    lines = []
    for key, (first, *runs) in groups.items():
        if not runs:
            continue
        walls = [run["wall"] for run in runs]
        distances = [run["distance"] for run in runs if run["distance"] is not None]
        lines.append(Line(
            *key, len(runs), statistics.median(walls),
            statistics.median(run["cpu"] for run in runs), first["wall"],
            (min(walls), max(walls)), statistics.mean(run["success"] for run in runs),
            statistics.median(distances) if distances else None,
        ))  # fmt: skip
    return lines


def is_correct(peer: Line, ours: Line, num_images: int) -> bool:
    """Whether a peer attacks as well as we do, so that its time counts."""
    # An image, or two points: the random starts differ.
    if peer.success < ours.success - max(0.02, 1 / num_images) - 1e-9:
        return False
    if not ROWS[peer.row].is_nearest or ours.distance is None:
        return True
    return peer.distance is not None and peer.distance <= 1.1 * ours.distance


def table(lines: list[Line], images: dict[str, int]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "task", "library", "runs", "wall s", "(range)", "CPU s", "first call s", "success %",
        "median l2", "peer / advjax, wall", "CPU", "bar",
    ]  # fmt: skip
    cells = []
    names = ("advjax", *PEERS)
    for line in sorted(lines, key=lambda v: (list(ROWS).index(v.row), names.index(v.competitor))):
        row = ROWS[line.row]
        ours = next(p for p in lines if p.row == line.row and p.competitor == "advjax")
        peers = [p for p in lines if p.row == line.row and p is not ours]
        correct = [p for p in peers if is_correct(p, ours, images[line.row])]
        weak = " (weaker, does not count)" * (line in peers and line not in correct)
        is_compared = line is ours and bool(correct)
        cells.append([
            f"{row.title}; {images[line.row]} images", line.competitor + weak, str(line.runs),
            f"{line.wall:.3g}", f"{line.spread[0]:.3g}..{line.spread[1]:.3g}", f"{line.cpu:.3g}",
            f"{line.cold:.3g}", f"{100 * line.success:.2f}",
            "" if line.distance is None or not row.is_nearest else f"{line.distance:.3f}",
            f"{min(p.wall for p in correct) / line.wall:.2f}" if is_compared else "",
            f"{min(p.cpu for p in correct) / line.cpu:.2f}" if is_compared else "",
            f"{row.bar:g}" if line is ours else "",
        ])  # fmt: skip
    return header, cells


# ---------------------------------------------------------------------------------------- main


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--rows", type=common.listed(ROWS), default=list(ROWS), help=f"of {', '.join(ROWS)}")
    add("--peers", type=common.listed(PEERS), default=list(PEERS), help="may be empty")
    add("--repeats", type=common.at_least_one, default=3, help="counted runs of the short rows")
    add("--threads", type=common.at_least_one, default=2, help="processors for each competitor")
    add("--data_dir", default=None, help="tfds data; else TFDS_DATA_DIR, else ../shared/tfds")
    add("--reference", type=pathlib.Path, default=common.REFERENCE,
        help="folder of mnist_standard.npz")  # fmt: skip
    add("--output_dir", type=pathlib.Path, default=None, help="else benchmarks/results")
    add("--slow_peers", action="store_true", help="ART's CW too, thirty times slower than ours")
    add("--smoke", action="store_true", help="tiny; writes only where --output_dir says")
    args = parser.parse_args(arguments)
    if not args.rows:
        parser.error("argument --rows: need at least one name")
    if not (args.reference / "mnist_standard.npz").is_file():
        parser.error(f"argument --reference: {args.reference} has no mnist_standard.npz")
    args.images = {name: row.num_images for name, row in ROWS.items()}
    args.options = {name: row.options for name, row in ROWS.items()}
    args.runs = {name: 1 if row.is_long else args.repeats for name, row in ROWS.items()}
    if args.threads > (os.cpu_count() or 1):
        parser.error(
            f"argument --threads: need at most the {os.cpu_count()} processors of this machine, "
            f"got {args.threads}"
        )
    if args.smoke:
        few = 4 * args.threads
        args.images = {name: args.threads if name == "one_pixel" else few for name in ROWS}
        args.options = {name: {**row.options, **row.smoke} for name, row in ROWS.items()}
        args.runs = dict.fromkeys(ROWS, 1)
    elif args.output_dir is None:
        args.output_dir = common.REPOSITORY / "benchmarks" / "results"
    for name, number in args.images.items():
        if number % args.threads:
            parser.error(
                f"argument --threads: need a divisor of the {number} images of {name}, "
                f"got {args.threads}"
            )
    return args


def load_images(args) -> tuple[np.ndarray, np.ndarray]:
    """The first test images that the network gets right, as many as the largest row needs."""
    import advjax
    from advjax import models

    most = max(args.images[row] for row in args.rows)
    args.dataset, args.num_images = "mnist", most + most // 8 + 16
    x, y = common.load_images(args)
    with np.load(args.reference / "mnist_standard.npz", allow_pickle=False) as file:
        weights = {key: file[key] for key in file.files}
    logits_fn = advjax.bind(models.make("cnn", 10), models.from_reference_npz(weights))
    right = np.flatnonzero(np.asarray(logits_fn(x)).argmax(-1) == y)[:most]
    if len(right) < most:
        raise ValueError(
            f"strong_attacks: need {most} correctly classified images among the first {len(x)}, "
            f"got {len(right)}."
        )
    return x[right], y[right]


def benchmark(args, folder: pathlib.Path) -> None:
    import tqdm

    about_machine = common.machine()
    x, y = load_images(args)
    np.savez(folder / "arrays.npz", x=x, y=y)
    setup = {
        "arrays": str(folder / "arrays.npz"),
        "weights": str(args.reference / "mnist_standard.npz"),
        "threads": args.threads,
        "channels_last": False,
        "as_shipped": False,
        "cold": False,
        "slow_peers": args.slow_peers,
    }
    names = ["advjax", *common.installed(args.peers)]
    processes, about = common.start(names, setup, folder, Process)
    try:
        total = sum(
            (args.runs[row] + 1) * sum(row in facts["rows"] for facts in about.values())
            for row in args.rows
        )
        with tqdm.tqdm(
            total=total, unit="run", mininterval=1 if sys.stderr.isatty() else 30
        ) as progress:
            results = measure(args, processes, about, progress)
    finally:
        for process in processes.values():
            process.close()
    lines = summarise(results)
    cells = table(lines, args.images)
    title = f"MNIST, {about_machine['processor']}, {args.threads} threads"
    common.show(title, *cells)
    if args.output_dir is not None:
        stem = f"strong_attacks_{about['advjax']['backend']}"
        report = {
            "command": " ".join(["benchmarks/strong_attacks.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": {
                **about_machine,
                "load_after": [round(load, 2) for load in os.getloadavg()],
            },
            "settings": {
                "threads": args.threads,
                "glibc": "keeps large buffers, for all",
                "AutoAttack's peer": "the official package"
                if "autoattack" in about
                else "torchattacks' parts with the official numbers",
            },
            "about": about,
            "table": cells,
            "lines": [line._asdict() for line in lines],
        }
        fields = (
            "row", "competitor", "repeat", "counts", "wall", "cpu", "success", "distance",
            "largest_change",
        )  # fmt: skip
        common.write_results(
            args.output_dir, stem, report, results, "Strong attacks against the peers", fields
        )
        print(f"Written: {args.output_dir / stem}.md, .csv, .json")


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    try:
        # JAX in this process only chooses the images and writes files.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        with tempfile.TemporaryDirectory(prefix="advjax-bench-") as folder:
            benchmark(args, pathlib.Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except common.Failed as error:
        print(f"error: a competitor failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    common.work(BUILDERS, perform) if sys.argv[1:] == ["--worker"] else main()
