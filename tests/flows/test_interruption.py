"""A signal that somebody swallowed is raised again at the next safe point, and only then."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from pathlib import Path

import pytest
from prefect.exceptions import TerminationSignal

from regrow.flows.interruption import look, remembered
from regrow.flows.progress import LineReporter
from regrow.flows.session import Session
from tests.flows import made_pipeline


class _Thing:
    """Something that a weak reference can point to."""


def send(number: signal.Signals) -> None:
    """The signal, to this process; it comes while this function runs."""
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass


def swallowed(number: signal.Signals) -> None:
    """The signal comes while a library is in a block that excepts everything."""
    try:
        send(number)
    except BaseException:  # noqa: BLE001 (what is tested)
        return
    raise AssertionError("it did not come")


@pytest.fixture
def terminating():
    """SIGTERM raises, as Prefect has it in a flow."""

    def handler(number: int, _frame: object) -> None:
        raise TerminationSignal(number)

    before = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def _interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("say", [lambda r: r.log("x"), lambda r: r.progress(1, 2, "rows")])
def test_swallowed_ctrl_c_is_raised_again_when_a_stage_reports(say):
    report = LineReporter("prepare", lambda _line: None)
    with remembered():
        say(report)
        swallowed(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            say(report)
        with pytest.raises(KeyboardInterrupt):  # until the run has ended
            say(report)
    say(report)


@pytest.mark.usefixtures("terminating")
def test_swallowed_sigterm_does_again_what_its_handler_did():
    with remembered():
        swallowed(signal.SIGTERM)
        with pytest.raises(TerminationSignal):
            look()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_the_callback_of_a_weak_reference_is_not_lost():
    """Python prints what is raised there, and goes on."""
    thing = _Thing()
    reference = weakref.ref(thing, lambda _gone: send(signal.SIGINT))
    with remembered():
        del thing
        assert reference() is None
        with pytest.raises(KeyboardInterrupt):
            look()


def test_what_is_on_its_way_is_not_raised_twice():
    """A run that ends says so, and gives back what it holds."""
    said: list[str] = []
    report = LineReporter("train", said.append)

    def run() -> None:
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            report.log("the workers end")
            try:
                raise ValueError("while it ended")
            finally:
                report.log("the lease is given back")

    with remembered(), pytest.raises(ValueError, match="while it ended"):
        run()
    assert said == ["[train] the workers end", "[train] the lease is given back"]


def test_other_threads_and_other_signals_raise_nothing():
    raised: list[BaseException] = []

    def report() -> None:
        try:
            look()
        except BaseException as error:  # noqa: BLE001 (none is wanted)
            raised.append(error)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with remembered():
            send(signal.SIGUSR1)
            look()
            swallowed(signal.SIGINT)
            thread = threading.Thread(target=report)
            thread.start()
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert raised == []


@pytest.mark.usefixtures("terminating")
def test_signal_of_a_forked_child_is_none_of_its_parents():
    """A pool ends its workers with SIGTERM; the run goes on."""
    with remembered():
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            send(signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        look()


def test_block_within_a_block_keeps_what_came_before():
    with remembered():
        swallowed(signal.SIGINT)
        with remembered(), pytest.raises(KeyboardInterrupt):
            look()
    assert signal.set_wakeup_fd(-1) == -1


def test_run_whose_ctrl_c_was_swallowed_stops_at_its_next_stage(tmp_path: Path, monkeypatch):
    plan = made_pipeline.make_plan("swallowed", 1e-3)
    done = []

    def run(session: Session, stage, *args, **kwargs):
        outcome = original(session, stage, *args, **kwargs)
        done.append(stage.title)
        if stage.title == "prepare":
            swallowed(signal.SIGINT)
        return outcome

    original = Session.run
    monkeypatch.setattr(Session, "run", run)
    with remembered(), pytest.raises(KeyboardInterrupt):
        made_pipeline.run_made(plan, tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert done == ["prepare"]
