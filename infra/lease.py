"""One builder per key at a time, on any store: a numbered lease with a heartbeat.

`leases/<key>/<number>.json` is created exclusively; the highest number holds the lease and rewrites
its file at every heartbeat. A waiter that sees a heartbeat stand still for the lease's time (by its
own clock, so clocks need not agree), or a holder of its own machine whose process is gone, takes
over by creating the next number. Who finds a higher number than its own has lost the lease.

On a store without conditional writes two builders can believe in one number: both then build, and
`artifacts.publish` keeps one result. A lease saves work; correctness never rests on it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from regrow.infra.store import Store, StoreError

_LOG = logging.getLogger(__name__)

# Three heartbeats fit in the lease's time, so that a single slow answer does not lose it.
_BEATS_PER_LEASE = 3


class LeaseLost(RuntimeError):  # noqa: N818 (the name says what is the matter)
    """Another builder took the key over while this one was silent."""


def _owner() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine since its last start and its process is gone."""
    me = _owner()
    if (owner.get("host"), owner.get("boot")) != (me["host"], me["boot"]) or not me["boot"]:
        return False
    try:
        process = psutil.Process(owner["pid"])
        gone = process.status() == psutil.STATUS_ZOMBIE
        # create_time is computed from clock ticks of 10 ms and a boot time that may be rounded.
        return gone or abs(process.create_time() - owner["started"]) > 1
    except psutil.NoSuchProcess:
        return True


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
        seconds: how long a silent holder keeps the lease.
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
        self._number = number
        self._forget_before(number)
        self._thread = threading.Thread(
            target=self._beat, name=f"lease {self._folder}", daemon=True
        )
        self._thread.start()
        return True

    def holder(self) -> str | None:
        """Who builds now, for people: "host, process 123"; None when nobody does."""
        newest = self._newest()
        if newest is None or newest[1].get("released"):
            return None
        owner = newest[1].get("owner", {})
        if _is_dead(owner):
            return None
        return f"{owner.get('host')}, process {owner.get('pid')}"

    def needs(self) -> list[str]:
        """Keys that the present holder builds from."""
        newest = self._newest()
        return list(newest[1].get("needs", ())) if newest is not None else []

    def check(self) -> None:
        """Raises LeaseLost when another builder has taken over."""
        if self._lost:
            raise LeaseLost(
                f"{self._folder}: this process was silent for more than {self._seconds:g} s and "
                "another builder took over; run again to use its result"
            )

    def release(self) -> None:
        """Give the lease back; safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._number is not None and not self._lost:
            try:
                self._store.write_bytes(self._name(self._number), self._content(released=True))
            except (OSError, StoreError) as error:
                # What was built is published; others wait out the lease's time, no more.
                _LOG.warning("%s: not given back: %s", self._folder, error)
        self._number = None

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
        }
        return json.dumps(data).encode()

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        try:
            names = [n for n in self._store.sizes(self._folder) if n.endswith(".json")]
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
        return now - self._seen.since > self._seconds

    def _forget_before(self, number: int) -> None:
        # The last one stays for a moment: a slow holder must find a higher number, not a gap.
        for name in self._store.sizes(self._folder):
            stem = name.removesuffix(".json")
            if stem.isdigit() and int(stem) < number - 1:
                self._store.remove(f"{self._folder}/{name}")

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds / _BEATS_PER_LEASE):
            try:
                newest = self._newest()
                if newest is not None and newest[0] > (self._number or 0):
                    self._lost = True
                    return
                self._beats += 1
                assert self._number is not None
                self._store.write_bytes(self._name(self._number), self._content())
            except (OSError, StoreError) as error:
                # The next beat may get through; if none does, a higher number will tell us.
                _LOG.warning("%s: no heartbeat: %s", self._folder, error)
