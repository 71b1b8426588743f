"""One builder per key; a silent or dead holder is replaced, and learns that it was."""

import json
import subprocess
import sys
import time

import pytest

from regrow.infra.lease import Lease, LeaseLost
from regrow.infra.store import Store

KEY = "stages/0123"


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_second_builder_waits_until_the_first_releases(store):
    first, second = Lease(store, KEY, 30), Lease(store, KEY, 30)
    with first:
        assert first.try_acquire()
        assert not second.try_acquire()
    with second:
        assert second.try_acquire()


def test_holder_that_beats_keeps_the_lease_beyond_its_time(store):
    first, second = Lease(store, KEY, 0.3), Lease(store, KEY, 0.3)
    with first:
        assert first.try_acquire()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert not second.try_acquire()
            time.sleep(0.02)
        first.check()


def test_silent_holder_of_another_machine_is_replaced_after_its_time(store):
    content = {"owner": {"host": "elsewhere", "boot": "b", "pid": 1, "started": 0}, "beat": "x"}
    store.write_bytes(f"leases/{KEY}/00000000.json", json.dumps(content).encode())
    lease = Lease(store, KEY, 0.3)
    assert not lease.try_acquire()
    time.sleep(0.4)
    assert lease.try_acquire()
    lease.release()


def test_holder_that_was_replaced_learns_it(store):
    first = Lease(store, KEY, 0.3)
    assert first.try_acquire()
    store.write_bytes(f"leases/{KEY}/00000001.json", b'{"beat": "other"}')
    time.sleep(0.3)
    with pytest.raises(LeaseLost, match="another builder"):
        first.check()
    first.release()
    assert json.loads(store.read_bytes(f"leases/{KEY}/00000001.json")) == {"beat": "other"}


def test_killed_holder_of_this_machine_is_replaced_at_once(tmp_path):
    code = (
        "import os; from regrow.infra.lease import Lease; from regrow.infra.store import Store\n"
        f"assert Lease(Store({str(tmp_path)!r}), {KEY!r}, 60).try_acquire()\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    lease = Lease(Store(tmp_path), KEY, 60)
    begin = time.monotonic()
    assert lease.try_acquire()
    assert time.monotonic() - begin < 5
    lease.release()


def test_a_holder_tells_what_it_builds_from(store):
    with Lease(store, KEY, 30, ["stages/ab"]) as lease:
        assert lease.try_acquire()
        assert Lease(store, KEY, 0).needs() == ["stages/ab"]


def test_old_lease_files_do_not_pile_up(store):
    for _ in range(5):
        with Lease(store, KEY, 30) as lease:
            assert lease.try_acquire()
    assert len(store.sizes(f"leases/{KEY}")) <= 2


def test_who_finds_anothers_words_under_its_number_has_lost(store):
    """As on a store without conditional writes, where two can believe in one number."""
    first = Lease(store, KEY, 0.3)
    assert first.try_acquire()
    assert first.is_ours()
    store.write_bytes(f"leases/{KEY}/00000000.json", b'{"beat": "other", "token": "other"}')
    assert not first.is_ours()
    first.release()


def test_who_finds_its_number_gone_has_lost(store):
    first = Lease(store, KEY, 60)
    assert first.try_acquire()
    store.remove(f"leases/{KEY}")
    assert not first.is_ours()
    first.release()


def test_what_a_holder_comes_to_need_is_known_before_it_goes_on(store):
    with Lease(store, KEY, 60) as lease:
        assert lease.try_acquire()
        lease.need("units")
        assert Lease(store, KEY, 60).needs() == ["units"]
    assert Lease(store, KEY, 60).needs() is None


def test_forgotten_lease_leaves_nothing_and_can_be_taken_again(store):
    lease = Lease(store, KEY, 0.3)
    for _ in range(2):
        assert lease.try_acquire()
        time.sleep(0.4)
        assert lease.is_ours()
        lease.forget()
        assert store.sizes("") == {}


def test_holder_that_has_been_silent_is_told_as_such(store):
    owner = {"host": "elsewhere", "boot": "b", "pid": 1, "started": 0}
    content = {"owner": owner, "beat": "x", "seconds": 30, "at": "2026-01-01T00:00:00+00:00"}
    store.write_bytes(f"leases/{KEY}/00000000.json", json.dumps(content).encode())
    assert (Lease(store, KEY, 30).holder() or "").startswith("elsewhere, process 1, silent for ")


def test_silent_holder_keeps_the_lease_for_the_time_that_it_said(store):
    owner = {"host": "elsewhere", "boot": "b", "pid": 1, "started": 0}
    content = {"owner": owner, "beat": "x", "seconds": 60}
    store.write_bytes(f"leases/{KEY}/00000000.json", json.dumps(content).encode())
    lease = Lease(store, KEY, 0.1)
    assert not lease.try_acquire()
    time.sleep(0.3)
    assert not lease.try_acquire()
