"""Faults that pass are tried again, others are told at once, and no answer is believed half."""

import errno
import gzip
import hashlib
import json
import signal
import socket
import threading
import time

import pytest

from regrow.flows.workplace import Workplace
from regrow.infra import remote
from regrow.infra import store as store_module
from regrow.infra.artifacts import ArtifactDamaged, ArtifactStore
from regrow.infra.digests import DigestMemo
from regrow.infra.lease import Lease
from regrow.infra.model_copies import files_at
from regrow.infra.patient_file import PatientFile
from regrow.infra.remote import StoreError, patiently
from regrow.infra.settings import load_settings
from regrow.infra.store import Store, expand, open_ranges, open_raw, open_url


class ClientError(Exception):
    """As botocore's: what the server said, as a dictionary."""

    def __init__(self, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}}


class EndpointConnectionError(Exception):
    """As botocore's, which is no OSError."""


class NoCredentialsError(Exception):
    """As botocore's."""


class BotoConnectionError(Exception):
    """As botocore's `ConnectionError`, which is no OSError."""


BotoConnectionError.__name__ = "ConnectionError"


class ConnectTimeoutError(BotoConnectionError):
    """As botocore's."""


def wrapped(error: Exception) -> OSError:
    """As a file system raises it: the cause says what it was."""
    outer = OSError("the file system's words")
    outer.__cause__ = error
    return outer


def translated(code: str, number: int) -> OSError:
    """As s3fs raises it: an OSError whose cause holds the code."""
    error = OSError(number, "in words")
    error.__cause__ = ClientError(code)
    return error


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _seconds: None)


def failing(times: int, error: Exception):
    """Work that fails so many times and then gives "done"; `.calls` counts."""

    def work():
        work.calls += 1
        if work.calls <= times:
            raise error
        return "done"

    work.calls = 0
    return work


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("late"),
        translated("SlowDown", errno.EBUSY),
        translated("InternalError", errno.EREMOTEIO),
        translated("503", errno.EBUSY),
        translated("NoSuchUpload", errno.ENOENT),
        translated("SlowDownRead", errno.EBUSY),
        translated("SlowDownWrite", errno.EIO),
        EndpointConnectionError("refused"),
        ConnectTimeoutError("late"),
        BotoConnectionError("by proxy"),
        wrapped(EndpointConnectionError("refused")),
        EOFError(),
        OSError("Socket is closed"),
        remote.IncompleteTransfer("half"),
    ],
)
def test_what_passes_is_tried_again(error):
    work = failing(remote.TRIES - 1, error)
    assert patiently("s3://b", work) == "done"
    forever = failing(99, error)
    with pytest.raises(StoreError, match="s3://b"):
        patiently("s3://b", forever)
    assert forever.calls == remote.TRIES


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (translated("NoSuchBucket", errno.ENOENT), "no such bucket"),
        (translated("InvalidAccessKeyId", errno.EACCES), "credentials are refused"),
        (translated("SignatureDoesNotMatch", errno.EACCES), "credentials are refused"),
        (translated("QuotaExceeded", errno.EIO), "no space left"),
        (translated("RequestTimeTooSkewed", errno.EACCES), "clock is wrong"),
        (NoCredentialsError("none"), "there are no credentials"),
        (PermissionError("no"), "permission denied"),
        (OSError(errno.ENOSPC, "full"), "no space left"),
    ],
)
def test_what_does_not_pass_is_told_at_once(error, words):
    work = failing(99, error)
    with pytest.raises(StoreError, match=words):
        patiently("s3://b", work)
    assert work.calls == 1


@pytest.mark.parametrize("error", [FileNotFoundError("x"), FileExistsError("x"), KeyError("bug")])
def test_answers_and_bugs_pass_unchanged(error):
    with pytest.raises(type(error)):
        patiently("s3://b", failing(99, error))


class Network:
    """A file system whose answers are spoiled: a stand-in for fsspec's, before a real one."""

    def __init__(self, inner, spoil) -> None:
        self._inner, self._spoil = inner, spoil

    def __getattr__(self, name):
        return lambda *args, **options: self._spoil(
            name, lambda: getattr(self._inner, name)(*args, **options)
        )


def spoiled(tmp_path, spoil) -> Store:
    store = Store(f"memory://{tmp_path.name}")
    store._fs = Network(store._fs, spoil)
    return store


def test_lost_answer_to_the_record_does_not_cost_the_artifact(tmp_path):
    """The record is written, the answer lost, and the second try finds it there: it is ours."""
    lost = []

    def spoil(name, call):
        answer = call()
        if name == "pipe_file" and not lost:
            lost.append(name)
            raise ConnectionResetError("the answer is lost")
        return answer

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("content")
    artifacts = ArtifactStore(spoiled(tmp_path, spoil), tmp_path / "cache")
    record = artifacts.publish(
        "stages/a", tmp_path / "out", stage="s", spec={}, inputs={}, result={}
    )
    assert lost
    assert artifacts.lookup("stages/a") == record
    assert (artifacts.fetch(record) / "file").read_text() == "content"


def test_bytes_cut_or_flipped_on_the_way_are_fetched_again_and_not_called_damage(tmp_path):
    bad = iter([b"cont", b"CONTENT"])

    def spoil(name, call):
        answer = call()
        if name == "cat_file" and answer == b"content":
            return next(bad, answer)
        return answer

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("content")
    artifacts = ArtifactStore(spoiled(tmp_path, spoil), tmp_path / "cache")
    record = artifacts.publish(
        "stages/a", tmp_path / "out", stage="s", spec={}, inputs={}, result={}
    )
    assert (artifacts.fetch(record) / "file").read_text() == "content"
    artifacts.store.write_bytes(f"stages/a/{record.attempt}/file", b"CONTENT")
    with pytest.raises(ArtifactDamaged, match="file"):
        artifacts.verify(record)


def test_every_read_of_a_remote_file_is_made_again(tmp_path):
    content = bytes(range(256)) * 100
    Store(f"memory://{tmp_path.name}").write_bytes("file", content)
    url = f"memory://{tmp_path.name}/file"
    faults = iter([ConnectionResetError("reset"), b"cut"] * 2)

    def spoil(name, call):
        fault = next(faults, None) if name == "cat_file" else None
        if isinstance(fault, Exception):
            raise fault
        return fault or call()

    fs = spoiled(tmp_path, spoil)._fs
    with PatientFile(fs, f"/{tmp_path.name}/file", url, len(content)) as file:
        assert file.read(300) == content[:300]
        assert file.seek(-10, 2) == len(content) - 10
        assert file.read() == content[-10:]
        assert file.read() == b""
    assert next(faults, None) is None


def test_digest_and_decompression_of_a_remote_file_read_it_patiently(tmp_path):
    content = b"line\n" * 10_000
    Store(f"memory://{tmp_path.name}").write_bytes("rows.jsonl.gz", gzip.compress(content))
    url = f"memory://{tmp_path.name}/rows.jsonl.gz"
    with open_url(url) as lines, open_raw(url) as raw, open_ranges(url) as ranges:
        assert lines.read() == content
        assert isinstance(getattr(raw, "raw", None), PatientFile)
        assert isinstance(ranges, PatientFile)
        packed = raw.read()
    assert DigestMemo(None).sha256(url) == hashlib.sha256(packed).hexdigest()


def test_what_a_bulk_removal_passed_over_is_removed_or_told(tmp_path):
    """S3 says 200 and tells of each name that it did not remove within; s3fs looks at the 200."""

    def passing_over(name, call):
        return None if name == "rm" else call()

    def refusing(name, call):
        if name == "rm_file":
            raise PermissionError("AccessDenied")
        return passing_over(name, call)

    store = spoiled(tmp_path, passing_over)
    for name in ("a", "b"):
        store.write_bytes(f"x/{name}", b"1")
    store.remove("x")
    assert store.sizes("x") == {}
    store = spoiled(tmp_path, refusing)
    store.write_bytes("x/c", b"1")
    with pytest.raises(StoreError, match="permission denied"):
        store.remove("x")


def test_upload_that_did_not_arrive_gets_no_record(tmp_path):
    def spoil(name, call):
        return None if name == "put_file" else call()

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("content")
    artifacts = ArtifactStore(spoiled(tmp_path, spoil), tmp_path / "cache")
    with pytest.raises(StoreError, match=r"not all there.*file"):
        artifacts.publish("stages/a", tmp_path / "out", stage="s", spec={}, inputs={}, result={})
    assert artifacts.lookup("stages/a") is None


@pytest.mark.parametrize("error", [PermissionError("for a while"), RuntimeError("a driver's own")])
def test_lease_outlives_heartbeats_that_did_not_get_through(tmp_path, error):
    state = {"broken": False, "failed": 0}

    def spoil(name, call):
        if state["broken"]:
            state["failed"] += 1
            raise error
        return call()

    lease = Lease(spoiled(tmp_path, spoil), "stages/a", 0.3)
    assert lease.try_acquire()
    state["broken"] = True
    _wait(lambda: state["failed"] >= 2)
    state["broken"] = False
    name = f"memory://{tmp_path.name}"
    before = Store(name).read_bytes("leases/stages/a/00000000.json")
    _wait(lambda: Store(name).read_bytes("leases/stages/a/00000000.json") != before)
    lease.check()
    lease.release()
    assert json.loads(Store(name).read_bytes("leases/stages/a/00000000.json"))["released"]


def _wait(ready) -> None:
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end


class Slow(Network):
    """Files of 1000 ranges; the first asked for makes `end` happen, the others wait for that."""

    def __init__(self, inner, end) -> None:
        super().__init__(inner, lambda _name, call: call())
        self._end, self._ended, self.calls = end, threading.Event(), 0

    def cat_file(self, path, start=None, end=None):
        self.calls += 1
        if path.endswith("/1"):
            self._ended.set()
            self._end()
        self._ended.wait(60)
        threading.Event().wait(0.01)
        return b"x" * (end - start)


def _fails() -> None:
    raise FileNotFoundError("it is gone")


def _ctrl_c() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.parametrize(
    ("end", "error"), [(_fails, FileNotFoundError), (_ctrl_c, KeyboardInterrupt)]
)
def test_large_files_are_not_fetched_to_their_end_after_an_error_or_ctrl_c(
    tmp_path, monkeypatch, end, error
):
    monkeypatch.setattr(store_module, "_PART", 1)
    store = Store(f"memory://{tmp_path.name}")
    store._fs = slow = Slow(store._fs, end)
    names = [str(number) for number in range(4)]
    sizes = {name: 2 if name == "1" else 1000 for name in names}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            store.get_files([(name, tmp_path / name) for name in names], sizes)
    finally:
        signal.signal(signal.SIGINT, before)
    assert slow.calls < 1000


def test_store_without_conditional_writes_still_keeps_what_is_there(tmp_path):
    inner = Store(f"memory://{tmp_path.name}")._fs

    class Simple(Network):
        def pipe_file(self, path, data, mode="overwrite"):
            if mode == "create":
                raise NotImplementedError
            inner.pipe_file(path, data)

    store = Store(f"memory://{tmp_path.name}")
    store._fs = Simple(inner, lambda _name, call: call())
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read_bytes("a") == b"first"


@pytest.fixture
def silent_s3(monkeypatch):
    """A server that takes connections, and says nothing."""
    monkeypatch.setattr(remote, "_SOON", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        yield


@pytest.mark.parametrize(
    "ask",
    [
        lambda url: Store(url).check_writable(),  # a run's store
        lambda url: Workplace(load_settings(), url).artifacts,  # `store ls`, `lineage`, ...
        expand,  # a plan's data
        files_at,  # a plan's base model
    ],
    ids=["run", "store ls", "data", "model"],
)
def test_a_server_that_says_nothing_is_named_before_long(silent_s3, ask):
    with pytest.raises(StoreError, match=r"s3://b/x: no full answer came from there in 0\.3 s"):
        ask("s3://b/x")


def test_a_refusal_is_an_answer():
    def refuse() -> None:
        raise PermissionError("403")

    remote.heard("s3://b/x", refuse)
