"""What machines tell each other arrives: attempts, faults, ends, and that it is over."""

from __future__ import annotations

import socket
import threading

import pytest

from regrow.infra.launch import free_port
from regrow.infra.nodes import Nodes
from regrow.tasks.stage import StageError
from regrow.tasks.train import machines as machines_module
from regrow.tasks.train import meeting as meeting_module
from regrow.tasks.train.meeting import Lost, Meeting, Over
from regrow.tasks.train.part import Call, Ended, failure_of

CALL = Call({"work": "/a"}, "s3://bucket/store", "stages/ab", 2, "127.0.0.1", 4321)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting_module, "_POLL", 0.01)
    monkeypatch.setattr(meeting_module, "_GRACE", 0.05)


@pytest.fixture
def both():
    """Machine 0's side of a meeting of two, and the other's."""
    place = ("127.0.0.1", free_port())
    host = Meeting.host(Nodes(2, 0, *place))
    return host, Meeting.join(Nodes(2, 1, *place), print)


def test_an_attempt_is_heard_answered_and_its_end_told(both):
    host, guest = both
    assert host.name == guest.name
    host.call(0, CALL)
    assert guest.next_call(0) == CALL
    assert host.not_ready(0) == ([1], [])
    guest.tell_ready(0)
    assert host.not_ready(0) == ([], [])
    assert host.ends(0) == {}
    ended = Ended(failure_of("boom", None, 1), {"stacks-rank-00001.txt": "Thread"})
    guest.tell_end(0, ended)
    assert host.ends(0) == {1: ended}


def test_why_a_machine_cannot_take_part_is_heard(both):
    host, guest = both
    host.call(3, CALL)
    guest.tell_ready(3, "machine 1: no store")
    assert host.not_ready(3) == ([], ["machine 1: no store"])


@pytest.mark.parametrize("why", ["", "the disk is full"])
def test_all_hear_that_it_is_over_and_why(both, why):
    host, guest = both
    heard = []

    def follow():
        try:
            guest.next_call(1)
        except Over as over:
            heard.append(over.why)

    follower = threading.Thread(target=follow)
    follower.start()
    host.close(1, why, seconds=60)
    follower.join(60)
    assert heard == [why]


def test_a_failure_anywhere_stops_everybody(both):
    for attempt, (side, other) in enumerate((both, both[::-1])):
        stop, done = threading.Event(), threading.Event()
        watcher = threading.Thread(target=side.watch, args=(attempt, stop, done))
        watcher.start()
        assert not stop.wait(0.1)
        other.tell_failure(attempt)
        assert stop.wait(60)
        watcher.join(60)


def test_that_machine_0_has_gone_is_no_silence():
    place = ("127.0.0.1", free_port())
    host = Meeting.host(Nodes(2, 0, *place))
    guest = Meeting.join(Nodes(2, 1, *place), print)
    del host
    with pytest.raises(Lost):
        guest.next_call(0)


def test_ports_that_stay_in_use_are_named(monkeypatch):
    monkeypatch.setattr(meeting_module, "_MORE_PORTS", 0)
    place = ("127.0.0.1", free_port())
    first = Meeting.host(Nodes(2, 0, *place, job="1"))
    with pytest.raises(StageError, match=rf"MASTER_PORT: .* port {place[1]}, .*address already"):
        Meeting.host(Nodes(2, 0, *place, job="2"), patience=0.05)
    assert first.name


def test_two_jobs_that_nothing_tells_apart_do_not_meet_side_by_side():
    """On machines without a cluster: the second's other machines would join the first."""
    nodes = Nodes(2, 0, "127.0.0.1", free_port())
    first = Meeting.host(nodes)
    with pytest.raises(StageError, match=rf"at {nodes.port} meets another training"):
        Meeting.host(nodes, patience=0.05)
    assert first.name


def test_machines_meet_at_another_port_where_a_stranger_has_theirs(monkeypatch):
    monkeypatch.setattr(meeting_module, "_JOIN_SECONDS", 0.5)
    said = []
    with socket.create_server(("", 0)) as stranger:  # takes connections, and is silent
        place = ("127.0.0.1", stranger.getsockname()[1])
        host = Meeting.host(Nodes(2, 0, *place), patience=0.05, say=said.append)
        guest = Meeting.join(Nodes(2, 1, *place), print)
    assert guest.name == host.name
    assert f"another process has {place[1]}: meeting at" in said[0]


def test_who_waits_while_strangers_have_all_ports_is_told_which(monkeypatch):
    for name, value in {"_MORE_PORTS": 0, "_JOIN_SECONDS": 0.1, "_TELL_EVERY": 0.1}.items():
        monkeypatch.setattr(meeting_module, name, value)
    said = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise StopIteration  # else it waits for ever

    with socket.create_server(("127.0.0.1", 0)) as stranger:  # takes connections, and is silent
        port = stranger.getsockname()[1]
        with pytest.raises(StopIteration):
            Meeting.join(Nodes(2, 1, "127.0.0.1", port), say)
    waiting = f"waiting for machine 0 at 127.0.0.1:{port}"
    assert said[0] == waiting
    assert said[1].startswith(f"{waiting} (something listens at {port}, ")
    assert "another MASTER_PORT" in said[1]
    assert "end " not in said[1]  # it may be machine 0, on its way


def test_a_machine_of_another_job_is_not_met():
    place = ("127.0.0.1", free_port())
    first = Meeting.host(Nodes(2, 0, *place, job="1"))
    second = Meeting.host(Nodes(2, 0, *place, job="2"), patience=0.05)
    assert Meeting.join(Nodes(2, 1, *place, job="2"), print).name == second.name
    assert Meeting.join(Nodes(2, 1, *place, job="1"), print).name == first.name


def test_the_port_is_free_again_once_a_meeting_is_closed():
    """Although something holds on to the meeting, as the traceback of an error does."""
    nodes = Nodes(2, 0, "127.0.0.1", free_port())
    first = Meeting.host(nodes)
    first.close(0, "it failed", seconds=0)
    second = Meeting.host(nodes, patience=0)
    assert second.name != first.name


def test_machines_that_wait_hear_that_there_is_nothing_to_train():
    place = ("127.0.0.1", free_port())
    said, heard = [], []

    def follow():
        try:
            Meeting.join(Nodes(2, 1, *place), print).next_call(0)
        except Over as over:
            heard.append(over.why)

    follower = threading.Thread(target=follow)
    follower.start()
    machines_module.send_away(Nodes(2, 0, *place), said.append)
    follower.join(60)
    assert heard == [""]
    assert said == ["telling the 1 other machines that there is nothing to train"]
