"""Bytes by name on any file system: whole, exclusive, listed as they are now."""

import gzip

import pytest

from regrow.infra.digests import DigestMemo, sha256_file
from regrow.infra.store import Store, StoreError, expand, open_url


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "s" if request.param == "local" else f"memory://{tmp_path.name}")


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
    import os
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
