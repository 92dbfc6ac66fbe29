"""What the benchmarks share in which advjax and PyTorch do the same work in turns.

A benchmark is a `Benchmark`: its tasks, a class a side, and who competes with which method. Each
side runs in a process of its own, once cold and then `--repeats` times, in alternating order.
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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# At the end of the path: a competitor's process starts without this folder.
sys.path.append(str(pathlib.Path(__file__).resolve().parent))
import evasion as common

PEER = "torch"


class Line(NamedTuple):
    """What one side needed for one task with one method."""

    task: str
    side: str
    method: str
    runs: int
    wall: float
    cpu: float
    spread: tuple[float, float]
    cold: float
    found: dict[str, Any]  # what the side said of its first result


class Benchmark(NamedTuple):
    """A comparison.

    Attributes:
      program: its file, which its processes run.
      description: its docstring, for --help.
      title: of its table.
      stem: of its files in benchmarks/results.
      tasks: by name; each has a `title`.
      sides: by name, a class: `side(threads)` with `packages` and `about`, and
        `side.prepare(task, order) -> (run, describe)`: `run()` is timed, `describe(result)` says
        what came out, as JSON values. A "scale" in it multiplies the times.
      contenders: (side, method) each; PyTorch's first one is what the ratios are against.
      settings: flags that are whole numbers, with their defaults; they are in `order`.
      smoke: settings of --smoke.
      columns: header and cells of what is special, from a line and all lines of its task.
    """

    program: str
    description: str
    title: str
    stem: str
    tasks: Mapping[str, Any]
    sides: Mapping[str, Any]
    contenders: tuple[tuple[str, str], ...]
    settings: Mapping[str, int]
    smoke: Mapping[str, int]
    columns: Callable[[Line, list[Line]], dict[str, str]]

    def main(self) -> None:
        """Parses the flags and runs: the comparison, or with --worker one side."""
        args = self._parse()
        if args.worker:
            self._work()
            return
        names = ["advjax"]
        if importlib.util.find_spec(PEER):
            names.append(PEER)
        else:
            common.say(f"{PEER} is left out: it is not installed (see `make peers`).")
        machine = common.machine()
        process = type("Process", (common.Process,), {"program": self.program})
        with tempfile.TemporaryDirectory() as text:
            setup = {"threads": args.threads, "as_shipped": False, "cold": False}
            platform = os.environ.get("JAX_PLATFORMS", "cpu")
            processes = {
                name: process(name, setup, pathlib.Path(text), JAX_PLATFORMS=platform)
                for name in names
            }
            about = {name: one.receive() for name, one in processes.items()}
            lines = self._measure(args, processes)
            for one in processes.values():
                one.close()
        machine["load_after"] = [round(load, 2) for load in os.getloadavg()]
        header, cells = self._table(lines)
        common.show(self.title, header, cells)
        stem = f"{self.stem}_{about['advjax']['backend']}"
        report = {
            "command": " ".join(sys.argv), "date": str(datetime.date.today()), "machine": machine,
            "settings": {
                name: getattr(args, name) for name in ("threads", "repeats", *self.settings)
            },
            "about": about, "table": (header, cells),
        }  # fmt: skip
        common.write_results(
            args.output_dir, stem, report, [line._asdict() for line in lines], title=self.title,
            fields=Line._fields,
        )  # fmt: skip
        print(f"Written to {args.output_dir}/{stem}.md")

    def _parse(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
        parser.add_argument("--tasks", default=",".join(self.tasks), help="with commas")
        numbers = {**self.settings, "repeats": 3, "threads": os.cpu_count() or 1}
        for name, default in numbers.items():
            parser.add_argument(f"--{name}", type=common.at_least_one, default=default)
        parser.add_argument("--output_dir", type=pathlib.Path,
                            default=pathlib.Path(__file__).parent / "results")  # fmt: skip
        parser.add_argument("--smoke", action="store_true", help="tiny, writes nothing here")
        args = parser.parse_args()
        args.tasks = args.tasks.split(",")
        for task in args.tasks:
            if task not in self.tasks:
                parser.error(f"unknown task {task!r}; known: {', '.join(self.tasks)}.")
        if args.smoke:
            vars(args).update(self.smoke, repeats=1, tasks=args.tasks[:1])
            args.output_dir = pathlib.Path(tempfile.mkdtemp())
        return args

    def _work(self) -> None:
        """A side's process: a setup, then orders as lines of JSON and an answer to each."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries may print; only answers go to the parent

        def answer(value: dict) -> None:
            print(json.dumps(value), file=answers, flush=True)

        setup = json.loads(sys.stdin.readline())
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup["threads"]])
        side = self.sides[setup["name"]](setup["threads"])
        versions = {package: importlib.metadata.version(package) for package in side.packages}
        answer({"versions": versions, **side.about})
        ready: dict[tuple[str, str], Any] = {}
        for line in sys.stdin:
            order = json.loads(line)
            place = order["task"], order["method"]
            if place not in ready:
                ready[place] = side.prepare(self.tasks[order["task"]], order)
            run, describe = ready[place]
            stopwatch = common.Stopwatch()
            result = run()
            times = stopwatch.read()
            found = describe(result)
            scale = found.pop("scale", 1)
            answer({**{name: scale * value for name, value in times.items()}, "found": found})

    def _measure(self, args, processes: Mapping[str, Any]) -> list[Line]:
        from tqdm.auto import tqdm

        contenders = [contender for contender in self.contenders if contender[0] in processes]
        settings = {name: getattr(args, name) for name in self.settings}
        lines = []
        with tqdm(total=len(args.tasks) * (1 + args.repeats) * len(contenders)) as progress:
            for task in args.tasks:
                runs: dict[Any, list[dict]] = {contender: [] for contender in contenders}
                for repeat in range(1 + args.repeats):
                    for name, method in contenders if repeat % 2 == 0 else contenders[::-1]:
                        progress.set_description(f"{task} {name} {method}", refresh=True)
                        order = {"task": task, "method": method, **settings}
                        runs[name, method].append(processes[name].ask(order))
                        progress.update()
                for contender, (cold, *warm) in runs.items():
                    walls = [run["wall"] for run in warm]
                    lines.append(Line(
                        task, *contender, len(warm), statistics.median(walls),
                        statistics.median(run["cpu"] for run in warm), (min(walls), max(walls)),
                        cold["wall"], cold["found"],
                    ))  # fmt: skip
        return lines

    def _table(self, lines: list[Line]) -> tuple[list[str], list[list[str]]]:
        rows = []
        for line in lines:
            mine = [other for other in lines if other.task == line.task]
            peer = next((other for other in mine if other.side == PEER), None)
            rows.append({
                "task": self.tasks[line.task].title, "side": line.side, "method": line.method,
                "runs": str(line.runs), "wall s": f"{line.wall:.2f}",
                "(range)": f"{line.spread[0]:.2f}..{line.spread[1]:.2f}",
                "CPU s": f"{line.cpu:.2f}",
                **{
                    title: f"{getattr(peer, key) / getattr(line, key):.2f}" if peer else ""
                    for title, key in (
                        (f"{PEER} / this, wall", "wall"), ("CPU", "cpu"), ("first call", "cold"),
                    )
                },
                "first call s": f"{line.cold:.2f}", **self.columns(line, mine),
            })  # fmt: skip
        return list(rows[0]), [list(row.values()) for row in rows]
