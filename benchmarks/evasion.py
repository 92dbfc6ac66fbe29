"""advjax against Foolbox, torchattacks and ART: the same weights, images and attacks, as ratios.

    make bench                                     # everything, in an environment with the peers
    python benchmarks/evasion.py --rows=fgsm,pgd   # some of it
    python benchmarks/evasion.py --smoke           # does it run? one to four minutes
    python benchmarks/evasion.py --parity          # does every attack find what Foolbox's finds?

Prints a table and writes benchmarks/results/evasion_cpu.{md,csv,json}. What is timed, how, and
what the columns mean is in benchmarks/README.md. A peer that is not installed is left out.

Cost of the defaults: about half an hour on two idle CPU cores, most of it the 32-epsilon curves.
"""

import argparse
import contextlib
import csv
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

# Nothing heavier is imported here: this file is also the program of every competitor's process,
# and the time of their imports is one of the results.

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
REFERENCE = REPOSITORY.parent / "shared" / "reference"
TFDS = REPOSITORY.parent / "shared" / "tfds"

PEERS = ("foolbox", "torchattacks", "art")
METHODS = ("map", "vmap", "bisect", "active")
IMPORTS = {
    "advjax": ("jax", "advjax", "advjax.attacks", "advjax.evaluation", "advjax.models"),
    "foolbox": ("torch", "foolbox"),
    "torchattacks": ("torch", "torchattacks"),
    "art": ("torch", "art.attacks.evasion", "art.estimators.classification"),
    "autoattack": ("torch", "autoattack"),
}
PACKAGES = {
    "advjax": ("advjax", "jax", "jaxlib", "flax", "numpy"),
    "foolbox": ("foolbox", "eagerpy", "torch"),
    "torchattacks": ("torchattacks", "torch"),
    "art": ("adversarial-robustness-toolbox", "torch"),
    "autoattack": ("autoattack", "torch"),
}

# Images that a vectorised curve holds at a time, over all its epsilons.
_VMAP_IMAGES = 4096


class Row(NamedTuple):
    """A task that every competitor does.

    Attributes:
      title: what it is; `{steps}` is the number of PGD's steps.
      num_epsilons: 0 for an attack at one epsilon, else the length of the curve.
      target: least ratio of the fastest peer's wall time to ours, from the project's plan.
      cold: in a fresh process, with compilation.
    """

    title: str
    num_epsilons: int
    target: float
    cold: bool = False


ROWS = {
    "fgsm": Row("FGSM", 0, 1.3),
    "pgd": Row("PGD-{steps}", 0, 1.2),
    "curve8": Row("PGD-{steps} at 8 epsilons", 8, 2.5),
    "curve32": Row("PGD-{steps} at 32 epsilons", 32, 7.0),
    "cold8": Row("PGD-{steps}, 8 epsilons, fresh process", 8, 1.0, cold=True),
}


def epsilons_of(row: str) -> list[float]:
    return [float(e) for e in np.linspace(0.02, 0.3, ROWS[row].num_epsilons)]


# ------------------------------------------------------------------------ a competitor's process


class Competitor(NamedTuple):
    """One library, ready to attack.

    Attributes:
      logits: `() -> [n, k]` on the clean images.
      attack: `(name, epsilon) -> x_adv`, computed when it returns; name is "fgsm" or "pgd".
      accuracy: `x_adv -> float`.
      curve: `(epsilons, method) -> [len(epsilons)]` robust accuracies, on the host.
      parity: `(name, epsilons) -> [len(epsilons)]` number of correct images.
      about: facts for the report.
    """

    logits: Any
    attack: Any
    accuracy: Any
    curve: Any
    parity: Any
    about: dict


def build_advjax(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import jax
    import jax.numpy as jnp

    import advjax
    from advjax import attacks, balls, evaluation, models, parallel

    parallel.use_cores(setup["threads"])
    mesh = parallel.make_mesh() if len(x) % setup["threads"] == 0 else None
    logits_fn = advjax.bind(models.make("cnn", 10), models.from_reference_npz(weights))
    key = jax.random.key(0)
    # Once, like torch's tensors: the arrays on the devices, split over them.
    host = x, y.astype(np.int32)
    key, logits_fn = parallel.place((key, logits_fn), mesh)
    x, y = jax.tree.map(jnp.asarray, parallel.place(host, mesh, axis=0))
    pgd = functools.partial(attacks.pgd, num_steps=setup["num_steps"], relative_step_size=1 / 30)
    compiled = {"fgsm": jax.jit(attacks.fgsm), "pgd": jax.jit(pgd)}
    deterministic = {
        "fgsm": attacks.fgsm,
        "bim": functools.partial(attacks.bim, num_steps=40, relative_step_size=1 / 30),
        "pgd_l2": functools.partial(
            attacks.pgd, num_steps=50, relative_step_size=0.025, random_start=False, ball=balls.l2
        ),
    }
    default = evaluation.default_method(pgd)

    def curve(epsilons, method):
        batch_size = max(1, _VMAP_IMAGES // len(epsilons)) if method == "vmap" else None
        options = {"method": method, "batch_size": batch_size, "mesh": mesh}
        return np.asarray(
            evaluation.robust_accuracy(key, pgd, logits_fn, *host, epsilons, **options)
        )

    @functools.cache
    def counter(name):
        # Not `robust_accuracy`: parity is about the attack at each epsilon, not about the
        # accumulated curve.
        def correct(logits_fn, epsilon):
            x_adv = deterministic[name](key, logits_fn, x, y, epsilon)
            return jnp.sum(advjax.metrics.is_correct(logits_fn(x_adv), y))

        return jax.jit(correct)

    return Competitor(
        logits=lambda: np.asarray(jax.jit(lambda f, x: f(x))(logits_fn, x)),
        attack=lambda name, epsilon: jax.block_until_ready(
            compiled[name](key, logits_fn, x, y, epsilon)
        ),
        accuracy=lambda x_adv: float(evaluation.accuracy(logits_fn, x_adv, y)),
        curve=curve,
        parity=lambda name, epsilons: [int(counter(name)(logits_fn, e)) for e in epsilons],
        about={"default_method": default, "backend": jax.default_backend()},
    )


def _torch_network(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict):
    """The reference network in PyTorch (inference mode, no parameter gradients), and the images."""
    import torch

    torch.set_num_threads(setup["threads"])
    torch.manual_seed(0)
    # Our dense layer reads H, W, C; torch's flatten gives C, H, W.
    dense1 = weights["dense1_kernel"].reshape(x.shape[1] // 4, x.shape[2] // 4, 32, -1)
    dense1 = dense1.transpose(2, 0, 1, 3).reshape(weights["dense1_kernel"].shape)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(dense1.shape[0], 100),
        torch.nn.ReLU(),
        torch.nn.Linear(100, 10),
    )
    kernels = (
        weights["conv1_kernel"].transpose(3, 2, 0, 1),
        weights["conv2_kernel"].transpose(3, 2, 0, 1),
        dense1.T,
        weights["dense2_kernel"].T,
    )
    layers = [layer for layer in net if hasattr(layer, "weight")]
    with torch.no_grad():
        for layer, name, kernel in zip(
            layers, ("conv1", "conv2", "dense1", "dense2"), kernels, strict=True
        ):
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel)))
            layer.bias.copy_(torch.from_numpy(weights[f"{name}_bias"]))
    net.eval().requires_grad_(False)
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if setup["channels_last"]:
        net = net.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    return net, x, torch.from_numpy(y.astype(np.int64))


def _torch_logits(net, x):
    import torch

    with torch.no_grad():
        return net(x)


def _torch_accuracy(net, x, y) -> float:
    return float((_torch_logits(net, x).argmax(-1) == y).float().mean())


def build_foolbox(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import foolbox

    net, x, y = _torch_network(setup, x, y, weights)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    known = {
        "fgsm": foolbox.attacks.LinfFastGradientAttack(),
        "pgd": foolbox.attacks.LinfProjectedGradientDescentAttack(
            rel_stepsize=1 / 30, steps=setup["num_steps"], random_start=True
        ),
        "bim": foolbox.attacks.LinfBasicIterativeAttack(
            rel_stepsize=1 / 30, steps=40, random_start=False
        ),
        "pgd_l2": foolbox.attacks.L2ProjectedGradientDescentAttack(
            rel_stepsize=0.025, steps=50, random_start=False
        ),
    }

    def curve(epsilons, method):
        _, _, success = known["pgd"](model, x, y, epsilons=epsilons)
        return 1 - success.float().mean(-1).numpy()

    def parity(name, epsilons):
        _, _, success = known[name](model, x, y, epsilons=epsilons)
        return [int(count) for count in (~success).sum(-1)]

    return Competitor(
        logits=lambda: _torch_logits(net, x).numpy(),
        attack=lambda name, epsilon: known[name](model, x, y, epsilons=epsilon)[1],
        accuracy=lambda x_adv: _torch_accuracy(net, x_adv, y),
        curve=curve,
        parity=parity,
        about={},
    )


def build_torchattacks(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import torchattacks

    net, x, y = _torch_network(setup, x, y, weights)

    # It asks the network's parameters for their device when an attack is made.
    def attack(name, epsilon):
        if name == "fgsm":
            return torchattacks.FGSM(net, eps=epsilon)(x, y)
        return torchattacks.PGD(
            net, eps=epsilon, alpha=epsilon / 30, steps=setup["num_steps"], random_start=True
        )(x, y)

    return Competitor(
        logits=lambda: _torch_logits(net, x).numpy(),
        attack=attack,
        accuracy=lambda x_adv: _torch_accuracy(net, x_adv, y),
        curve=lambda epsilons, method: np.array(
            [_torch_accuracy(net, attack("pgd", e), y) for e in epsilons]
        ),
        parity=None,
        about={},
    )


def build_art(setup: dict, x: np.ndarray, y: np.ndarray, weights: dict) -> Competitor:
    import torch
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    net, x, _ = _torch_network(setup, x, y, weights)
    x, batch_size = x.numpy(), len(x)
    classifier = PyTorchClassifier(
        net,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=x.shape[1:],
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )

    def attack(name, epsilon):
        if name == "fgsm":
            made = evasion.FastGradientMethod(classifier, eps=epsilon, batch_size=batch_size)
        else:
            made = evasion.ProjectedGradientDescent(
                classifier, eps=epsilon, eps_step=epsilon / 30, max_iter=setup["num_steps"],
                num_random_init=1, batch_size=batch_size, verbose=False,
            )  # fmt: skip
        return made.generate(x, y)

    def accuracy(x_adv):
        answers = classifier.predict(x_adv, batch_size=batch_size).argmax(-1)
        return float((answers == y).mean())

    return Competitor(
        logits=lambda: _torch_logits(net, torch.from_numpy(x)).numpy(),
        attack=attack,
        accuracy=accuracy,
        curve=lambda epsilons, method: np.array([accuracy(attack("pgd", e)) for e in epsilons]),
        parity=None,
        about={},
    )


BUILDERS = {
    "advjax": build_advjax,
    "foolbox": build_foolbox,
    "torchattacks": build_torchattacks,
    "art": build_art,
}


class Stopwatch:
    """Wall time and the processor time of all threads of this process."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


def perform(competitor: Competitor, order: dict) -> dict:
    """Does one task; the accuracy of a single attack is computed outside its time."""
    row, epsilons = order["row"], order["epsilons"]
    if row == "parity":
        return {"correct": competitor.parity(order["name"], epsilons)}
    stopwatch = Stopwatch()
    if ROWS[row].num_epsilons:
        accuracies = competitor.curve(epsilons, order["method"])
        return {**stopwatch.read(), "robust_accuracy": [float(a) for a in accuracies]}
    x_adv = competitor.attack(row, order["epsilon"])
    return {**stopwatch.read(), "robust_accuracy": [competitor.accuracy(x_adv)]}


def work(builders: dict, perform: Any) -> None:
    """A competitor's process: a setup and then tasks as lines of JSON, an answer to each."""
    # Libraries may print; only answers go to the parent.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    name = setup["name"]
    # The same processors for everybody: XLA would take all there are.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup["threads"]])
    with np.load(setup["arrays"], allow_pickle=False) as file:
        x, y = file["x"], file["y"]
    with np.load(setup["weights"], allow_pickle=False) as file:
        weights = {key: file[key] for key in file.files}
    for module in IMPORTS[name]:
        importlib.import_module(module)

    stopwatch = Stopwatch()
    competitor = builders[name](setup, x, y, weights)
    if setup["cold"]:
        order = {"row": "cold8", "epsilons": setup["epsilons"], "method": None}
        result = {**perform(competitor, order), **stopwatch.read()}
        result["wall_with_imports"] = time.time() - setup["spawned"]
        result["cpu_with_imports"] = time.process_time()
        answer(result)
        return
    answer({
        "logits": competitor.logits().tolist(),
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES[name]},
        **competitor.about,
    })  # fmt: skip
    for line in sys.stdin:
        answer(perform(competitor, json.loads(line)))


# ------------------------------------------------------------------------------- the other side


class Failed(Exception):  # noqa: N818
    """A competitor's process ended; the text is its last line."""


class Process:
    """A competitor's process, seen from the parent."""

    program = __file__

    def __init__(self, name: str, setup: dict, folder: pathlib.Path, **env: str):
        self._log = (folder / f"{name}.log").open("w+")
        env = {
            **os.environ,
            # With the default, idle OpenMP threads spin: that costs torch two to three times the
            # processor time on a busy machine, and everybody else the processor.
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": str(setup["threads"]),
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # as our launchers set it
            "CUDA_VISIBLE_DEVICES": "",
            **env,
        }
        if not setup["as_shipped"]:
            # glibc takes buffers above 32 MB from the kernel anew each time; importing advjax ends
            # that, so everybody gets it.
            env["MALLOC_MMAP_THRESHOLD_"] = env["MALLOC_TRIM_THRESHOLD_"] = str(2**31 - 1)
        if "JAX_COMPILATION_CACHE_DIR" not in env or not setup["cold"]:
            env.pop("JAX_COMPILATION_CACHE_DIR", None)
        spawned = time.time()
        # -P: this folder does not go on the path, so `conv` and `evasion` shadow nothing.
        self._process = subprocess.Popen(
            [sys.executable, "-P", self.program, "--worker"], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._send({**setup, "name": name, "spawned": spawned})

    def _send(self, value: dict) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read().strip().splitlines() or ["it said nothing"]
            raise Failed(said[-1])
        return json.loads(line)

    def ask(self, order: dict) -> dict:
        self._send(order)
        return self.receive()

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def installed(names: list[str]) -> list[str]:
    """Those of the peers that are installed; says which are not."""
    found = []
    for name in names:
        missing = [m.partition(".")[0] for m in IMPORTS[name]]
        missing = [m for m in dict.fromkeys(missing) if importlib.util.find_spec(m) is None]
        if missing:
            say(f"{name} is left out: {' and '.join(missing)} not installed (see `make peers`).")
        else:
            found.append(name)
    return found


def start(
    names: list[str], setup: dict, folder: pathlib.Path, process: type[Process] = Process
) -> tuple[dict, dict]:
    """Starts the competitors and checks that they hold the same network."""
    processes, about = {}, {}
    for name in names:
        try:
            processes[name] = process(name, setup, folder)
            about[name] = processes[name].receive()
        except Failed as error:
            if name == "advjax":
                raise
            say(f"{name} is left out, it does not start: {error}")
            processes.pop(name).close()
    logits = {name: np.array(facts.pop("logits")) for name, facts in about.items()}
    for name in processes:
        gap = float(np.abs(logits[name] - logits["advjax"]).max())
        about[name]["logits_differ_by"] = gap
        if not gap <= 1e-4:
            raise Failed(f"the logits of {name} differ from ours by {gap:.1e}")
    return processes, about


def measure(args, processes: dict, cold, progress) -> list[dict]:
    """Every row: competitors take turns, the first turn does not count."""
    results = []
    failed = set()

    def contenders(row):
        for name in processes:
            if name == "advjax" and ROWS[row].num_epsilons and not ROWS[row].cold:
                yield from ((name, method) for method in args.methods)
            else:
                yield name, None

    def once(row, name, method, repeat):
        if ROWS[row].cold:
            return cold(name)
        epsilons = epsilons_of(row)
        # Nothing of a peer depends on the number of epsilons, and these are minutes.
        if repeat == 0 and name != "advjax" and row == "curve32":
            epsilons = epsilons[:1]
        order = {"row": row, "epsilons": epsilons, "epsilon": args.epsilon, "method": method}
        return processes[name].ask(order)

    for row in args.rows:
        first = 1 if ROWS[row].cold else 0  # a fresh process has no run to discard
        turns = list(contenders(row))
        for repeat in range(first, args.runs[row] + 1):
            shift = repeat % len(turns)
            for name, method in turns[shift:] + turns[:shift]:
                if name in failed:
                    continue
                progress.set_description(
                    " ".join([row, name, method or "", str(repeat)]), refresh=False
                )
                try:
                    result = once(row, name, method, repeat)
                except Failed as error:
                    if name == "advjax":
                        raise
                    say(f"{name} is left out from {row} on: {error}")
                    failed.add(name)
                    continue
                finally:
                    progress.update()
                cached = result.pop("cached", None)
                facts = {"row": row, "competitor": name, "method": method, "repeat": repeat}
                results.append({**facts, **result, "counts": repeat > 0})
                if cached:
                    facts["method"] = "cached"
                    results.append({**facts, **cached, "counts": True})
    return results


# ------------------------------------------------------------------------------------- results


class Line(NamedTuple):
    """The medians of one competitor in one row."""

    row: str
    competitor: str
    method: str | None
    runs: int
    wall: float
    cpu: float
    spread: tuple[float, float]  # of the wall time
    wall_with_imports: float | None
    cpu_with_imports: float | None
    robust_accuracy: list[float]


def summarise(results: list[dict]) -> list[Line]:
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        if result["counts"]:
            key = (result["row"], result["competitor"], result["method"])
            groups.setdefault(key, []).append(result)

    def median(runs, key):
        return statistics.median(run[key] for run in runs) if key in runs[0] else None

    return [
        Line(
            *key, len(runs), median(runs, "wall"), median(runs, "cpu"),
            (min(r["wall"] for r in runs), max(r["wall"] for r in runs)),
            median(runs, "wall_with_imports"), median(runs, "cpu_with_imports"),
            np.mean([run["robust_accuracy"] for run in runs], axis=0).tolist(),
        )
        for key, runs in groups.items()
    ]  # fmt: skip


def ratio(lines: list[Line], line: Line, key: str) -> float | None:
    """The fastest peer's time over this line's."""
    times = [getattr(p, key) for p in lines if p.row == line.row and p.competitor in PEERS]
    return min(times) / getattr(line, key) if times else None


def weaker(lines: list[Line], line: Line) -> float | None:
    """Points by which the attack leaves more images correct than the strongest peer, at worst."""
    curves = [
        np.minimum.accumulate(p.robust_accuracy)
        for p in lines
        if p.row == line.row and p.competitor in PEERS
    ]
    if not curves:
        return None
    return 100 * float(np.max(line.robust_accuracy - np.min(curves, axis=0)))


def table(lines: list[Line], about: dict, num_steps: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "task", "library", "runs", "wall s", "(range)", "CPU s", "robust acc. %",
        "weaker by, points", "peer / advjax, wall", "CPU", "target",
    ]  # fmt: skip

    def number(value, form):
        return "" if value is None else format(value, form)

    rows = []
    names, methods = ("advjax", *PEERS), (None, *METHODS, "cached")
    order = lambda line: (names.index(line.competitor), methods.index(line.method))  # noqa: E731
    for line in sorted(lines, key=lambda line: (list(ROWS).index(line.row), *order(line))):
        row = ROWS[line.row]
        title = row.title.format(steps=num_steps)
        name = line.competitor
        if line.method:
            name += f" {line.method}"
            name += " (default)" * (line.method == about["advjax"]["default_method"])

        def cells(title, wall, cpu, spread, wall_key, cpu_key, target, line=line, name=name):
            gap = weaker(lines, line)
            is_ours = line.competitor == "advjax"
            return [
                title, name, str(line.runs), f"{wall:.3g}", spread, f"{cpu:.3g}",
                f"{100 * np.mean(line.robust_accuracy):.2f}", number(gap, "+.2f"),
                number(ratio(lines, line, wall_key) if is_ours else None, ".2f"),
                number(ratio(lines, line, cpu_key) if is_ours else None, ".2f"),
                f"{target:g}" if is_ours and target else "",
            ]  # fmt: skip

        spread = f"{line.spread[0]:.3g}..{line.spread[1]:.3g}"
        target = row.target if line.method != "cached" else None
        rows.append(cells(title, line.wall, line.cpu, spread, "wall", "cpu", target))
        if row.cold:
            keys = ("wall_with_imports", "cpu_with_imports")
            walls = [getattr(line, key) for key in keys]
            rows.append(cells(f"{title}, with imports", *walls, "", *keys, None))
    # Stable: the lines of one title stay in the order of the competitors.
    titles = list(dict.fromkeys(cells[0] for cells in rows))
    return header, sorted(rows, key=lambda cells: titles.index(cells[0]))


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    return {
        "processor": name,
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


FIELDS = (
    "row", "competitor", "method", "repeat", "counts", "wall", "cpu",
    "wall_with_imports", "cpu_with_imports", "robust_accuracy",
)  # fmt: skip


def write_results(
    folder: pathlib.Path,
    stem: str,
    report: dict,
    results: list[dict],
    title: str = "Attacks and robustness curves against the peers",
    fields: tuple[str, ...] = FIELDS,
) -> None:
    from advjax.core import io

    def as_text(value):
        return " ".join(f"{v:.5f}" for v in value) if isinstance(value, list) else value

    folder.mkdir(parents=True, exist_ok=True)
    header, cells = report["table"]
    facts = {**report["machine"], **report["settings"]}
    text = [
        f"# {title}", "",
        f"`python {report['command']}`, {report['date']}. What is timed, how, and what the columns "
        "mean: [benchmarks/README.md](../README.md). Raw numbers: the .csv and .json beside this.",
        "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in cells), "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        *(
            f"- {name}: " + ", ".join(f"{k} {v}" for k, v in a["versions"].items())
            + (
                f"; logits differ from ours by at most {a['logits_differ_by']:.1e}"
                if "logits_differ_by" in a else ""
            )
            for name, a in report["about"].items()
        ), "",
    ]  # fmt: skip
    io.write_text(folder / f"{stem}.md", "\n".join(text))
    io.write_json(folder / f"{stem}.json", {**report, "results": results})
    with io.atomic_write(folder / f"{stem}.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for result in results:
            writer.writerow({key: as_text(value) for key, value in result.items()})


def show(title: str, header: list[str], cells: list[list[str]]) -> None:
    from rich import box, console
    from rich.table import Table

    drawn = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    for i, name in enumerate(header):
        drawn.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    before = None
    for row in cells:
        if before not in (None, row[0]):
            drawn.add_section()
        drawn.add_row("" if row[0] == before else row[0], *row[1:])
        before = row[0]
    # A file has no width; a terminal has its own.
    out = console.Console()
    if not out.is_terminal:
        out = console.Console(width=180)
    out.print(drawn)


# -------------------------------------------------------------------------------------- parity

PARITY = {
    "fgsm": ("FGSM", "linf", "fgsm_correct"),
    "bim": ("BIM-40, step epsilon / 30", "linf", "bim40_alpha_eps_over_30_correct"),
    "pgd_l2": ("L2 PGD-50, step 0.025 epsilon", "l2", "l2_pgd50_rel_step_0.025_correct"),
}


def parity(args, folder: pathlib.Path) -> bool:
    """Correct images under three deterministic attacks: ours, Foolbox's, and the stored counts."""
    stored = json.loads((args.reference / "evasion.json").read_text())
    with np.load(args.reference / "mnist_test256.npz", allow_pickle=False) as file:
        x, y = file["x"][..., None].astype(np.float32) / 255, file["y"]
    np.savez(folder / "arrays.npz", x=x, y=y)
    cells, is_same = [], True
    names = ["advjax", *installed(["foolbox"] if "foolbox" in args.peers else [])]
    for network in ("mnist_standard", "mnist_adversarial"):
        setup = {**base_setup(args, folder), "weights": str(args.reference / f"{network}.npz")}
        processes, _ = start(names, setup, folder)
        try:
            for name, (title, norm, key) in PARITY.items():
                epsilons = stored[network][f"{norm}_epsilons"]
                order = {"row": "parity", "name": name, "epsilons": epsilons}
                counts = {who: p.ask(order)["correct"] for who, p in processes.items()}
                for i, epsilon in enumerate(epsilons):
                    ours, theirs = counts["advjax"][i], stored[network][key][i]
                    live = counts["foolbox"][i] if "foolbox" in counts else None
                    gap = max(abs(ours - other) for other in (theirs, live) if other is not None)
                    is_same &= gap <= 1
                    cells.append([
                        f"{network} {title}", f"{epsilon:g}", str(ours),
                        "" if live is None else str(live), str(theirs),
                        "same" if gap == 0 else f"{gap} apart",
                    ])  # fmt: skip
        finally:
            for process in processes.values():
                process.close()
    header = ["network, attack", "epsilon", "advjax", "Foolbox now", "Foolbox stored", ""]
    show(f"Correct images of {len(x)}", header, cells)
    print("Everywhere within one." if is_same else "Not everywhere within one.")
    return is_same


# ---------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    """Bad flags are one sentence and exit code 2."""

    def error(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def listed(known):
    """The type of a flag: names of `known`, separated by commas."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown name {name!r}; known: {', '.join(known)}"
                )
        return names

    return parse


def at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"need a whole number >= 1, got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip

    def radius(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"need a number from 0 to 1, got {text!r}")
        return value

    add = parser.add_argument
    add("--rows", type=listed(ROWS), default=list(ROWS), help=f"of {', '.join(ROWS)}")
    add("--methods", type=listed(METHODS), default=list(METHODS), help="of our curves")
    add("--peers", type=listed(PEERS), default=list(PEERS), help="may be empty")
    add("--num_images", type=at_least_one, default=512, help="first test images")
    add("--repeats", type=at_least_one, default=5, help="counted runs (README: not of every row)")
    add("--epsilon", type=radius, default=0.15, help="of FGSM and PGD at one epsilon")
    add("--num_steps", type=at_least_one, default=40, help="steps of PGD")
    add("--threads", type=at_least_one, default=2, help="processors for each competitor")
    add("--dataset", default="mnist", help="mnist, or reference: the 256 images of --reference")
    add("--data_dir", default=None, help="tfds data; else TFDS_DATA_DIR, else ../shared/tfds")
    add("--reference", type=pathlib.Path, default=REFERENCE, help="folder of mnist_standard.npz")
    add("--output_dir", type=pathlib.Path, default=None, help="else benchmarks/results")
    add("--channels_last", action="store_true", help="torch in NHWC, which no peer does by itself")
    add("--as_shipped", action="store_true", help="peers without the glibc setting that we make")
    add("--parity", action="store_true", help="compare counts with Foolbox's, no times")
    add("--smoke", action="store_true", help="tiny; writes only where --output_dir says")
    args = parser.parse_args(arguments)
    if args.dataset not in ("mnist", "reference"):
        parser.error(
            f"argument --dataset: unknown name {args.dataset!r}; known: mnist, reference "
            "(the network is one for 28x28 digits)"
        )
    for name, part in (("rows", args.rows), ("methods", args.methods)):
        if not part:
            parser.error(f"argument --{name}: need at least one name")
    for file in ("mnist_standard.npz", "mnist_test256.npz", "evasion.json"):
        if not (args.reference / file).is_file():
            parser.error(f"argument --reference: {args.reference} has no {file}")
    if args.smoke:
        args.num_images, args.num_steps, args.repeats = min(args.num_images, 32), 3, 1
    elif args.output_dir is None:
        args.output_dir = REPOSITORY / "benchmarks" / "results"
    few = min(args.repeats, 3)
    args.runs = {
        "fgsm": 4 * args.repeats,
        "pgd": args.repeats,
        "curve8": few,
        "curve32": 1 if args.repeats < 5 else 2,
        "cold8": few,
    }
    return args


def base_setup(args, folder: pathlib.Path) -> dict:
    return {
        "arrays": str(folder / "arrays.npz"),
        "weights": str(args.reference / "mnist_standard.npz"),
        "threads": min(args.threads, os.cpu_count() or 1),
        "num_steps": args.num_steps,
        "channels_last": args.channels_last,
        "as_shipped": args.as_shipped,
        "cold": False,
    }


def load_images(args) -> tuple[np.ndarray, np.ndarray]:
    if args.dataset == "reference":
        with np.load(args.reference / "mnist_test256.npz", allow_pickle=False) as file:
            images, labels = file["x"][..., None], file["y"]
    else:
        from advjax import data

        where = (
            args.data_dir or os.environ.get("TFDS_DATA_DIR") or (TFDS if TFDS.exists() else None)
        )
        digits = data.load("mnist", "test", data_dir=where)
        images, labels = digits.images, digits.labels
    if len(images) < args.num_images:
        raise ValueError(
            f"--num_images: need at most {len(images)} for --dataset={args.dataset}, "
            f"got {args.num_images}."
        )
    images, labels = images[: args.num_images], labels[: args.num_images]
    return images.astype(np.float32) / 255, labels.astype(np.int32)


def benchmark(args, folder: pathlib.Path) -> None:
    import tqdm

    about_machine = machine()
    x, y = load_images(args)
    np.savez(folder / "arrays.npz", x=x, y=y)
    setup = base_setup(args, folder)

    def cold(name: str) -> dict:
        def run(cache: str) -> dict:
            now = {**setup, "cold": True, "epsilons": epsilons_of("cold8")}
            process = Process(f"cold_{name}"[5:], now, folder, JAX_COMPILATION_CACHE_DIR=cache)
            try:
                return process.receive()
            finally:
                process.close()

        with tempfile.TemporaryDirectory(dir=folder) as cache:
            result = run(cache)
            # The user's second process: the programs come from the persistent cache.
            return {**result, "cached": run(cache)} if name == "advjax" else result

    processes, about = start(["advjax", *installed(args.peers)], setup, folder)
    try:
        total = sum(
            (args.runs[row] + (not ROWS[row].cold))
            * (len(processes) + (len(args.methods) - 1) * (row in ("curve8", "curve32")))
            for row in args.rows
        )
        with tqdm.tqdm(
            total=total, unit="run", mininterval=1 if sys.stderr.isatty() else 30
        ) as progress:
            results = measure(args, processes, cold, progress)
    finally:
        for process in processes.values():
            process.close()
    lines = summarise(results)
    cells = table(lines, about, args.num_steps)
    settings = {
        "images": f"{len(x)} of {args.dataset}",
        "epsilon": args.epsilon,
        "steps": f"{args.num_steps} of epsilon / 30, random start",
        "threads": setup["threads"],
        "channels_last": args.channels_last,
        "glibc": "the peers' own default" if args.as_shipped else "keeps large buffers, for all",
    }
    show(f"{settings['images']}, {about_machine['processor']}, {setup['threads']} threads", *cells)
    if args.output_dir is not None:
        stem = f"evasion_{about['advjax']['backend']}" + "_as_shipped" * args.as_shipped
        report = {
            "command": " ".join(["benchmarks/evasion.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": {**about_machine, "load_after": [round(v, 2) for v in os.getloadavg()]},
            "settings": settings,
            "about": about,
            "table": cells,
            "lines": [line._asdict() for line in lines],
        }
        write_results(args.output_dir, stem, report, results)
        print(f"Written: {args.output_dir / stem}.md, .csv, .json")


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    try:
        # JAX in this process only loads images and writes files.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        with tempfile.TemporaryDirectory(prefix="advjax-bench-") as folder:
            if args.parity:
                sys.exit(0 if parity(args, pathlib.Path(folder)) else 1)
            benchmark(args, pathlib.Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Failed as error:
        print(f"error: a competitor failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    work(BUILDERS, perform) if sys.argv[1:] == ["--worker"] else main()
