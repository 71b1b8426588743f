"""One builder per key; a silent or dead holder is replaced, and learns that it was."""

import json
import subprocess
import sys
import time

import pytest

from regrow.infra.lease import Lease, LeaseLost, _owner
from regrow.infra.store import Store

KEY = "stages/0123"


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def check_for_a_minute(lease: Lease) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lease.check()
        time.sleep(0.02)


def test_second_builder_waits_until_the_first_releases(store):
    first, second = Lease(store, KEY, 30), Lease(store, KEY, 30)
    with first:
        assert first.try_acquire()
        assert not second.try_acquire()
    with second:
        assert second.try_acquire()


def test_holder_that_beats_keeps_the_lease_beyond_its_time(store):
    first, second = Lease(store, KEY, 3), Lease(store, KEY, 3)
    with first:
        assert first.try_acquire()
        end = time.monotonic() + 3.6
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
    with pytest.raises(LeaseLost, match="another builder"):
        check_for_a_minute(first)
    first.release()
    assert json.loads(store.read_bytes(f"leases/{KEY}/00000001.json")) == {"beat": "other"}


def test_killed_holder_of_this_machine_is_replaced_at_once(tmp_path):
    code = (
        "import os; from regrow.infra.lease import Lease; from regrow.infra.store import Store\n"
        f"assert Lease(Store({str(tmp_path)!r}), {KEY!r}, 600).try_acquire()\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    lease = Lease(Store(tmp_path), KEY, 600)
    begin = time.monotonic()
    assert lease.try_acquire()
    assert time.monotonic() - begin < 50
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
    first = Lease(store, KEY, 60)
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


def test_forgetting_leaves_the_next_holders_lease(store, monkeypatch):
    """One that takes over before the look at the store, and one that does right after it."""
    for looks_first in (True, False):
        lease = Lease(store, KEY, 60)
        assert lease.try_acquire()
        content = json.dumps({"beat": "other", "released": True}).encode()
        store.write_bytes(f"leases/{KEY}/00000007.json", content)
        if not looks_first:
            monkeypatch.setattr(lease, "is_ours", lambda: True)
        lease.forget()
        assert store.read_bytes(f"leases/{KEY}/00000007.json") == content
        store.remove("leases")


@pytest.mark.parametrize("same", [True, False])
def test_process_numbers_of_another_container_say_nothing(store, same):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    owner = _owner() | {"pid": done.pid} | ({} if same else {"pid_namespace": "pid:[1]"})
    content = {"owner": owner, "beat": "x", "seconds": 60}
    store.write_bytes(f"leases/{KEY}/00000000.json", json.dumps(content).encode())
    with Lease(store, KEY, 60) as lease:
        assert lease.try_acquire() == same


def test_what_is_no_lease_is_passed_over(store):
    store.write_bytes(f"leases/{KEY}/notes.json", b"{}")
    with Lease(store, KEY, 60) as lease:
        assert lease.try_acquire()
        assert lease.is_ours()


@pytest.mark.parametrize("give_back", [Lease.release, Lease.forget])
def test_error_of_any_kind_while_giving_back_is_told_and_ends_nothing(
    store, give_back, monkeypatch, caplog
):
    lease = Lease(store, KEY, 60)
    assert lease.try_acquire()

    def broken(*_: object):
        raise RuntimeError("a driver's own")

    monkeypatch.setattr(store, "write_bytes", broken)
    monkeypatch.setattr(store, "sizes", broken)
    give_back(lease)
    assert "not given back: RuntimeError" in caplog.text


@pytest.mark.parametrize("times", [1, 10**6])
def test_lease_is_lost_when_nothing_is_listed_twice_and_not_at_once(store, times, monkeypatch):
    lease, sizes, calls = Lease(store, KEY, 0.3), store.sizes, []

    def nothing_at_first(prefix):
        calls.append(prefix)
        return {} if len(calls) <= times else sizes(prefix)

    assert lease.try_acquire()
    monkeypatch.setattr(store, "sizes", nothing_at_first)
    if times > 1:
        with pytest.raises(LeaseLost):
            check_for_a_minute(lease)
        assert len(calls) == 2
    else:
        end = time.monotonic() + 60
        while len(calls) < 4 and time.monotonic() < end:
            time.sleep(0.02)
        lease.check()
        assert lease.is_ours()
    lease.release()
