"""One builder per key at a time, on any store: a numbered lease with a heartbeat.

`leases/<key>/<number>.json` is created exclusively; the highest number holds the lease and rewrites
its file at every heartbeat. A waiter that sees a heartbeat stand still for the lease's time (by its
own clock, so clocks need not agree), or a holder of its own machine whose process is gone, takes
over by creating the next number. Who finds a higher number than its own, or another's words under
its own, has lost the lease.

On a store without conditional writes two builders can believe in one number until the first
heartbeat: both then build, and `artifacts.publish` keeps one result. A lease saves work;
correctness never rests on it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from regrow.infra.store import Store

_LOG = logging.getLogger(__name__)

# Three heartbeats fit in the lease's time, so that a single slow answer does not lose it.
_BEATS_PER_LEASE = 3
_NAME = re.compile(r"[0-9]+\.json")


class LeaseLost(RuntimeError):  # noqa: N818 (the name says what is the matter)
    """Another builder took the key over while this one was silent."""


def _owner() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _pid_namespace() -> str:
    """In which containers' set of process numbers this one's lies; "" where there is one only."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return ""


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine since its last start and its process is gone.

    Of another container's processes nothing is known: their numbers mean others here.
    """
    me = _owner()
    place = ("host", "boot", "pid_namespace")
    if [owner.get(name) for name in place] != [me[name] for name in place] or not me["boot"]:
        return False
    try:
        process = psutil.Process(owner["pid"])
        gone = process.status() == psutil.STATUS_ZOMBIE
        # create_time is computed from clock ticks of 10 ms and a boot time that may be rounded.
        return gone or abs(process.create_time() - owner["started"]) > 1
    except psutil.NoSuchProcess:
        return True


def _silence(data: dict[str, Any]) -> float:
    """Seconds since the heartbeat, by two clocks; 0 where it says no time."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(data["at"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return 0.0


@dataclass
class _Sighting:
    name: str
    beat: str
    since: float


class Lease:
    """The right to build one key, waited for and kept alive by a thread.

    Args:
        store: where artifacts are.
        key: the artifact's key.
        seconds: how long a silent holder keeps the lease; a holder that says its own, that long.
        needs: keys of the artifacts that it builds from, which must not be removed meanwhile.
    """

    def __init__(self, store: Store, key: str, seconds: float, needs: Sequence[str] = ()) -> None:
        self._needs = list(needs)
        self._store, self._folder, self._seconds = store, f"leases/{key}", seconds
        self._number: int | None = None
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._lost = False
        self._seen: _Sighting | None = None
        self._writing = threading.Lock()  # so that no older heartbeat lands on a newer word
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Take the lease if it is free, released, or its holder is gone; call again to wait."""
        newest = self._newest()
        if newest is not None and not self._is_free(*newest):
            return False
        number = 0 if newest is None else newest[0] + 1
        if not self._store.create(self._name(number), self._content()):
            return False
        self._number, self._lost, self._stop = number, False, threading.Event()
        # The last one stays for a moment: a slow holder must find a higher number, not a gap.
        self._remove_up_to(number - 2)
        self._thread = threading.Thread(
            target=self._beat, name=f"lease {self._folder}", daemon=True
        )
        self._thread.start()
        return True

    def holder(self) -> str | None:
        """Who builds now, for people: "host, process 123"; None when nobody does.

        One that has been silent for longer than its time is named with that: it may be gone.
        """
        newest = self._newest()
        if newest is None or newest[1].get("released"):
            return None
        owner = newest[1].get("owner", {})
        if _is_dead(owner):
            return None
        silent = _silence(newest[1])
        # Two clocks may differ a little; more than a heartbeat late is worth a word.
        late = silent > 2 * self._seconds_of(newest[1])
        told = f", silent for {silent:,.0f} s" if late else ""
        return f"{owner.get('host')}, process {owner.get('pid')}{told}"

    def needs(self) -> list[str] | None:
        """What the present holder builds from; None when nobody holds the lease.

        Asked again and again, as `try_acquire`, it also knows a holder that has fallen silent.
        """
        newest = self._newest()
        if newest is None or self._is_free(*newest):
            return None
        return list(newest[1].get("needs", ()))

    def silent_for(self) -> float:
        """Seconds for which `needs` and `try_acquire` have seen the same heartbeat."""
        return time.monotonic() - self._seen.since if self._seen is not None else 0.0

    def need(self, name: str) -> None:
        """Let it be known, before this returns, that the holder uses something else too."""
        if name in self._needs:
            return
        self._needs.append(name)
        if self._number is not None:
            self._write()

    def is_ours(self) -> bool:
        """Whether the lease is still this one's, by what the store says now."""
        return self._number is not None and not self._lost and self._is_mine(self._newest())

    def check(self) -> None:
        """Raises LeaseLost when another builder has taken over."""
        if self._lost:
            raise LeaseLost(
                f"{self._folder}: this process was silent for more than {self._seconds:g} s and "
                "another builder took over; run again to use its result"
            )

    def release(self) -> None:
        """Give the lease back; safe to call twice."""
        self._stop_beating()
        if self._number is not None and not self._lost:
            try:
                self._store.write_bytes(self._name(self._number), self._content(released=True))
            except Exception as error:  # noqa: BLE001 (drivers raise errors of many kinds)
                # What was built is published; others wait out the lease's time, no more.
                _LOG.warning("%s: not given back: %r", self._folder, error)
        self._number = None

    def forget(self) -> None:
        """Give the lease back and leave nothing of it, for a key that is no more."""
        self._stop_beating()
        try:
            if self.is_ours():
                self._remove_up_to(self._number)
                self._store.prune(self._folder)
        except Exception as error:  # noqa: BLE001 (as in `release`)
            _LOG.warning("%s: not given back: %r", self._folder, error)
        self._number = None

    def _stop_beating(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

    def _content(self, released: bool = False) -> bytes:
        data = {
            "owner": _owner(),
            "token": self._token,
            "beat": f"{self._token}-{self._beats}",
            "released": released,
            "needs": self._needs,
            "seconds": self._seconds,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return json.dumps(data).encode()

    def _write(self) -> None:
        assert self._number is not None
        with self._writing:
            self._store.write_bytes(self._name(self._number), self._content())

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        try:
            names = [n for n in self._store.sizes(self._folder) if _NAME.fullmatch(n)]
        except FileNotFoundError:
            return None
        for name in sorted(names, reverse=True):
            try:
                data = json.loads(self._store.read_bytes(f"{self._folder}/{name}"))
            except FileNotFoundError:
                continue  # removed by the next holder between listing and reading
            except ValueError:
                data = None
            if not isinstance(data, dict):
                data = {"beat": "unreadable"}
            return int(name.removesuffix(".json")), data
        return None

    def _is_free(self, number: int, data: dict[str, Any]) -> bool:
        if data.get("released") or _is_dead(data.get("owner", {})):
            return True
        name, beat, now = self._name(number), str(data.get("beat")), time.monotonic()
        if self._seen is None or (self._seen.name, self._seen.beat) != (name, beat):
            self._seen = _Sighting(name, beat, now)
        return now - self._seen.since > self._seconds_of(data)

    def _seconds_of(self, data: dict[str, Any]) -> float:
        """How long that holder keeps the lease without a heartbeat."""
        said = data.get("seconds")
        return float(said) if isinstance(said, (int, float)) else self._seconds

    def _is_mine(self, newest: tuple[int, dict[str, Any]] | None) -> bool:
        return newest is not None and (newest[0], newest[1].get("token")) == (
            self._number,
            self._token,
        )

    def _remove_up_to(self, number: int | None) -> None:
        """Remove the files of a number and of those below it, what killed writers left too."""
        for name in sorted(self._store.sizes(self._folder)):  # the holder's, the last, last
            stem = name.partition(".")[0]
            if number is not None and stem.isdecimal() and int(stem) <= number:
                self._store.remove(f"{self._folder}/{name}")

    def _beat(self) -> None:
        missed = False
        while not self._stop.wait(self._seconds / _BEATS_PER_LEASE):
            try:
                newest = self._newest()
                if newest is None and not missed:
                    missed = True  # an empty listing is believed when it comes twice
                    continue
                missed = False
                if not self._is_mine(newest):
                    self._lost = True
                    return
                self._beats += 1
                self._write()
            except Exception as error:  # noqa: BLE001 (an error of any kind would end the thread)
                # The next beat may get through; if none does, a higher number will tell us.
                _LOG.warning("%s: no heartbeat: %r", self._folder, error)
