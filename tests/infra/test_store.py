"""Bytes by name on any file system: whole, exclusive, listed as they are now."""

import errno
import gzip
import os
from datetime import UTC, datetime, timedelta

import pytest
from fsspec.implementations.local import LocalFileSystem

from regrow.infra.artifacts import ArtifactStore
from regrow.infra.digests import DigestMemo, sha256_file
from regrow.infra.lease import Lease
from regrow.infra.store import Store, StoreError, expand, open_url


@pytest.fixture(params=["local", "memory", "dir"])
def store(request, tmp_path):
    """A store on a file system of each kind; `dir` has folders and is not known to be local."""
    urls = {"local": f"{tmp_path}/s", "memory": f"memory://{tmp_path.name}"}
    (tmp_path / "below").mkdir()
    return Store(urls.get(request.param) or f"dir::file://{tmp_path}/below")


def test_create_succeeds_once(store):
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read_bytes("a/b") == b"first"


def test_write_replaces_whole(store):
    store.write_bytes("x", b"long content")
    store.write_bytes("x", b"short")
    assert store.read_bytes("x") == b"short"
    assert store.sizes("") == {"x": 5}


def test_sizes_and_folders_show_another_writers_files(store, tmp_path):
    assert store.folders("top") == []
    other = Store(store.url)
    other.write_bytes("top/one/file", b"123")
    assert store.folders("top") == ["one"]
    assert store.sizes("top") == {"one/file": 3}


def test_remove_of_nothing_is_no_error(store):
    store.remove("nothing/here")


def test_remove_takes_all_below_and_nothing_beside(store):
    for name in ("a/b/c", "a/d", "ab"):
        store.write_bytes(name, b"x")
    store.remove("a")
    assert store.sizes("") == {"ab": 1}
    assert store.folders("") == []


def test_only_an_empty_directory_is_pruned(store):
    store.write_bytes("a/b", b"x")
    store.prune("a")
    assert store.sizes("") == {"a/b": 1}
    store.remove("a/b")
    store.prune("a")
    assert store.folders("") == []


def test_entries_tell_when_a_file_was_written(store):
    before = datetime.now(UTC) - timedelta(seconds=5)
    store.write_bytes("a/b", b"x")
    (entry,) = store.entries("a").values()
    assert before < entry.changed < datetime.now(UTC) + timedelta(seconds=5)


def test_a_store_has_one_name_of_its_own(store, tmp_path):
    assert store.id == Store(store.url).id != Store(tmp_path / "other").id


def test_files_go_into_folders_that_are_not_there_yet_and_come_back(store, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    store.put_files([(tmp_path / "file", "not/yet/there")])
    store.get_files([("not/yet/there", tmp_path / "back" / "file")])
    assert (tmp_path / "back" / "file").read_bytes() == b"content"
    store.check_writable()


def test_artifacts_and_leases_live_on_it(store, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("content")
    artifacts = ArtifactStore(store, tmp_path / "cache")
    with Lease(store, "stages/a", 30) as lease:
        assert lease.try_acquire()
        assert not Lease(store, "stages/a", 30).try_acquire()
        facts = {"stage": "s", "spec": {}, "inputs": {}, "result": {}}
        record = artifacts.publish("stages/a", tmp_path / "out", **facts)
    assert (artifacts.fetch(record) / "file").read_text() == "content"
    artifacts.remove("stages/a")
    assert store.sizes("stages") == {}


def test_no_reader_of_a_file_system_with_folders_sees_half_a_file(tmp_path):
    """Every write there goes beside and is renamed: what is opened for writing has another name."""
    (tmp_path / "below").mkdir()
    store = Store(f"dir::file://{tmp_path}/below")
    opened, inner = [], store._fs

    class Watched:
        def __getattr__(self, name):
            return getattr(inner, name)

        def pipe_file(self, path, data):
            opened.append(path)
            inner.pipe_file(path, data)

    store._fs = Watched()
    store.write_bytes("a/record.json", b"x")
    store.create("b/record.json", b"x")
    assert opened
    assert not [path for path in opened if path.endswith("record.json")]
    assert store.sizes("") == {"a/record.json": 1, "b/record.json": 1}


def test_reading_an_absent_name_says_so(store):
    with pytest.raises(FileNotFoundError):
        store.read_bytes("absent")


def test_unwritable_store_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="REGROW_STORE"):
        Store(tmp_path / "file" / "below").check_writable()


def test_unknown_protocol_names_the_remedy():
    with pytest.raises(StoreError, match="nosuch"):
        Store("nosuch://bucket")


def test_expand_knows_file_directory_and_glob(tmp_path):
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).write_text("{}")
    assert [p.rsplit("/", 1)[1] for p in expand(str(tmp_path))] == ["a.json", "b.json", "c.txt"]
    assert [p.rsplit("/", 1)[1] for p in expand(f"{tmp_path}/*.json")] == ["a.json", "b.json"]
    assert expand(str(tmp_path / "none")) == []


def test_gz_is_read_as_its_content(tmp_path):
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        file.write(b'{"a": 1}\n')
    with open_url(str(tmp_path / "x.jsonl.gz")) as file:
        assert file.read() == b'{"a": 1}\n'


def test_memo_notices_a_change_of_content(tmp_path):
    memo, path = DigestMemo(tmp_path / "memo.sqlite"), tmp_path / "data"
    path.write_text("one")
    before = memo.sha256(path)
    path.write_text("two")
    assert memo.sha256(path) == sha256_file(path) != before


def test_memo_of_a_settled_file_is_used(tmp_path):
    import sqlite3

    path = tmp_path / "data"
    path.write_text("one")
    os.utime(path, (1, 1))
    memo = DigestMemo(tmp_path / "memo.sqlite")
    digest = memo.sha256(path)
    with sqlite3.connect(tmp_path / "memo.sqlite") as db:
        assert db.execute("SELECT sha256 FROM digests").fetchall() == [(digest,)]
        db.execute("UPDATE digests SET sha256 = 'remembered'")
    assert memo.sha256(path) == "remembered"


@pytest.mark.parametrize(
    "url",
    ["s3://AKIAPLANTED:plan/ted+secret@bucket/x", "s3://k:planted@b", "sftp://me:planted@host/x"],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(url):
    for use in (Store, expand, open_url):
        with pytest.raises(StoreError, match="holds a password") as caught:
            use(url)
        assert "plan" not in str(caught.value)
        assert "ted" not in str(caught.value).replace("recorded", "")


def test_a_port_is_no_password():
    with pytest.raises(StoreError, match=r"nothing answers|does not answer|Cannot connect|refused"):
        open_url("http://127.0.0.1:9/rows@2.jsonl")


def test_what_is_no_name_of_a_bucket_is_told(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with pytest.raises(StoreError, match="no valid name of a bucket"):
        Store("s3://no_bucket:name/x").exists("y")


@pytest.fixture(params=["local", "dir"])
def with_folders(request, tmp_path):
    (tmp_path / "below").mkdir()
    return Store({"local": f"{tmp_path}/s"}.get(request.param) or f"dir::file://{tmp_path}/below")


def break_down(monkeypatch, method: str, ending: str) -> None:
    """From now on the disk does not answer when it is asked about that."""
    whole = getattr(LocalFileSystem, method)

    def failing(self, path, **options):
        if str(path).endswith(ending):
            raise OSError(errno.EIO, "the disk does not answer")
        return whole(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, method, failing)


def test_folder_that_cannot_be_listed_is_not_empty(with_folders, monkeypatch):
    with_folders.write_bytes("top/a/file", b"x")
    with_folders.write_bytes("top/b/file", b"x")
    break_down(monkeypatch, "ls", "/top/b")
    with pytest.raises(OSError, match="does not answer"):
        with_folders.sizes("top")
    assert with_folders.sizes("top/a") == {"file": 1}


def test_file_that_cannot_be_looked_at_is_not_absent(with_folders, monkeypatch):
    with_folders.write_bytes("a/record", b"first")
    with monkeypatch.context() as broken:
        break_down(broken, "info", "/a/record")
        with pytest.raises(OSError, match="does not answer"):
            with_folders.exists("a/record")
        if with_folders.local is None:
            with pytest.raises(OSError, match="does not answer"):
                with_folders.create("a/record", b"second")
    assert with_folders.read_bytes("a/record") == b"first"
    assert not with_folders.exists("a/record/below-a-file")
    assert with_folders.sizes("a/record/below-a-file") == {}


@pytest.mark.parametrize("pattern", ["", "/*/*.json", "/**/*.json"])
def test_expand_leaves_no_folder_out_silently(tmp_path, monkeypatch, pattern):
    for name in ("a/1.json", "b/2.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    assert len(expand(f"{tmp_path}{pattern}")) == 2
    break_down(monkeypatch, "ls", "/b")
    with pytest.raises(OSError, match="does not answer"):
        expand(f"{tmp_path}{pattern}")


def test_globs_mean_what_they_mean_to_fsspec(tmp_path):
    for name in ("x.json", "a/1.json", "a/b/2.json", "a/b/c/3.txt", "a/[4].json", "d.json/5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "x.json")
    (tmp_path / "broken.json").symlink_to(tmp_path / "none")
    (tmp_path / "folder.json").symlink_to(tmp_path / "a")
    fs = LocalFileSystem()
    for ending in (
        "*.json",
        "*/*.json",
        "**/*.json",
        "a/**",
        "**",
        "?.json",
        "a/b/[0-9].*",
        "*/b/*",
    ):
        pattern = f"{tmp_path}/{ending}"
        assert expand(pattern) == sorted(n for n in fs.glob(pattern) if fs.isfile(n)), ending


def test_write_outlives_a_folder_that_is_pruned_meanwhile(tmp_path, monkeypatch):
    store, makedirs, calls = Store(tmp_path), os.makedirs, []

    def pruned_at_first(path, **options):
        makedirs(path, **options)
        calls.append(path)
        if len(calls) == 1:
            os.rmdir(path)

    monkeypatch.setattr(os, "makedirs", pruned_at_first)
    assert store.create("a/b", b"x")
    assert store.read_bytes("a/b") == b"x"
