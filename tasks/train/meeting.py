"""Where machine 0 and the others of a training tell each other what to do and how it went.

A key-value store of torch (`TCPStore`) that machine 0 keeps for as long as its train stage runs:

    meeting                 a name that no other meeting has
    for                     whose meeting it is: `_whose`
    call/<attempt>          what to do next, or that it is over
    ready/<attempt>/<rank>  that machine has all it needs for it; or why it cannot take part
    end/<attempt>/<rank>    how its part ended
    failed/<attempt>        how many parts have failed so far
    left/<rank>             that machine has heard that it is over
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed import TCPStore as _TCPStore  # pyright: ignore[reportPrivateImportUsage]

from regrow.infra.nodes import Nodes
from regrow.tasks.stage import StageError
from regrow.tasks.train.part import Call, Ended

_POLL = 0.5
_JOIN_SECONDS = 5  # of one try; the next follows
# A machine that lost its peers notices by itself within moments (gloo, NCCL's monitor) and ends in
# good order; after this long it is ended.
_GRACE = 30.0
_PORT_SECONDS = 60.0  # a run before that is just ending may have the port still
_TELL_EVERY = 60.0
# Beside MASTER_PORT, where another process stays on that: all who belong together know them.
_MORE_PORTS = 3
_LAST_PORT = 2**16 - 1


class Lost(RuntimeError):  # noqa: N818 (the name says what is the matter)
    """Machine 0 is not there any more."""


class Over(Exception):  # noqa: N818 (the name says what is the matter)
    """Training has ended, well if `why` is empty."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Meeting:
    """One machine's side of it. Methods raise `Lost` when machine 0 has gone."""

    def __init__(self, store: _TCPStore, nodes: Nodes) -> None:
        self._store, self._nodes = store, nodes
        self.name = store.get("meeting").decode()
        """The same for all who are at it."""

    @classmethod
    def host(
        cls,
        nodes: Nodes,
        patience: float = _PORT_SECONDS,
        say: Callable[[str], None] = lambda _line: None,
    ) -> Meeting:
        """Machine 0's side; it listens on all its addresses, as torchrun does.

        Args:
            patience: seconds for which a port that another process still has is waited for, before
                one of the next is taken.

        Raises:
            StageError: when all stay in use, or one by a meeting that looks like ours.
        """
        end = time.monotonic() + patience
        while (store := _listening(nodes.address, [nodes.port])[0]) is None:
            if time.monotonic() > end:
                store = _elsewhere(nodes)
                break
            time.sleep(_POLL)
        if store.port != nodes.port:
            say(f"MASTER_PORT: another process has {nodes.port}: meeting at {store.port}")
        store.set("for", _whose(nodes))
        store.set("meeting", uuid.uuid4().hex)
        return cls(store, nodes)

    @classmethod
    def join(cls, nodes: Nodes, say: Callable[[str], None]) -> Meeting:
        """Another machine's side, once machine 0 is there, however long that takes.

        After a while it says at which of the ports something listens.
        """
        begun, told = time.monotonic(), -math.inf
        tries: dict[int, Future[_TCPStore | None]] = {}
        while True:
            for port in _ports(nodes):
                with contextlib.suppress(TimeoutError):  # still at it: looked at again
                    tries[port] = tries.get(port) or _trying(nodes, port)
                    store = tries[port].result(_JOIN_SECONDS)
                    if store is not None:
                        return cls(store, nodes)
                    del tries[port]
            if time.monotonic() - told > _TELL_EVERY:
                why = "" if told < begun else _in_the_way(nodes)
                told = time.monotonic()
                say(f"waiting for machine 0 at {nodes.address}:{nodes.port}{why}")
            time.sleep(_POLL)

    # ---- machine 0 ----

    def call(self, attempt: int, call: Call) -> None:
        """Tell the others of an attempt."""
        self._set(f"call/{attempt}", call.to_json())

    def not_ready(self, attempt: int) -> tuple[list[int], list[str]]:
        """Machines that have not answered yet, and why some cannot take part."""
        missing, faults = [], []
        for rank in range(1, self._nodes.count):
            if not self._store.check([f"ready/{attempt}/{rank}"]):
                missing.append(rank)
                continue
            fault = self._store.get(f"ready/{attempt}/{rank}").decode()
            faults += [fault] if fault else []
        return missing, faults

    def ends(self, attempt: int) -> dict[int, Ended]:
        """How the parts of other machines ended; those that have not said so are left out."""
        keys = {rank: f"end/{attempt}/{rank}" for rank in range(1, self._nodes.count)}
        return {
            rank: Ended.from_json(self._store.get(key))
            for rank, key in keys.items()
            if self._store.check([key])
        }

    def close(self, attempt: int, why: str, seconds: float = _GRACE) -> None:
        """Send the others away; waits until they have heard it."""
        self._set(f"call/{attempt}", json.dumps({"over": why}))
        left = [f"left/{rank}" for rank in range(1, self._nodes.count)]
        end = time.monotonic() + seconds
        while not self._store.check(left) and time.monotonic() < end:
            time.sleep(_POLL / 10)
        del self._store  # an error on its way up may hold on to this object, and so to the port

    # ---- every other machine ----

    def next_call(self, attempt: int) -> Call:
        """Wait for an attempt. Raises Over when there is none to come."""
        key = f"call/{attempt}"
        try:
            while not self._store.check([key]):  # a wait inside torch would hear no signal
                time.sleep(_POLL)
            text = self._store.get(key)
        except DistError as error:
            raise Lost(str(error)) from error
        over = json.loads(text).get("over")
        if over is None:
            return Call.from_json(text)
        with contextlib.suppress(Lost):  # machine 0 may end as soon as it has heard it
            self._tell(f"left/{self._nodes.rank}", "")
        raise Over(over)

    def tell_ready(self, attempt: int, fault: str = "") -> None:
        """Say that this machine has what it needs, or why it cannot take part."""
        self._tell(f"ready/{attempt}/{self._nodes.rank}", fault)

    def tell_end(self, attempt: int, ended: Ended) -> None:
        """Say how this machine's part came to its end."""
        self._tell(f"end/{attempt}/{self._nodes.rank}", ended.to_json())
        if ended.failure:
            self.tell_failure(attempt)

    def _tell(self, key: str, value: str) -> None:
        try:
            self._set(key, value)
        except DistError as error:
            raise Lost(str(error)) from error

    # ---- all ----

    def _set(self, key: str, value: str) -> None:
        """Everybody sees it once this returns: `set` alone does not wait for the server."""
        self._store.set(key, value)
        self._store.check([key])

    def tell_failure(self, attempt: int) -> None:
        """Say that a part of the attempt has failed: the others are to end theirs."""
        try:
            self._store.add(f"failed/{attempt}", 1)
        except DistError as error:
            raise Lost(str(error)) from error

    def watch(self, attempt: int, stop: threading.Event, done: threading.Event) -> None:
        """Set `stop` a while after any part failed, or machine 0 went; for a thread of its own."""
        since = None
        while not done.wait(_POLL):
            try:
                if since is None and self._store.add(f"failed/{attempt}", 0):
                    since = time.monotonic()
            except DistError:
                since = since or time.monotonic()
            if since is not None and time.monotonic() - since > _GRACE:
                stop.set()
                return


def _ports(nodes: Nodes) -> range:
    """Where machine 0 may be met; the first is where it is unless another process is there."""
    return range(nodes.port, min(nodes.port + _MORE_PORTS, _LAST_PORT) + 1)


def _whose(nodes: Nodes) -> str:
    """By what a meeting is told from that of another job, which may have a port beside ours."""
    return f"{nodes.count} machines, MASTER_PORT {nodes.port}, job {nodes.job}"


def _listening(address: str, ports: Sequence[int]) -> tuple[_TCPStore | None, str]:
    """A store at the first port that is free; None and why where none is."""
    fault = ""
    for port in ports:
        try:
            return _TCPStore(address, port, is_master=True, wait_for_workers=False), ""
        except DistError as error:
            fault = fault or str(error).splitlines()[0]
    return None, fault


def _elsewhere(nodes: Nodes) -> _TCPStore:
    """A store at the first port that is free, where no other meeting is one that our machines would
    take for ours."""
    ports = _ports(nodes)
    tries = {port: _trying(nodes, port) for port in ports}
    store = None
    for port, found in tries.items():
        with contextlib.suppress(TimeoutError):  # a stranger that says nothing
            if found.result(2 * _JOIN_SECONDS) is not None:
                fault = f"at {port} meets another training with these settings"
                break
    else:
        store, fault = _listening(nodes.address, ports)
    if store is None:
        raise StageError(
            f"MASTER_PORT: this machine cannot listen on port {nodes.port}, nor on those "
            f"up to {ports[-1]} ({fault}); end the processes that have them, or choose "
            "another port on all machines"
        )
    return store


def _in_the_way(nodes: Nodes) -> str:
    """At which of the ports something listens, for people; "" for none.

    It may be our machine 0, if that is slow to answer: nobody is told to end it.
    """
    ports = _ports(nodes)
    taken = [port for port in ports if _listens(nodes.address, port)]
    names = ", ".join(map(str, taken))
    if len(taken) < len(ports):
        return f" (something listens at {names})" if taken else ""
    return (
        f" (something listens at {names}, and none has answered as machine 0 of this training yet: "
        "if it does not come, choose another MASTER_PORT on all machines)"
    )


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), _JOIN_SECONDS).close()
    except OSError:
        return False
    return True


def _trying(nodes: Nodes, port: int) -> Future[_TCPStore | None]:
    """`_joined`, in a thread: torch waits for ever at a port whose process takes connections and
    says nothing."""
    found: Future[_TCPStore | None] = Future()
    tried = threading.Thread(target=lambda: found.set_result(_joined(nodes, port)), daemon=True)
    tried.start()
    return found


def _joined(nodes: Nodes, port: int) -> _TCPStore | None:
    """The store at that port, if machine 0 of these machines keeps it."""
    try:
        # First the port alone: torch waits at one where nobody listens yet.
        if not _listens(nodes.address, port):
            return None
        tries = timedelta(seconds=_JOIN_SECONDS)
        store = _TCPStore(
            nodes.address, port, is_master=False, wait_for_workers=False, timeout=tries
        )
        return store if store.get("for").decode() == _whose(nodes) else None
    except (OSError, DistError):
        return None
