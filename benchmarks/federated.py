"""advjax against ByzFL in aggregation rules, and against a PyTorch loop in whole federated rounds.

    PYTHONPATH=. python benchmarks/federated.py                        # everything
    PYTHONPATH=. python benchmarks/federated.py --tasks=krum,median    # some of it
    PYTHONPATH=. python benchmarks/federated.py --smoke                # does it run?

Prints a table and writes benchmarks/results/federated_BACKEND.{md,csv,json}. What is timed is in
benchmarks/README.md: both sides hold the same updates, take turns, and their aggregates are
compared. ByzFL and PyTorch come with `make peers`; without them only our times are printed.

Cost of the defaults: about ten minutes on two idle CPU cores.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import types
from typing import Any, NamedTuple

import numpy as np

# At the end of the path: a competitor's process starts without this folder.
sys.path.append(str(pathlib.Path(__file__).resolve().parent))
import evasion as common

# Least ratio of ByzFL's warm wall time to ours, from the project's plan; None: no bar, or no peer.
RULES: dict[str, float | None] = {
    "mean": None,
    "krum": 4.0,
    "multi_krum": 4.0,
    "trimmed_mean": 15.0,
    "median": 15.0,
    "geometric_median": 3.0,
    "centered_clipping": 3.0,
    "meamed": None,
    "monna": None,
    "caf": None,
    "nearest_neighbour_mixing": None,
    "norm_bounding": None,
    "bulyan": None,
    "faba": None,
    "dnc": None,
}


class Round(NamedTuple):
    """Federated rounds that both sides do: a network 784-HIDDEN-10 on 50 clients."""

    title: str
    bar: float
    hidden: int
    num_steps: int
    batch_size: int


ROUNDS = {
    "round_small": Round("3 rounds, 784-64-10, 100 steps of 10", 3.0, 64, 100, 10),
    "round_wide": Round("3 rounds, 784-512-10, 10 steps of 32", 0.9, 512, 10, 32),
}
SIZES = ((50, 100_000), (50, 1_000_000), (100, 100_000), (200, 100_000))
NUM_CLIENTS, EXAMPLES_PER_CLIENT, NUM_ROUNDS, LEARNING_RATE = 50, 200, 3, 0.02


# ------------------------------------------------------------------------ a competitor's process


def make_updates(n: int, d: int) -> np.ndarray:
    """Honest updates round a common direction, the last fifth pushed away."""
    rng = np.random.default_rng(0)
    updates = rng.standard_normal((n, d), np.float32)
    updates += rng.standard_normal(d, np.float32)
    updates[-(n // 5) :] -= 3
    return updates


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the clients; only the time matters."""
    rng = np.random.default_rng(0)
    shape = (NUM_CLIENTS, EXAMPLES_PER_CLIENT)
    images = rng.integers(0, 256, (*shape, 28, 28, 1), np.uint8)
    return images, rng.integers(0, 10, shape).astype(np.int32)


def make_weights(hidden: int) -> dict[str, np.ndarray]:
    """The weights that both sides start from."""
    rng = np.random.default_rng(1)
    return {
        "dense1_kernel": rng.standard_normal((784, hidden)).astype(np.float32) * np.sqrt(2 / 784),
        "dense1_bias": np.zeros(hidden, np.float32),
        "logits_kernel": rng.standard_normal((hidden, 10)).astype(np.float32) / np.sqrt(hidden),
        "logits_bias": np.zeros(10, np.float32),
    }


class Advjax:
    """Our side."""

    packages = ("advjax", "jax", "jaxlib", "flax")

    def __init__(self, threads: int):
        import jax

        from advjax import aggregation, parallel

        if os.environ.get("JAX_PLATFORMS") == "cpu":
            parallel.use_cores(threads)
        self.jax, self.aggregation = jax, aggregation
        self.about = {"backend": jax.default_backend()}

    def rule(self, name: str, updates: np.ndarray):
        """`() -> aggregate` and the seconds that compiling took."""
        jax, aggregation = self.jax, self.aggregation
        n = len(updates)
        f = n // 5
        clipping = aggregation.centered_clipping(radius=10.0, num_iters=1)
        known = {
            "mean": aggregation.mean,
            "median": aggregation.median,
            "norm_bounding": functools.partial(aggregation.norm_bounding, radius=2.0),
            "geometric_median": aggregation.geometric_median,
            "centered_clipping": lambda x: clipping.update(x, clipping.init(x[0]))[0],
            "krum": functools.partial(
                aggregation.krum, num_byzantine=f, neighbors=n - f - 1  # as ByzFL counts them
            ),
            "multi_krum": functools.partial(
                aggregation.multi_krum, num_byzantine=f, neighbors=n - f - 1
            ),
            "dnc": functools.partial(aggregation.dnc, jax.random.key(0), num_byzantine=f),
        }  # fmt: skip
        rule = known.get(name) or functools.partial(getattr(aggregation, name), num_byzantine=f)
        placed = jax.device_put(updates)
        stopwatch = common.Stopwatch()
        compiled = jax.jit(rule).lower(placed).compile()
        seconds = stopwatch.read()["wall"]
        return lambda: jax.block_until_ready(compiled(placed)), seconds

    def round(self, setting: Round):
        """`() -> the global model after the rounds` and the seconds that compiling took."""
        jax = self.jax
        from advjax import data, federated, models, parallel

        images, labels = make_data()
        index = np.arange(labels.size, dtype=np.int32).reshape(labels.shape)
        counts = np.full(len(labels), labels.shape[1], np.int32)
        names = tuple("0123456789")
        train = data.Dataset(
            images.reshape(-1, *images.shape[2:]), labels.ravel(), 10, "noise", "train", names
        )
        module = models.make("mlp", 10, hidden=(setting.hidden,))
        task = federated.make_task(
            module, train, train.take(10), federated.Partition(index, counts)
        )
        local = federated.FedAvg(
            learning_rate=LEARNING_RATE, num_steps=setting.num_steps,
            batch_size=setting.batch_size,
        )  # fmt: skip
        mesh = parallel.make_mesh() if jax.device_count() > 1 else None
        rule = self.aggregation.stateless(self.aggregation.mean)

        def run():
            history = federated.simulate(
                jax.random.key(0), task, rule=rule, num_rounds=NUM_ROUNDS, eval_every=NUM_ROUNDS,
                local=local, mesh=mesh, progress=False,
            )  # fmt: skip
            return jax.block_until_ready(history.accuracy)

        return run, 0.0


class Byzfl:
    """ByzFL's rules and a plain PyTorch loop over clients."""

    packages = ("byzfl", "torch")

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.about: dict[str, Any] = {"threads": torch.get_num_threads()}
        # Its __init__ imports its benchmark of data sets and plots, which asks for torchvision.
        package = types.ModuleType("byzfl")
        spec = importlib.util.find_spec("byzfl")
        package.__path__ = list(spec.submodule_search_locations)  # type: ignore[union-attr]
        sys.modules["byzfl"] = package

    def rule(self, name: str, updates: np.ndarray):
        """`() -> aggregate`; nothing compiles."""
        import importlib

        rules = importlib.import_module("byzfl.aggregators.aggregators")
        mixers = importlib.import_module("byzfl.aggregators.preaggregators")
        f = len(updates) // 5
        known = {
            "mean": lambda: rules.Average(),
            "krum": lambda: rules.Krum(f=f),
            "multi_krum": lambda: rules.MultiKrum(f=f),
            "trimmed_mean": lambda: rules.TrMean(f=f),
            "median": lambda: rules.Median(),
            "geometric_median": lambda: rules.GeometricMedian(nu=0.1, T=3),
            "centered_clipping": lambda: rules.CenteredClipping(L=1, tau=10.0),
            "meamed": lambda: rules.Meamed(f=f),
            "monna": lambda: rules.MoNNA(f=f, idx=0),
            "caf": lambda: rules.CAF(f=f),
            "nearest_neighbour_mixing": lambda: mixers.NNM(f=f),
        }
        if name not in known:
            return None, 0.0
        self.torch.set_num_threads(self.about["threads"])
        placed = self.torch.from_numpy(updates)

        def run():
            # Centered clipping keeps state: a new object starts from zero, as ours does.
            return known[name]()(placed)

        return run, 0.0

    def round(self, setting: Round):
        torch = self.torch
        images, labels = make_data()
        images = torch.from_numpy(images.reshape(*images.shape[:2], -1)).float() / 255
        labels = torch.from_numpy(labels).long()
        weights = make_weights(setting.hidden)
        net = torch.nn.Sequential(
            torch.nn.Linear(784, setting.hidden), torch.nn.ReLU(),
            torch.nn.Linear(setting.hidden, 10),
        )  # fmt: skip
        start = [
            torch.from_numpy(weights[name].T.copy())
            for name in ("dense1_kernel", "dense1_bias", "logits_kernel", "logits_bias")
        ]
        loss_fn = torch.nn.CrossEntropyLoss()
        updates = torch.empty(NUM_CLIENTS, sum(w.numel() for w in start))

        def run():
            params = start
            for _ in range(NUM_ROUNDS):
                params = one_round(params)
            return torch.cat([value.flatten() for value in params])

        def one_round(start):
            for client in range(NUM_CLIENTS):
                with torch.no_grad():
                    for parameter, value in zip(net.parameters(), start, strict=True):
                        parameter.copy_(value)
                optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
                for _ in range(setting.num_steps):
                    rows = torch.randint(EXAMPLES_PER_CLIENT, (setting.batch_size,))
                    optimizer.zero_grad()
                    loss_fn(net(images[client, rows]), labels[client, rows]).backward()
                    optimizer.step()
                with torch.no_grad():
                    torch.cat(
                        [(p - v).flatten() for p, v in zip(net.parameters(), start, strict=True)],
                        out=updates[client],
                    )
            parts = updates.mean(0).split([value.numel() for value in start])
            return [v + part.view_as(v) for v, part in zip(start, parts, strict=True)]

        # Small networks are faster on one thread: the peer gets what suits it.
        times = {}
        for threads in dict.fromkeys((1, self.about["threads"])):
            torch.set_num_threads(threads)
            stopwatch = common.Stopwatch()
            one_round(start)
            times[threads] = stopwatch.read()["wall"]
        torch.set_num_threads(min(times, key=times.__getitem__))
        return run, 0.0


SIDES = {"advjax": Advjax, "byzfl": Byzfl}


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
    versions = {}
    for package in side.packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "?"
    answer({"versions": versions, **side.about})
    run = None
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prepare":
            stopwatch = common.Stopwatch()
            if order["task"] in ROUNDS:
                run, compiling = side.round(ROUNDS[order["task"]])
            else:
                run, compiling = side.rule(order["task"], make_updates(order["n"], order["d"]))
            if run is None:
                answer({"missing": True})
                continue
            stopwatch = common.Stopwatch()
            result = np.asarray(run())
            answer({"compile": compiling, "cold": compiling + stopwatch.read()["wall"]})
            if order["keep"]:
                np.save(order["keep"], result)
        else:
            stopwatch = common.Stopwatch()
            run()
            answer(stopwatch.read())


# ------------------------------------------------------------------------------- the other side


class Process(common.Process):
    """A side's process, which runs this file."""

    program = __file__


class Line(NamedTuple):
    """What one side needed for one task."""

    task: str
    n: int
    d: int
    side: str
    runs: int
    wall: float
    cpu: float
    spread: tuple[float, float]
    compile: float
    cold: float
    differs: float | None  # largest difference of the aggregates over their largest entry


def measure(args, processes: dict[str, Process], folder: pathlib.Path, progress) -> list[Line]:
    """Every task: each side prepares and runs once, then they take turns."""
    lines = []
    tasks = [(t, n, d) for t in args.tasks if t in RULES for n, d in args.sizes]
    tasks += [(t, NUM_CLIENTS, 0) for t in args.tasks if t in ROUNDS]
    progress.total = len(tasks)
    for task, n, d in tasks:
        progress.set_description(f"{task} {n} x {d}", refresh=True)
        ready, results = {}, {}
        for name, process in processes.items():
            keep = str(folder / f"{name}.npy") if task in RULES else ""
            said = process.ask({"do": "prepare", "task": task, "n": n, "d": d, "keep": keep})
            if "missing" not in said:
                ready[name] = said
        times: dict[str, list[dict]] = {name: [] for name in ready}
        for repeat in range(args.repeats):
            order = list(ready) if repeat % 2 == 0 else list(ready)[::-1]
            for name in order:
                times[name].append(processes[name].ask({"do": "run"}))
        if task in RULES:
            results = {name: np.load(folder / f"{name}.npy") for name in ready}
        for name, runs in times.items():
            walls = [run["wall"] for run in runs]
            differs = None
            if name != "advjax" and results:
                gap = np.abs(results[name] - results["advjax"]).max()
                differs = float(gap / np.abs(results[name]).max())
            lines.append(Line(
                task, n, d, name, len(runs), statistics.median(walls),
                statistics.median(run["cpu"] for run in runs), (min(walls), max(walls)),
                ready[name]["compile"], ready[name]["cold"], differs,
            ))  # fmt: skip
        progress.update()
    return lines


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "task", "side", "runs", "wall ms", "(range)", "CPU ms", "compile s", "first call s",
        "peer / advjax, wall", "CPU", "cold", "bar", "aggregates differ by",
    ]  # fmt: skip
    cells = []
    for line in lines:
        peer = next(
            (p for p in lines if (p.task, p.n, p.d) == (line.task, line.n, line.d)
             and p.side != "advjax"), None,
        )  # fmt: skip
        is_ours = line.side == "advjax"
        bar = RULES.get(line.task) if line.n == 50 and line.task in RULES else None
        if line.task in ROUNDS:
            bar = ROUNDS[line.task].bar
        title = ROUNDS[line.task].title if line.task in ROUNDS else (
            f"{line.task}, n = {line.n}, d = {line.d:,}"
        )  # fmt: skip
        ratios = ["", "", ""]
        if is_ours and peer is not None:
            ratios = [
                f"{getattr(peer, key) / getattr(line, key):.2f}" for key in ("wall", "cpu", "cold")
            ]
        cells.append([
            title, line.side, str(line.runs), f"{1e3 * line.wall:.4g}",
            f"{1e3 * line.spread[0]:.3g}..{1e3 * line.spread[1]:.3g}", f"{1e3 * line.cpu:.4g}",
            f"{line.compile:.2f}" if is_ours else "", f"{line.cold:.2f}", *ratios,
            f"{bar:g}" if is_ours and bar else "",
            "" if line.differs is None else f"{line.differs:.1e}",
        ])  # fmt: skip
    return header, cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*RULES, *ROUNDS]
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", default=",".join(known), help="what to time, with commas")
    parser.add_argument("--sizes", default=",".join(f"{n}x{d}" for n, d in SIZES), help="NxD,...")
    parser.add_argument("--repeats", type=int, default=7, help="counted turns")
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
        if task not in known:
            parser.error(f"unknown task {task!r}; known: {', '.join(known)}.")
    args.sizes = [tuple(int(v) for v in size.split("x")) for size in args.sizes.split(",")]
    if args.smoke:
        args.sizes, args.repeats = [(20, 500)], 1
        args.output_dir = pathlib.Path(tempfile.mkdtemp())
    names = ["advjax"]
    if importlib.util.find_spec("byzfl") and importlib.util.find_spec("torch"):
        names.append("byzfl")
    else:
        common.say("byzfl is left out: byzfl or torch is not installed (see `make peers`).")
    from tqdm.auto import tqdm

    machine = common.machine()
    with tempfile.TemporaryDirectory() as text:
        folder = pathlib.Path(text)
        setup = {"threads": args.threads, "as_shipped": False, "cold": False}
        processes, about = {}, {}
        for name in names:
            processes[name] = Process(
                name, setup, folder, JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", "cpu")
            )
            about[name] = processes[name].receive()
        with tqdm() as progress:
            lines = measure(args, processes, folder, progress)
        for process in processes.values():
            process.close()
    machine["load_after"] = [round(load, 2) for load in os.getloadavg()]
    header, cells = table(lines)
    common.show("Aggregation and federated rounds", header, cells)
    backend = about["advjax"]["backend"]
    report = {
        "command": " ".join(sys.argv), "date": str(datetime.date.today()), "machine": machine,
        "settings": {"threads": args.threads, "num_byzantine": "a fifth of the clients"},
        "about": about, "table": (header, cells),
    }  # fmt: skip
    results = [line._asdict() for line in lines]
    common.write_results(
        args.output_dir, f"federated_{backend}", report, results,
        title="Aggregation rules and federated rounds against ByzFL and PyTorch",
        fields=Line._fields,
    )  # fmt: skip
    print(f"Written to {args.output_dir}/federated_{backend}.md")


if __name__ == "__main__":
    main()
