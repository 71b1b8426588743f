"""Metrics are all delivered, in order, and never cost the measuring process anything."""

import logging
import threading
import time

import pytest

from regrow.infra.metric_buffer import MetricBuffer, Point


class _Server:
    """Takes points; fails while `up` is not set."""

    def __init__(self, up: bool = True) -> None:
        self.up = threading.Event()
        if up:
            self.up.set()
        self.points: list[Point] = []
        self.calls = 0

    def send(self, points) -> None:
        self.calls += 1
        if not self.up.is_set():
            raise ConnectionError("down")
        self.points.extend(points)

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]


def _wait_for(condition, seconds: float = 50.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_close_delivers_all_in_order_and_in_few_calls() -> None:
    server = _Server()
    buffer = MetricBuffer(server.send, ConnectionError, every=60, batch=10_000, largest=1000)
    for step in range(2500):
        buffer.add({"loss": 1.0}, step)
    buffer.close()
    assert server.steps == list(range(2500))
    assert server.calls == 3


def test_a_full_batch_is_sent_before_its_time() -> None:
    server = _Server()
    buffer = MetricBuffer(server.send, ConnectionError, every=60, batch=10)
    for step in range(10):
        buffer.add({"loss": 1.0}, step)
    _wait_for(lambda: len(server.points) == 10)
    buffer.close()


def test_a_lone_metric_is_sent_in_time() -> None:
    server = _Server()
    buffer = MetricBuffer(server.send, ConnectionError, every=0.02)
    buffer.add({"loss": 1.0}, 3)
    _wait_for(lambda: server.steps == [3])
    buffer.close()


def test_an_outage_loses_nothing_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    server = _Server(up=False)
    buffer = MetricBuffer(server.send, ConnectionError, every=0.01, retry=0.01)
    for step in range(50):
        buffer.add({"loss": 1.0}, step)
        time.sleep(0.001)
    _wait_for(lambda: server.calls >= 3)
    server.up.set()
    _wait_for(lambda: len(server.points) == 50)
    buffer.close()
    assert server.steps == list(range(50))
    assert [record.message for record in caplog.records] == [
        "metrics are kept in memory until they can be recorded: down",
        "metrics are recorded again",
    ]


def test_the_bound_drops_the_oldest_and_says_how_many(caplog: pytest.LogCaptureFixture) -> None:
    server = _Server(up=False)
    buffer = MetricBuffer(server.send, ConnectionError, every=60, batch=10**6, bound=30)
    for step in range(50):
        buffer.add({"loss": 1.0}, step)
    server.up.set()
    buffer.close()
    assert server.steps == list(range(20, 50))
    assert "20 metric values could not be recorded" in caplog.text


def test_a_dead_server_bounds_close_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    hang = threading.Event()
    buffer = MetricBuffer(lambda points: hang.wait(30) and None, ConnectionError, every=0.01)
    buffer.add({"loss": 1.0}, 0)
    time.sleep(0.05)
    buffer.add({"loss": 1.0}, 1)
    begin = time.monotonic()
    buffer.close(timeout=0.1)
    assert time.monotonic() - begin < 20  # one without a bound would wait 30 s
    assert "2 metric values could not be recorded" in caplog.text
    hang.set()


def test_adding_is_cheap_while_the_server_hangs() -> None:
    hang = threading.Event()
    buffer = MetricBuffer(lambda points: hang.wait(30) and None, ConnectionError, every=0.01)
    begin = time.monotonic()
    for step in range(5000):
        buffer.add({"loss": 1.0, "grad_norm": 0.5}, step)
    assert time.monotonic() - begin < 20  # 0.02 s measured; a call that waited would take 30 s
    hang.set()
    buffer.close()
