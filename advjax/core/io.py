"""Files that are whole or absent: written beside their place, then moved there."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, and moves it there if the block ends well.

    Args:
      path: the file to write; its folder is made. The temporary path keeps the suffix.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
      >>> with atomic_write(path) as temporary:
      ...     _ = temporary.write_text("whole")
      >>> path.read_text()
      'whole'
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give the result the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_json(path: PathLike, value: Any) -> None:
    """Writes a JSON file atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: the file is not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: it may be truncated or foreign.") from error


def append_rows(path: PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a JSON-lines file in one write, and waits until they are on disk.

    A line that an interrupted run left unfinished is cut off first.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dict(row)) + "\n" for row in rows)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: PathLike) -> list[dict[str, Any]]:
    """Reads the complete rows of a JSON-lines file; none if there is no such file.

    Raises:
      ValueError: a complete line is not JSON.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a line that is not JSON; delete or mend it.") from error
