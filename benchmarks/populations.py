"""advjax against a PyTorch loop: small fully connected networks a minute.

    PYTHONPATH=. python benchmarks/populations.py
    PYTHONPATH=. python benchmarks/populations.py --tasks=narrow --num_networks=8
    PYTHONPATH=. python benchmarks/populations.py --smoke     # does it run?

Prints a table and writes benchmarks/results/populations_BACKEND.{md,csv,json}. Both sides train the
same architectures (depth, width and dropout as `universality.sample_architectures` draws them) on
the same images with Adam for as many steps; the mean test accuracy is part of the table. Ours are
padded to one program a depth, trained side by side (vmap) or one after the other (map). PyTorch
comes with `make peers`; without it only our times are printed. Two to four minutes on two idle CPU
cores.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
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


class Task(NamedTuple):
    """Networks of 1 or 2 hidden layers for 28x28 images of ten classes."""

    title: str
    width: tuple[int, int]


TASKS = {
    "narrow": Task("1 or 2 layers of 30 to 128 units", (30, 128)),
    "wide": Task("1 or 2 layers of 400 to 512 units", (400, 512)),
}
NUM_TEST, LEARNING_RATE, SIDE, NUM_CLASSES = 500, 1e-3, 28, 10


# ------------------------------------------------------------------------ a competitor's process


def make_data(num_train: int) -> tuple[np.ndarray, ...]:
    """Images of a class: its prototype under noise. Training, then test images and labels."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(90, 160, (NUM_CLASSES, SIDE, SIDE, 1))
    labels = rng.integers(0, NUM_CLASSES, num_train + NUM_TEST).astype(np.int32)
    noise = rng.normal(0, 30, (len(labels), SIDE, SIDE, 1))
    images = np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8)
    return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]


class Advjax:
    """Our side."""

    packages = ("advjax", "jax", "jaxlib", "flax", "optax")

    def __init__(self, threads: int):
        del threads
        import jax

        self.about: dict[str, Any] = {"backend": jax.default_backend()}

    def prepare(self, task: Task, order: dict):
        """`() -> networks`, which is timed, and `networks -> mean test accuracy`."""
        import jax

        import advjax
        from advjax import data, evaluation, universality

        images, labels, test_images, test_labels = make_data(order["num_train"])
        names = tuple(map(str, range(NUM_CLASSES)))
        train = data.Dataset(images, labels, NUM_CLASSES, "noise", "train", names)
        architectures = universality.sample_architectures(
            jax.random.key(0), order["num_networks"], depth=(1, 2), width=task.width
        )
        groups = universality.group_architectures(
            architectures, NUM_CLASSES, paddings=(task.width[1],), size=order["num_networks"]
        )

        def fit():
            return jax.block_until_ready(list(universality.train_architectures(
                jax.random.key(1), groups, train, num_epochs=order["num_epochs"],
                batch_size=order["batch_size"], method=order["method"],
            )))  # fmt: skip

        def measure(trained):
            x = test_images.astype(np.float32) / 255
            accuracies = []
            for group in trained:
                stack = advjax.bind(group.module, group.variables)
                accuracies.append(jax.vmap(lambda f: evaluation.accuracy(f, x, test_labels))(stack))
            return float(np.mean(np.concatenate(accuracies)))

        self.architectures = architectures
        return fit, measure


class Torch:
    """A plain PyTorch loop over networks, epochs and batches."""

    packages = ("torch",)

    def __init__(self, threads: int):
        import torch

        self.torch, self.threads = torch, threads
        self.about: dict[str, Any] = {}

    def prepare(self, task: Task, order: dict):
        torch, nn = self.torch, self.torch.nn
        images, labels, test_images, test_labels = make_data(order["num_train"])
        x, y = (torch.from_numpy(part) for part in (images, labels))
        x, y = x.flatten(1).float() / 255, y.long()
        loss_fn = nn.CrossEntropyLoss()
        size = order["batch_size"]

        def train(depth, width, dropout, num_batches=None):
            sizes = [x.shape[1], *[width] * depth]
            layers = []
            for inputs, outputs in itertools.pairwise(sizes):
                layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
            net = nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))
            optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
            done = 0
            for _ in range(order["num_epochs"]):
                shuffled = torch.randperm(len(x))
                for start in range(0, len(x) - size + 1, size):
                    rows = shuffled[start : start + size]
                    optimizer.zero_grad()
                    loss_fn(net(x[rows]), y[rows]).backward()
                    optimizer.step()
                    done += 1
                    if done == num_batches:
                        return net
            return net.eval()

        # Small networks may be faster on one thread: the peer gets what suits it.
        times = {}
        for threads in dict.fromkeys((1, self.threads)):
            torch.set_num_threads(threads)
            train(2, task.width[1], 0.1, num_batches=3)
            stopwatch = common.Stopwatch()
            train(2, task.width[1], 0.1, num_batches=60)
            times[threads] = stopwatch.read()["wall"]
        torch.set_num_threads(min(times, key=times.__getitem__))

        def fit():
            return [train(*architecture) for architecture in order["architectures"]]

        def measure(nets):
            test = torch.from_numpy(test_images).flatten(1).float() / 255
            with torch.no_grad():
                answers = [net(test).argmax(1).numpy() for net in nets]
            return float(np.mean([answer == test_labels for answer in answers]))

        return fit, measure


SIDES = {"advjax": Advjax, "torch": Torch}
CONTENDERS = (("advjax", "vmap"), ("advjax", "map"), ("torch", "loop"))


def work() -> None:
    """A side's process: a setup, then tasks as lines of JSON and an answer to each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only answers go to the parent
    setup = json.loads(sys.stdin.readline())
    side = SIDES[setup["name"]](setup["threads"])
    versions = {package: importlib.metadata.version(package) for package in side.packages}
    print(json.dumps({"versions": versions, **side.about}), file=answers, flush=True)
    ready: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        name = f"{order['task']} {order['method']}"
        if name not in ready:
            ready[name] = side.prepare(TASKS[order["task"]], order)
        fit, measure = ready[name]
        stopwatch = common.Stopwatch()
        trained = fit()
        said = {**stopwatch.read(), "accuracy": measure(trained)}
        if side.packages[0] == "advjax":
            drawn = side.architectures
            said["architectures"] = [
                (int(d), int(w), float(r))
                for d, w, r in zip(drawn.depth, drawn.width, drawn.dropout, strict=True)
            ]
        print(json.dumps(said), file=answers, flush=True)


# ------------------------------------------------------------------------------- the other side


class Process(common.Process):
    """A side's process, which runs this file."""

    program = __file__


class Line(NamedTuple):
    """What one side needed for one task."""

    task: str
    side: str
    method: str
    networks: int
    runs: int
    wall: float
    cpu: float
    spread: tuple[float, float]
    cold: float
    accuracy: float


def measure(args, processes: dict[str, Process], progress) -> list[Line]:
    """Every task: each contender once cold, then they take turns."""
    contenders = [c for c in CONTENDERS if c[0] in processes]
    progress.total = len(args.tasks) * (1 + args.repeats) * len(contenders)
    lines = []
    for task in args.tasks:
        runs: dict[tuple[str, str], list[dict]] = {contender: [] for contender in contenders}
        architectures: list = []
        for repeat in range(1 + args.repeats):
            for name, method in contenders if repeat % 2 == 0 else contenders[::-1]:
                progress.set_description(f"{task} {name} {method}", refresh=True)
                said = processes[name].ask({
                    "task": task, "method": method, "architectures": architectures,
                    **{key: getattr(args, key) for key in SETTINGS},
                })  # fmt: skip
                architectures = said.get("architectures", architectures)
                runs[name, method].append(said)
                progress.update()
        for contender, said in runs.items():
            walls = [run["wall"] for run in said[1:]]
            lines.append(Line(
                task, *contender, args.num_networks, len(walls), statistics.median(walls),
                statistics.median(run["cpu"] for run in said[1:]), (min(walls), max(walls)),
                said[0]["wall"], said[0]["accuracy"],
            ))  # fmt: skip
    return lines


SETTINGS = ("num_networks", "num_train", "num_epochs", "batch_size")


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "task", "side", "method", "networks", "runs", "wall s", "(range)", "CPU s",
        "networks a minute", "torch / this, wall", "CPU", "cold", "first call s", "accuracy",
    ]  # fmt: skip
    cells = []
    for line in lines:
        peer = next((p for p in lines if (p.task, p.side) == (line.task, "torch")), None)
        ratios = ["", "", ""]
        if peer is not None:
            ratios = [
                f"{getattr(peer, key) / getattr(line, key):.2f}" for key in ("wall", "cpu", "cold")
            ]
        cells.append([
            TASKS[line.task].title, line.side, line.method, str(line.networks), str(line.runs),
            f"{line.wall:.2f}", f"{line.spread[0]:.2f}..{line.spread[1]:.2f}", f"{line.cpu:.2f}",
            f"{60 * line.networks / line.wall:.0f}", *ratios, f"{line.cold:.2f}",
            f"{line.accuracy:.1%}",
        ])  # fmt: skip
    return header, cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", default=",".join(TASKS), help="what to time, with commas")
    parser.add_argument("--num_networks", type=int, default=32)
    parser.add_argument("--num_train", type=int, default=2000, help="training images")
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="counted turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output_dir", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "results")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny, writes nothing here")
    args = parser.parse_args()
    if args.worker:
        work()
        return
    args.tasks = args.tasks.split(",")
    for task in args.tasks:
        if task not in TASKS:
            parser.error(f"unknown task {task!r}; known: {', '.join(TASKS)}.")
    if args.smoke:
        args.tasks, args.num_networks, args.num_train, args.repeats = args.tasks[:1], 3, 500, 1
        args.output_dir = pathlib.Path(tempfile.mkdtemp())
    names = ["advjax"]
    if importlib.util.find_spec("torch"):
        names.append("torch")
    else:
        common.say("torch is left out: it is not installed (see `make peers`).")
    from tqdm.auto import tqdm

    machine = common.machine()
    with tempfile.TemporaryDirectory() as text:
        setup = {"threads": args.threads, "as_shipped": False, "cold": False}
        platform = os.environ.get("JAX_PLATFORMS", "cpu")
        processes = {
            name: Process(name, setup, pathlib.Path(text), JAX_PLATFORMS=platform) for name in names
        }
        about = {name: process.receive() for name, process in processes.items()}
        with tqdm() as progress:
            lines = measure(args, processes, progress)
        for process in processes.values():
            process.close()
    machine["load_after"] = [round(load, 2) for load in os.getloadavg()]
    header, cells = table(lines)
    common.show("Networks", header, cells)
    backend = about["advjax"]["backend"]
    report = {
        "command": " ".join(sys.argv), "date": str(datetime.date.today()), "machine": machine,
        "settings": {name: getattr(args, name) for name in ("threads", *SETTINGS, "repeats")},
        "about": about, "table": (header, cells),
    }  # fmt: skip
    common.write_results(
        args.output_dir, f"populations_{backend}", report, [line._asdict() for line in lines],
        title="Random networks against a PyTorch loop", fields=Line._fields,
    )  # fmt: skip
    print(f"Written to {args.output_dir}/populations_{backend}.md")


if __name__ == "__main__":
    main()
