"""What a process frees it gets again without the system, once it says so."""

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from regrow.infra.freed_memory import keep_freed_memory
from regrow.infra.settings import child_environment

COUNT = """
import resource, sys
from regrow.infra.freed_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    blocks = [bytearray(b"x") * (24 << 20) for _ in range(4)]  # written, unlike zeros
step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


def faults(how: str) -> int:
    """Pages that five rounds of 96 MiB have the system clear."""
    command = [sys.executable, "-c", COUNT, how]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
def test_a_later_step_takes_the_memory_of_the_one_before():
    given_back, kept = faults("given back"), faults("kept")
    assert given_back > 5 * 96 * 2**20 / 4096 / 2  # 4 KiB pages, each cleared again (at least half)
    assert kept < given_back / 20


def test_where_large_blocks_cannot_be_kept_nothing_is_changed(monkeypatch):
    asked = []

    def mallopt(name: int, value: int) -> int:
        """Of an older glibc, which refuses to have blocks above 32 MiB in its heap."""
        asked.append((name, value))
        return int(value <= 32 << 20)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert not keep_freed_memory()
    assert asked == [(-3, 1 << 30)]  # and not the threshold for trimming


def test_a_c_library_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not keep_freed_memory()
