"""The setting of the C library: done once on import, left alone where the user has a say."""

import subprocess
import sys

import pytest

from advjax.core import memory

IS_GLIBC = sys.platform == "linux" and "glibc" in " ".join(__import__("platform").libc_ver())


@pytest.mark.parametrize(
    "environment, expected",
    [({}, IS_GLIBC), ({"ADVJAX_KEEP_BUFFERS": "0"}, False), ({"MALLOC_ARENA_MAX": "1"}, False)],
)
def test_the_user_has_the_last_word(monkeypatch, environment, expected):
    for name in ("ADVJAX_KEEP_BUFFERS", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert memory.keep_large_buffers() is expected


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert memory.keep_large_buffers() is False


def test_freed_buffers_are_used_again():
    """After the import, 64 MB that were freed and asked for again cause no new page faults."""
    if not IS_GLIBC:
        pytest.skip("only glibc has this setting")
    script = """
import advjax, ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = libc.malloc(64 << 20)
    ctypes.memset(buffer, 1, 64 << 20)
    libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(first, faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    first, second = map(int, done.stdout.split())
    # 64 MB are 16,384 small or 32 huge pages; the second time they are there already.
    assert second < max(first / 4, 8)
