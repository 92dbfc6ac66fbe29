"""What crafting an update of FMPA costs beside the honest work of the malicious clients.

    PYTHONPATH=. python benchmarks/fmpa.py            # everything
    PYTHONPATH=. python benchmarks/fmpa.py --smoke    # does it run?

Prints a table and writes benchmarks/results/fmpa_BACKEND.{md,csv,json}. Only ours: no other code
has I-FMPA. The honest work is the local training of the m malicious clients of a round, one after
the other as the simulator does it on a CPU; the crafting is `craft` with the default search and
everything in it, forced to its last step and last look at the accuracy, the most that a round can
cost. Both are compiled, called once, and take turns. The bar, at most three times the honest work,
is for i_fmpa.

Cost of the defaults: two minutes on two idle CPU cores.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import statistics
import sys
import tempfile
from typing import NamedTuple

import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parent))
import evasion as common

BAR = 3.0  # times the honest work, from the project's plan


class Setting(NamedTuple):
    """Federated training of a network 784-HIDDEN-10."""

    title: str
    hidden: int
    num_clients: int
    num_byzantine: int
    images: int  # of a client
    num_steps: int
    batch_size: int


SETTINGS = {
    "small": Setting("784-64-10, 4 of 20, 10 steps of 16", 64, 20, 4, 200, 10, 16),
    "mnist_fc": Setting("784-512-10, 10 of 50, 10 steps of 16", 512, 50, 10, 1200, 10, 16),
    "mnist_fc_epochs": Setting("784-512-10, 10 of 50, 100 steps of 10", 512, 50, 10, 200, 100, 10),
}
SMOKE = Setting("784-8-10, 2 of 5, 2 steps of 4", 8, 5, 2, 10, 2, 4)


def build(setting: Setting, num_search_steps: int | None):
    """Compiled calls by name, and the number of parameters."""
    import jax
    import jax.numpy as jnp
    import optax

    from advjax import federated, models, poisoning
    from advjax.core import vectors
    from advjax.federated.clients import Client

    rng = np.random.default_rng(0)
    shape = (setting.num_clients, setting.images)
    net = models.make("mlp", 10, hidden=(setting.hidden,))
    images = jnp.asarray(rng.integers(0, 256, (*shape, 28, 28, 1), np.uint8))
    variables = dict(net.init(jax.random.key(0), images[0, :1] / 255))
    params, unravel = vectors.ravel(variables)
    # The network's own answers: it is right, and stays so at a rate of almost nothing, so that the
    # search never ends before its last step.
    labels = jax.lax.map(lambda x: jnp.argmax(net.apply(variables, x / 255), axis=-1), images)
    local = federated.FedAvg(num_steps=setting.num_steps, batch_size=setting.batch_size)
    search = poisoning.Search(optimizer=optax.sgd(1e-12))
    if num_search_steps is not None:
        search = search._replace(num_steps=num_search_steps)
    is_byzantine = jnp.arange(setting.num_clients) < setting.num_byzantine
    arrays = images, labels.astype(jnp.int32)

    def honest(key, params, arrays):
        images, labels = (array.reshape(-1, *array.shape[2:]) for array in arrays)
        index = jnp.arange(labels.size).reshape(shape)

        def train(number):
            client = Client(
                jax.random.fold_in(key, number), images, labels, index[number],
                jnp.int32(setting.images),
            )  # fmt: skip
            return local.train(net, client, unravel(params), (), jnp.float32(0.1))[0]

        changes = jax.lax.map(train, jnp.arange(setting.num_byzantine))
        return jax.vmap(lambda change: vectors.ravel(change)[0])(changes)

    def crafting(attack):
        def craft(key, params, arrays, updates, memory):
            images, labels = arrays
            context = poisoning.Context(
                params=params, round=jnp.int32(0), server_rate=jnp.float32(1),
                clients=jnp.arange(setting.num_clients),
                counts=jnp.full(setting.num_clients, setting.images),
                examples=lambda row, at: (images[row, at] / 255, labels[row, at]),
                logits_fn=lambda params, x: net.apply(unravel(params), x),
                initialise=lambda key: params,
            )  # fmt: skip
            return attack.craft(key, updates, is_byzantine, context, memory)

        return craft

    updates = 1e-3 * jax.random.normal(jax.random.key(1), (setting.num_clients, params.size))
    key = jax.random.key(2)
    calls = {"honest work": (honest, (key, params, arrays))}
    for name, attack in {
        "i_fmpa": poisoning.i_fmpa(search=search),
        "f_fmpa": poisoning.f_fmpa(target_accuracy=0.01, search=search._replace(check_every=1)),
    }.items():
        memory = attack.init(key, params)
        calls[name] = crafting(attack), (key, params, arrays, updates, memory)
    compiled = {}
    for name, (function, args) in calls.items():
        stopwatch = common.Stopwatch()
        program = jax.jit(function).lower(*args).compile()
        seconds = stopwatch.read()["wall"]

        def run(program=program, args=args):
            return jax.block_until_ready(program(*args))

        run()
        compiled[name] = run, seconds
    return compiled, params.size


class Line(NamedTuple):
    """What one piece of work needed."""

    setting: str
    work: str
    d: int
    runs: int
    wall: float
    cpu: float
    spread: tuple[float, float]
    compile: float


def measure(names: list[str], repeats: int, smoke: bool) -> list[Line]:
    lines = []
    for name in names:
        setting = SMOKE if smoke else SETTINGS[name]
        compiled, d = build(setting, 2 if smoke else None)
        times: dict[str, list[dict]] = {work: [] for work in compiled}
        for _ in range(repeats):
            for work, (run, _) in compiled.items():
                stopwatch = common.Stopwatch()
                run()
                times[work].append(stopwatch.read())
        for work, runs in times.items():
            walls = [run["wall"] for run in runs]
            cpu = statistics.median(run["cpu"] for run in runs)
            wall, spread = statistics.median(walls), (min(walls), max(walls))
            seconds = compiled[work][1]
            lines.append(Line(setting.title, work, d, repeats, wall, cpu, spread, seconds))
    return lines


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "setting", "work", "d", "runs", "wall ms", "(range)", "CPU ms", "compile s",
        "of the honest work, wall", "CPU", "bar",
    ]  # fmt: skip
    cells = []
    for line in lines:
        honest = next(o for o in lines if o.setting == line.setting and o.work == "honest work")
        ratios = ["", ""]
        if line is not honest:
            ratios = [f"{getattr(line, k) / getattr(honest, k):.2f}" for k in ("wall", "cpu")]
        cells.append([
            line.setting, line.work, f"{line.d:,}", str(line.runs), f"{1e3 * line.wall:.4g}",
            f"{1e3 * line.spread[0]:.3g}..{1e3 * line.spread[1]:.3g}", f"{1e3 * line.cpu:.4g}",
            f"{line.compile:.2f}", *ratios, f"{BAR:g}" if line.work == "i_fmpa" else "",
        ])  # fmt: skip
    return header, cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which, with commas")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns")
    parser.add_argument("--output_dir", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "results")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny, writes nothing here")
    args = parser.parse_args()
    names = args.settings.split(",")
    for name in names:
        if name not in SETTINGS:
            parser.error(f"unknown setting {name!r}; known: {', '.join(SETTINGS)}.")
    if args.smoke:
        names, args.repeats = names[:1], 1
        args.output_dir = pathlib.Path(tempfile.mkdtemp())
    import jax

    machine = common.machine()
    lines = measure(names, args.repeats, args.smoke)
    machine["load_after"] = [round(load, 2) for load in os.getloadavg()]
    header, cells = table(lines)
    common.show("FMPA beside the honest work of its clients", header, cells)
    packages = ("advjax", "jax", "jaxlib", "optax")
    about = {"advjax": {"versions": {p: importlib.metadata.version(p) for p in packages}}}
    report = {
        "command": " ".join(sys.argv), "date": str(datetime.date.today()), "machine": machine,
        "settings": {"search": "the defaults of poisoning.Search, to the last step"},
        "about": about, "table": (header, cells),
    }  # fmt: skip
    stem = f"fmpa_{jax.default_backend()}"
    common.write_results(
        args.output_dir, stem, report, [line._asdict() for line in lines],
        title="FMPA beside the honest work of its clients", fields=Line._fields,
    )  # fmt: skip
    print(f"Written to {args.output_dir}/{stem}.md")


if __name__ == "__main__":
    main()
