"""The store's contract over SFTP, on a real OpenSSH server: the same tests as on a local disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest

from regrow.infra.artifacts import ArtifactDamaged, ArtifactStore
from regrow.infra.collection import Collection
from regrow.infra.digests import DigestMemo, sha256_file
from regrow.infra.model_copies import local_copy
from regrow.infra.store import Store, StoreError, expand, open_url
from tests.infra.test_store import (  # noqa: F401 (they run here with this file's `store`)
    test_a_store_has_one_name_of_its_own,
    test_artifacts_and_leases_live_on_it,
    test_create_succeeds_once,
    test_entries_tell_when_a_file_was_written,
    test_files_go_into_folders_that_are_not_there_yet_and_come_back,
    test_only_an_empty_directory_is_pruned,
    test_reading_an_absent_name_says_so,
    test_remove_of_nothing_is_no_error,
    test_remove_takes_all_below_and_nothing_beside,
    test_sizes_and_folders_show_another_writers_files,
    test_write_replaces_whole,
)

pytestmark = [pytest.mark.services, pytest.mark.extended]


@pytest.fixture
def store(ssh_server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(ssh_server.home))
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "home"))
    return Store(ssh_server.url(tmp_path / "served" / "store"))


def test_many_files_go_and_come_at_once_and_damage_is_found(store, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for i in range(20):
        (out / f"{i}.bin").write_bytes(bytes([i]) * (1 << 20))
    artifacts = ArtifactStore(store, tmp_path / "cache")
    facts = {"stage": "s", "spec": {}, "inputs": {}, "result": {}}
    record = artifacts.publish("stages/a", out, **facts)
    assert (artifacts.fetch(record) / "7.bin").read_bytes() == bytes([7]) * (1 << 20)
    artifacts.verify(record)
    store.write_bytes(f"stages/a/{record.attempt}/7.bin", b"damaged")
    with pytest.raises(ArtifactDamaged, match=r"7\.bin"):
        artifacts.verify(record)
    gc = Collection(artifacts, timedelta(hours=-1), 30)
    assert [gc.remove(found) for found in gc.unneeded()] == [True]
    assert store.folders("stages") == []


def test_who_writes_at_once_leaves_one_whole_record(store):
    contents = [f"writer {i}".encode() * 1000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: store.create("race", data), contents))
    assert store.read_bytes("race") in contents
    assert list(store.sizes("")) == ["race"]


def test_sources_and_models_below_an_sftp_url_are_read(store, tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        store.write_bytes(f"data/{name}", b'{"a": 1}\n')
    files = expand(f"{store.url}/data/*.jsonl")
    assert [file.rpartition("/")[2] for file in files] == ["a.jsonl", "b.jsonl"]
    with open_url(files[0]) as opened:
        assert opened.read() == b'{"a": 1}\n'
    (tmp_path / "same").write_bytes(b'{"a": 1}\n')
    assert DigestMemo(tmp_path / "memo").sha256(files[0]) == sha256_file(tmp_path / "same")
    assert sorted(p.name for p in local_copy(f"{store.url}/data").iterdir()) == [
        "a.jsonl",
        "b.jsonl",
    ]


def test_store_is_used_from_many_threads_and_outlives_its_connections(store, ssh_server):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.write_bytes(f"x/{i}", b"1"), range(40)))
        assert len(store.sizes("x")) == 40
        for session in psutil.Process(ssh_server.pid).children(recursive=True):
            session.kill()
        assert list(pool.map(lambda i: store.read_bytes(f"x/{i}"), range(40))) == [b"1"] * 40


def test_a_wrong_key_is_one_clear_message(ssh_server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # a home without a key
    with pytest.raises(StoreError, match=r"sftp://.*lets nobody in"):
        Store(ssh_server.url(tmp_path) + "/another").check_writable()
