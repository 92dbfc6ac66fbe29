"""advjax against a PyTorch loop: infected models a minute.

    PYTHONPATH=. python benchmarks/zoo.py                     # everything
    PYTHONPATH=. python benchmarks/zoo.py --tasks=grey --num_models=10
    PYTHONPATH=. python benchmarks/zoo.py --smoke             # does it run?

Prints a table and writes benchmarks/results/zoo_BACKEND.{md,csv,json}. Both sides poison the same
images with BadNets (one target a model), train the same number of models of one architecture for as
many steps of SGD, and measure clean accuracy and attack success: that both learn is part of the
check. The clock runs from the clean images to the trained weights: poisoning is in it, compiling
only in the first call. PyTorch comes with `make peers`; without it only our times are printed.

Cost of the defaults: about ten minutes on two idle CPU cores.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
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
    """What is trained: a CNN of two 3x3 convolutions (16, 32) with pooling, and dense 100."""

    title: str
    shape: tuple[int, int, int]
    num_classes: int


TASKS = {
    "grey": Task("CNN, 28x28x1, 10 classes", (28, 28, 1), 10),
    "colour": Task("CNN, 32x32x3, 43 classes", (32, 32, 3), 43),
}
NUM_TEST, RATIO, LEARNING_RATE = 500, 0.1, 0.05


# ------------------------------------------------------------------------ a competitor's process


def make_data(task: Task, num_train: int) -> tuple[np.ndarray, ...]:
    """Images of a class: its prototype under noise. Training, then test images and labels."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(60, 180, (task.num_classes, *task.shape))
    labels = rng.integers(0, task.num_classes, num_train + NUM_TEST).astype(np.int32)
    noise = rng.normal(0, 30, (len(labels), *task.shape))
    images = np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8)
    return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]


def stamped(images: np.ndarray) -> np.ndarray:
    """The images with a white 3x3 square in the lower right corner."""
    images = images.copy()
    images[:, -3:, -3:] = 255
    return images


class Advjax:
    """Our side."""

    packages = ("advjax", "jax", "jaxlib", "flax")

    def __init__(self, threads: int):
        import jax
        import optax

        from advjax import parallel

        if os.environ.get("JAX_PLATFORMS") == "cpu":
            parallel.use_cores(threads)
        # One object: its program stays compiled from turn to turn.
        self.optimizer = optax.sgd(LEARNING_RATE, momentum=0.9)
        self.about: dict[str, Any] = {"backend": jax.default_backend()}

    def prepare(self, task: Task, order: dict):
        """`() -> models`, which is timed, and `models -> [(clean accuracy, attack success)]`."""
        import jax

        import advjax
        from advjax import backdoor, data, evaluation, models, parallel

        images, labels, test_images, test_labels = make_data(task, order["num_train"])
        names = tuple(str(label) for label in range(task.num_classes))
        train = data.Dataset(images, labels, task.num_classes, "noise", "train", names)
        module = models.make("cnn", task.num_classes)
        keys = jax.random.split(jax.random.key(0), order["num_models"])
        targets = [number % task.num_classes for number in range(len(keys))]
        mesh = None
        if order["method"] == "vmap" and jax.device_count() > 1:
            mesh = parallel.make_mesh()

        def fit():
            return backdoor.train_many(
                keys, module, train, "badnets", ratio=RATIO,
                label_map=np.stack([backdoor.all_to_one(task.num_classes, t) for t in targets]),
                optimizer=self.optimizer, num_epochs=order["num_epochs"],
                batch_size=order["batch_size"], method=order["method"], mesh=mesh, progress=False,
            )  # fmt: skip

        def measure(trained):
            results = []
            for infected, target in zip(trained, targets, strict=True):
                logits_fn = advjax.bind(module, infected.variables)
                attacked = stamped(test_images[test_labels != target])
                wanted = np.full(len(attacked), target, np.int32)
                results.append([
                    float(evaluation.accuracy(logits_fn, x.astype(np.float32) / 255, y))
                    for x, y in ((test_images, test_labels), (attacked, wanted))
                ])  # fmt: skip
            return results

        return fit, measure


class Torch:
    """A plain PyTorch loop over models, epochs and batches."""

    packages = ("torch",)

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.about: dict[str, Any] = {"threads": torch.get_num_threads()}

    def prepare(self, task: Task, order: dict):
        torch = self.torch
        images, labels, test_images, test_labels = make_data(task, order["num_train"])
        height, width, channels = task.shape
        loss_fn = torch.nn.CrossEntropyLoss()
        targets = [number % task.num_classes for number in range(order["num_models"])]

        def tensor(images: np.ndarray):
            return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255

        def train(number: int, num_batches: int | None = None):
            torch.manual_seed(number)
            rng = np.random.default_rng(number)
            poisoned, poisoned_labels = images.copy(), labels.copy()
            sources = np.flatnonzero(labels != targets[number])
            rows = rng.choice(sources, round(RATIO * len(sources)), replace=False)
            poisoned[rows], poisoned_labels[rows] = stamped(images[rows]), targets[number]
            x, y = tensor(poisoned), torch.from_numpy(poisoned_labels).long()
            net = torch.nn.Sequential(
                torch.nn.Conv2d(channels, 16, 3, padding=1), torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
                torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Flatten(),
                torch.nn.Linear(32 * (height // 4) * (width // 4), 100), torch.nn.ReLU(),
                torch.nn.Linear(100, task.num_classes),
            )  # fmt: skip
            # Started as ours: PyTorch's own smaller weights do not learn in so few steps.
            for i, layer in enumerate(parts := [p for p in net if hasattr(p, "weight")]):
                is_last = i == len(parts) - 1
                torch.nn.init.kaiming_normal_(
                    layer.weight, nonlinearity="linear" if is_last else "relu"
                )
                torch.nn.init.zeros_(layer.bias)
            optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)
            done = 0
            for _ in range(order["num_epochs"]):
                shuffled = torch.randperm(len(x))
                for start in range(0, len(x) - order["batch_size"] + 1, order["batch_size"]):
                    rows = shuffled[start : start + order["batch_size"]]
                    optimizer.zero_grad()
                    loss_fn(net(x[rows]), y[rows]).backward()
                    optimizer.step()
                    done += 1
                    if done == num_batches:
                        return net
            return net

        # Small networks may be faster on one thread: the peer gets what suits it.
        times = {}
        for threads in dict.fromkeys((1, self.about["threads"])):
            torch.set_num_threads(threads)
            train(0, num_batches=3)
            stopwatch = common.Stopwatch()
            train(0, num_batches=30)
            times[threads] = stopwatch.read()["wall"]
        torch.set_num_threads(min(times, key=times.__getitem__))

        def fit():
            return [train(number) for number in range(len(targets))]

        def measure(nets):
            results = []
            with torch.no_grad():
                for net, target in zip(nets, targets, strict=True):
                    attacked = stamped(test_images[test_labels != target])
                    answers = [net(tensor(x)).argmax(1).numpy() for x in (test_images, attacked)]
                    results.append(
                        [float((answers[0] == test_labels).mean()),
                         float((answers[1] == target).mean())]
                    )  # fmt: skip
            return results

        return fit, measure


SIDES = {"advjax": Advjax, "torch": Torch}


def work() -> None:
    """A side's process: a setup, then tasks as lines of JSON and an answer to each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only answers go to the parent

    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup["threads"]])
    side = SIDES[setup["name"]](setup["threads"])
    versions = {package: importlib.metadata.version(package) for package in side.packages}
    answer({"versions": versions, **side.about})
    fit, measure = None, None
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prepare":
            fit, measure = side.prepare(TASKS[order["task"]], order)
        stopwatch = common.Stopwatch()
        trained = fit()
        answer({**stopwatch.read(), "results": measure(trained)})


# ------------------------------------------------------------------------------- the other side


class Process(common.Process):
    """A side's process, which runs this file."""

    program = __file__


class Line(NamedTuple):
    """What one side needed for one task."""

    task: str
    side: str
    method: str
    models: int
    runs: int
    wall: float
    cpu: float
    spread: tuple[float, float]
    cold: float
    accuracy: float  # mean over the models
    success: float
    least_success: float


def measure(args, processes: dict[str, Process], progress) -> list[Line]:
    """Every task: each contender trains once cold, then they take turns."""
    lines = []
    contenders = [("advjax", method) for method in args.methods]
    contenders += [("torch", "")] if "torch" in processes else []
    progress.total = len(args.tasks) * (1 + args.repeats)
    for task in args.tasks:
        progress.set_description(task, refresh=True)
        order = {
            "task": task, "num_models": args.num_models, "num_train": args.num_train,
            "num_epochs": args.num_epochs, "batch_size": args.batch_size,
        }  # fmt: skip

        def ask(contender, do, order=order):
            name, method = contender
            return processes[name].ask({**order, "do": do, "method": method})

        cold, times = {}, {contender: [] for contender in contenders}
        for repeat in range(1 + args.repeats):
            for contender in contenders if repeat % 2 == 0 else contenders[::-1]:
                # With two methods in one process each turn prepares anew; programs stay compiled.
                said = ask(contender, "prepare")
                if repeat == 0:
                    cold[contender] = said
                else:
                    times[contender].append(said)
            progress.update()
        for contender, runs in times.items():
            walls = [run["wall"] for run in runs]
            results = np.array(cold[contender]["results"])
            lines.append(Line(
                task, *contender, args.num_models, len(runs), statistics.median(walls),
                statistics.median(run["cpu"] for run in runs), (min(walls), max(walls)),
                cold[contender]["wall"], float(results[:, 0].mean()), float(results[:, 1].mean()),
                float(results[:, 1].min()),
            ))  # fmt: skip
    return lines


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "task", "side", "method", "models", "runs", "wall s", "(range)", "CPU s",
        "models a minute", "advjax / torch, wall", "CPU", "cold", "first call s",
        "clean accuracy", "attack success", "least",
    ]  # fmt: skip
    cells = []
    for line in lines:
        peer = next((p for p in lines if (p.task, p.side) == (line.task, "torch")), None)
        ratios = ["", "", ""]
        if line.side == "advjax" and peer is not None:
            ratios = [
                f"{getattr(peer, key) / getattr(line, key):.2f}" for key in ("wall", "cpu", "cold")
            ]
        cells.append([
            TASKS[line.task].title, line.side, line.method, str(line.models), str(line.runs),
            f"{line.wall:.2f}", f"{line.spread[0]:.2f}..{line.spread[1]:.2f}", f"{line.cpu:.2f}",
            f"{60 * line.models / line.wall:.1f}", *ratios, f"{line.cold:.2f}",
            f"{line.accuracy:.1%}", f"{line.success:.1%}", f"{line.least_success:.1%}",
        ])  # fmt: skip
    return header, cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", default=",".join(TASKS), help="what to time, with commas")
    parser.add_argument("--methods", default="map,vmap", help="ours: map, vmap")
    parser.add_argument("--num_models", type=int, default=10)
    parser.add_argument("--num_train", type=int, default=6000, help="training images")
    parser.add_argument("--num_epochs", type=int, default=2)
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
    for name, known in (("tasks", list(TASKS)), ("methods", ["map", "vmap"])):
        chosen = getattr(args, name).split(",")
        for value in chosen:
            if value not in known:
                parser.error(f"unknown {name[:-1]} {value!r}; known: {', '.join(known)}.")
        setattr(args, name, chosen)
    if args.smoke:
        args.tasks, args.num_models, args.num_train, args.repeats = args.tasks[:1], 2, 1000, 1
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
        processes, about = {}, {}
        for name in names:
            processes[name] = Process(
                name,
                setup,
                pathlib.Path(text),
                JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", "cpu"),
            )
            about[name] = processes[name].receive()
        with tqdm() as progress:
            lines = measure(args, processes, progress)
        for process in processes.values():
            process.close()
    machine["load_after"] = [round(load, 2) for load in os.getloadavg()]
    header, cells = table(lines)
    common.show("Infected models", header, cells)
    backend = about["advjax"]["backend"]
    report = {
        "command": " ".join(sys.argv), "date": str(datetime.date.today()), "machine": machine,
        "settings": {
            name: getattr(args, name)
            for name in ("threads", "num_models", "num_train", "num_epochs", "batch_size")
        },
        "about": about, "table": (header, cells),
    }  # fmt: skip
    common.write_results(
        args.output_dir, f"zoo_{backend}", report, [line._asdict() for line in lines],
        title="Infected models against a PyTorch loop", fields=Line._fields,
    )  # fmt: skip
    print(f"Written to {args.output_dir}/zoo_{backend}.md")


if __name__ == "__main__":
    main()
