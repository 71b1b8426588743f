"""Work is bounded, comes back in order, and ends when a part of it fails."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from regrow.tasks.prepare import chunk_pool, readers, units
from regrow.tasks.prepare.chunk_pool import ChunkPool, Locks, Stopped, all_of
from regrow.tasks.stage import StageError
from tests.tasks.prepare.test_run import chat_row, dialogues


class Work:
    """Stands for the encoding of chunks; counts what is begun and not yet taken."""

    def __init__(self) -> None:
        self.open = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, task: SimpleNamespace) -> int:
        with self._lock:
            self.open += 1
            self.most = max(self.most, self.open)
        time.sleep(task.seconds)
        if task.fails:
            raise StageError(f"row {task.number}")
        return task.number

    def taken(self) -> None:
        with self._lock:
            self.open -= 1


@pytest.fixture
def work(monkeypatch) -> Work:
    """Threads in place of processes."""
    made = Work()
    monkeypatch.setattr(chunk_pool, "encode_chunk", made)
    monkeypatch.setattr(
        chunk_pool, "ProcessPoolExecutor", lambda number, **_: ThreadPoolExecutor(number)
    )
    return made


def tasks(count: int, first: int = 0, seconds: float = 0.001, fails: int | None = None):
    return [
        SimpleNamespace(number=i, seconds=seconds, fails=i == fails)
        for i in range(first, first + count)
    ]


def test_blocks_come_in_order_and_few_are_waiting(work):
    found = []
    with ChunkPool(2) as pool:
        for block in pool.encoded(tasks(40)):
            work.taken()
            found.append(block)
            time.sleep(0.002)  # a slow writer holds the work back
    assert found == list(range(40))
    assert work.most <= 5


def test_several_units_share_the_bound(work):
    with ChunkPool(2) as pool:

        def unit(first: int) -> list[int]:
            found = []
            for block in pool.encoded(tasks(5, first)):
                work.taken()
                found.append(block)
            return found

        found = all_of(unit, range(0, 100, 5), 4, pool.stop)
    assert found == [list(range(first, first + 5)) for first in range(0, 100, 5)]
    assert work.most <= 5


def test_one_failure_ends_all_and_is_the_one_that_is_told(work):
    begin, pool = time.monotonic(), ChunkPool(2)

    def unit(first: int) -> list[int]:
        return list(pool.encoded(tasks(50, first, seconds=0.05, fails=63)))

    with pool, pytest.raises(StageError, match="row 63"):
        all_of(unit, range(0, 500, 50), 3, pool.stop)
    assert time.monotonic() - begin < 10  # all of it takes 12 s and more
    with pytest.raises(Stopped):
        list(pool.encoded(tasks(1)))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_processes_end_when_their_parent_is_killed():
    code = (
        "import time\n"
        "from regrow.tasks.prepare.chunk_pool import ChunkPool\n"
        "if __name__ == '__main__':\n"
        "    pool = ChunkPool(1)._pool\n"
        "    print(pool.submit(__import__('os').getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().strip()
    assert child.is_dir()
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while _runs(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: Path) -> bool:
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


def test_a_lock_for_each_name():
    locks = Locks()
    assert locks.of("a") is locks.of("a")
    assert locks.of("a") is not locks.of("b")


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    monkeypatch.setattr(units, "UNIT_BYTES", 1500)


def test_small_units_in_several_processes_give_the_same_bytes(bench, small_units):
    files = [bench.write(f"{i}.jsonl", dialogues(30, 30 * i)) for i in range(3)]
    datasets = [{"path": path, "type": "chat_template"} for path in (*files, files[0])]
    alone = bench.run(datasets=datasets)
    one_by_one = sorted(bench.units.built)
    bench.units = type(bench.units)(bench.root / "other-units")
    together = bench.run({"num_proc": 2, "pool_from_bytes": 0}, datasets=datasets)
    assert alone.files() == together.files()
    assert sorted(bench.units.built) == one_by_one  # the same rows twice are one unit
    tokenized = [step for step in together.report.steps if step[2] == "rows"]
    assert [done for done, *_ in tokenized] == sorted(done for done, *_ in tokenized)
    assert tokenized[-1][0] == 120


def test_the_bad_row_of_one_of_many_units_is_named(bench, small_units):
    rows = [*dialogues(30), chat_row("q", "\ud83e"), *dialogues(30)]
    path = bench.write("a.jsonl", rows)
    with pytest.raises(StageError, match=r"a\.jsonl:31: the text holds half a surrogate pair"):
        bench.run(
            {"num_proc": 2, "pool_from_bytes": 0},
            datasets=[{"path": path, "type": "chat_template"}],
        )
