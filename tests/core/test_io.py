"""Files are whole or absent, whatever happens halfway."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from advjax.core import io


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_makes_folders_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "a" / "b" / "weights.npz"
    with io.atomic_write(path) as temporary:
        assert temporary.suffix == ".npz"
        assert temporary.parent == path.parent
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["weights.npz"]


def test_atomic_write_takes_strings_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        io.write_text(str(path), text)
    assert path.read_text() == "second"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), io.atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_exception_leaves_no_new_file(tmp_path):
    with pytest.raises(RuntimeError), io.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def test_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        io.write_text(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


# io.py is loaded by its path: importing the package would load jax, which takes seconds.
KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("io_of_advjax", sys.argv[1])
io = importlib.util.module_from_spec(spec)
spec.loader.exec_module(io)
with io.atomic_write(sys.argv[2]) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("old", [None, "old"])
def test_killed_halfway(tmp_path, old):
    path = tmp_path / "results.json"
    if old is not None:
        path.write_text(old)
    command = [sys.executable, "-c", KILLED, io.__file__, str(path)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == old
    # What is left over cannot be taken for a result, and does not stand in the way of one.
    assert all(name.startswith(".") for name in names(tmp_path) if name != path.name)
    io.write_text(path, "new")
    assert path.read_text() == "new"


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ä": "\u2028 line"}}
    io.write_json(tmp_path / "a.json", value)
    assert io.read_json(tmp_path / "a.json") == value
    assert list(io.read_json(tmp_path / "a.json")) == ["b", "a"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"PK\x03\x04"])
def test_what_is_not_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not a JSON file: it may be truncated"):
        io.read_json(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == content


ROWS = [{"epsilon": 0.1, "robust_accuracy": 1 / 3}, {"text": "a\nb\u2028c\x85d"}, {}]


def test_rows_round_trip(tmp_path):
    path = tmp_path / "run" / "results.jsonl"
    assert io.read_rows(path) == []
    io.append_rows(path, ROWS[:1])
    io.append_rows(path, [])
    io.append_rows(path, ROWS[1:])
    assert io.read_rows(path) == ROWS
    assert len(path.read_bytes().splitlines()) == len(ROWS)


def test_every_place_to_be_interrupted(tmp_path):
    """A file cut anywhere yields its whole rows, and appending to it mends it."""
    path = tmp_path / "results.jsonl"
    io.append_rows(path, ROWS)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        assert io.read_rows(path) == ROWS[:whole]
        io.append_rows(path, [{"next": 1}])
        assert io.read_rows(path) == [*ROWS[:whole], {"next": 1}]


def test_a_foreign_line_is_an_error(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\nepsilon,accuracy\n{"b": 2}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl holds a line that is not JSON"):
        io.read_rows(path)


def test_rows_are_lines_that_other_programs_read(tmp_path):
    path = tmp_path / "results.jsonl"
    io.append_rows(path, ROWS)
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == ROWS


def test_rows_that_cannot_be_written_leave_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    io.append_rows(path, ROWS[:1])
    with pytest.raises(TypeError):
        io.append_rows(path, [{"good": 1}, {"bad": object()}])
    assert io.read_rows(path) == ROWS[:1]
