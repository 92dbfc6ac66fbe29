"""Run folders: `config.json`, `manifest.json`, `results.jsonl`, `results.csv`, `figures/`.

A run that is interrupted and started again does only the rows that are missing.
"""

import csv
import dataclasses
import datetime
import io as text_io
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from advjax.core import io, parallel

_PACKAGES = ("advjax", "jax", "jaxlib", "flax", "optax", "chex", "numpy", "tensorflow-datasets")


def _defaults(config: Any) -> dict[str, Any]:
    """What a field means that a folder does not have: what it meant then, or the default.

    A field whose default is not what programs did before it was there says what they did, by
    `metadata={"before": value}`.
    """
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(config)
    }  # fmt: skip
    defaults |= {
        field.name: field.metadata["before"]
        for field in dataclasses.fields(config) if "before" in field.metadata
    }  # fmt: skip
    return {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}


class Run:
    """One run folder.

    Attributes:
      workdir: the folder.
      rows: what is done, in the order in which it was done.
    """

    def __init__(
        self,
        workdir: io.PathLike,
        config: Any,
        *,
        study: str,
        key_columns: Sequence[str],
        may_change: Sequence[str] = (),
    ):
        """Opens a folder for a configuration.

        Args:
          workdir: the folder; made if missing.
          config: a dataclass of JSON values.
          study: name of the study.
          key_columns: the columns that tell rows apart.
          may_change: fields that a later run may have other values of, since rows do not depend on
            them or name theirs in a key column; the folder then has the later ones.

        Raises:
          ValueError: the folder belongs to another configuration, or a file in it is damaged.
        """
        self.workdir = pathlib.Path(workdir).expanduser()
        self._key_columns = tuple(key_columns)
        self._started = time.time()
        self._seconds: dict[str, float] = {}
        self._has_changed = False
        record = {"study": study, **dataclasses.asdict(config)}
        path = self.workdir / "config.json"
        before = io.read_json(path) if path.exists() else None
        # Nothing beside a configuration of this study: a run that failed before its first result.
        is_free = isinstance(before, dict) and before.get("study") == study
        is_free = is_free and all(other == path for other in self.workdir.iterdir())
        if path.exists() and not is_free:
            self._check_same(before, record, _defaults(config), may_change)
            if (
                isinstance(before, dict)
                and parallel.is_main_process()
                and any(
                    json.dumps(before.get(name)) != json.dumps(record[name]) for name in may_change
                )
            ):
                io.write_json(path, record)
        elif (self.workdir / "results.jsonl").exists():
            raise ValueError(f"{self.workdir} holds results without their config.json.")
        elif parallel.is_main_process():
            io.write_json(path, record)
        self.rows = io.read_rows(self.workdir / "results.jsonl")
        try:
            self._done = {self._key_of(row) for row in self.rows}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.workdir / 'results.jsonl'} holds rows of another study."
            ) from error

    def _check_same(
        self, theirs: Any, ours: Mapping[str, Any], defaults: Mapping[str, Any],
        may_change: Sequence[str],
    ) -> None:  # fmt: skip
        """Refuses another configuration; a field younger than the folder has its `_defaults`."""
        if not isinstance(theirs, dict):
            raise ValueError(f"{self.workdir / 'config.json'} is not a configuration.")
        # Where tuples, also those in tuples, are lists.
        ours, theirs = json.loads(json.dumps([ours, {**defaults, **theirs}]))
        for name in (*ours, *theirs):
            if name not in may_change and ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{self.workdir} belongs to another configuration: {name} was "
                    f"{theirs.get(name)!r} and is now {ours.get(name)!r}; use another --workdir."
                )

    def _key_of(self, row: Mapping[str, Any]) -> tuple:
        return tuple(row[name] for name in self._key_columns)

    def is_done(self, keys: Iterable[tuple]) -> bool:
        """Whether all rows with these values of the key columns are there."""
        return all(tuple(key) in self._done for key in keys)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds the rows that are not there yet, in one write."""
        new = [dict(row) for row in rows if self._key_of(row) not in self._done]
        if new and parallel.is_main_process():
            io.append_rows(self.workdir / "results.jsonl", new)
        self.rows.extend(new)
        self._done.update(self._key_of(row) for row in new)
        self._has_changed |= bool(new)

    def forget(self, is_forgotten: Callable[[Mapping[str, Any]], bool]) -> None:
        """Takes rows out of the folder, so that they are done again.

        Args:
          is_forgotten: says of a row whether to.
        """
        kept = [row for row in self.rows if not is_forgotten(row)]
        self._has_changed |= len(kept) < len(self.rows)
        if len(kept) < len(self.rows) and parallel.is_main_process():
            text = "".join(json.dumps(row) + "\n" for row in kept)
            io.write_text(self.workdir / "results.jsonl", text)
        self.rows = kept
        self._done = {self._key_of(row) for row in kept}

    def timed(self, name: str) -> "_Timer":
        """Context that adds its seconds to the manifest under `name`."""
        return _Timer(self._seconds, name)

    def figure(self, name: str, draw: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """Draws `figures/NAME` atomically.

        Args:
          name: file name with its suffix.
          draw: writes the picture to the path that it is given.
        """
        path = self.workdir / "figures" / name
        if parallel.is_main_process():
            with io.atomic_write(path) as temporary:
                draw(temporary)
        return path

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a further table, `NAME`, as CSV."""
        self.text(name, to_csv(rows))

    def text(self, name: str, text: str) -> None:
        """Writes a further file, `NAME`, atomically."""
        if parallel.is_main_process():
            io.write_text(self.workdir / name, text)

    def finish(self, seed: int, **more: Any) -> None:
        """Writes `results.csv` and `manifest.json`.

        The manifest is of the run that computed: one that finds every row done leaves it, and one
        that adds rows keeps the manifests before it under "earlier".

        Args:
          seed: of the run.
          **more: what else the manifest says, JSON values.
        """
        if not parallel.is_main_process():
            return
        io.write_text(self.workdir / "results.csv", to_csv(self.rows))
        path = self.workdir / "manifest.json"
        try:
            before = io.read_json(path) if path.exists() else None
        except ValueError:  # damaged: no reason to lose the end of this run
            before = None
        if not isinstance(before, dict):
            manifest = self._manifest(seed)
        elif self._has_changed:
            earlier = before.pop("earlier", [])
            manifest = {**self._manifest(seed), "earlier": [*earlier, before]}
        else:
            manifest = before
        io.write_json(path, {**manifest, **more})

    def _manifest(self, seed: int) -> dict[str, Any]:
        versions: dict[str, str | None] = {}
        for package in _PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                versions[package] = None
        return {
            "command": sys.argv,
            "seed": seed,
            "commit": _commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": versions,
            "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
            "processes": jax.process_count(),
            "started": datetime.datetime.fromtimestamp(self._started, datetime.UTC).isoformat(),
            "seconds": round(time.time() - self._started, 2),
            "seconds_of": {name: round(value, 2) for name, value in self._seconds.items()},
        }


class _Timer:
    def __init__(self, totals: dict[str, float], name: str):
        self._totals, self._name = totals, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        spent = time.perf_counter() - self._start
        self._totals[self._name] = self._totals.get(self._name, 0.0) + spent


def _commit() -> str | None:
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=folder, capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV text; the columns are those of the first row and what later ones add."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = text_io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
