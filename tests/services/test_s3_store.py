"""The store's contract on a mock S3 and on a real one, and what people hear when S3 refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from regrow.infra.artifacts import ArtifactDamaged, ArtifactStore
from regrow.infra.digests import DigestMemo
from regrow.infra.housekeeping import holdings
from regrow.infra.lease import Lease
from regrow.infra.store import Store, StoreError, expand, identity, open_raw, open_url
from regrow.tasks.publish.delivery import MANIFEST, deliver, why_undelivered
from regrow.tasks.stage import StageError

pytestmark = pytest.mark.services

KEY = "stages/0123"
MEGABYTE = 1 << 20


@pytest.fixture(params=["moto", "radosgw"])
def bucket(request):
    """A new bucket on each server; this process's environment leads there."""
    return request.getfixturevalue("mock_bucket" if request.param == "moto" else "s3_bucket")


@pytest.fixture
def store(bucket):
    return Store(f"{bucket.url}/deep/store")


@pytest.fixture
def filled(tmp_path):
    folder = tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha")
    (folder / "empty").write_text("")
    (folder / "deep" / "b ü.txt").write_text("beta")
    return folder


def publish(artifacts: ArtifactStore, folder, key: str = KEY):
    return artifacts.publish(key, folder, stage="prepare", spec={"x": 1}, inputs={}, result={})


def test_names_are_written_created_listed_and_removed(store):
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read_bytes("a/b") == b"first"
    store.write_bytes("a/b", b"third")
    Store(store.url).write_bytes("top/one/file", b"123")  # another writer's is seen at once
    assert (store.folders(""), store.folders("top")) == (["a", "top"], ["one"])
    assert store.sizes("") == {"a/b": 5, "top/one/file": 3}
    assert store.exists("a/b")
    store.remove("a")
    store.remove("nothing/here")
    assert not store.exists("a/b")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a/b")


def test_what_may_not_be_removed_is_told_though_s3_answers_with_success(s3_server, s3_bucket):
    """A removal of many names is answered 200; what was refused is named within."""
    rule = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:DeleteObject",
        "Resource": f"arn:aws:s3:::{s3_bucket.name}/x/kept",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
    s3_server.client().put_bucket_policy(Bucket=s3_bucket.name, Policy=policy)
    store = Store(s3_bucket.url)
    for name in ("x/kept", "x/other"):
        store.write_bytes(name, b"1")
    with pytest.raises(StoreError, match="permission denied"):
        store.remove("x")
    assert store.sizes("x") == {"kept": 1}


def test_creating_again_what_is_already_ours_counts_as_created(store):
    assert store.create("record", b"mine alone")
    assert store.create("record", b"mine alone")  # as after an answer that was lost


def test_of_many_that_create_at_once_one_wins(store):
    contents = [f"writer {i}".encode() for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda data: store.create("race", data), contents))
    assert won.count(True) == 1
    assert store.read_bytes("race") == contents[won.index(True)]


def test_large_files_go_in_parts_and_come_back_in_ranges(store, tmp_path):
    data = os.urandom(40 * MEGABYTE + 17)
    (tmp_path / "large").write_bytes(data)
    store.put_files([(tmp_path / "large", "x/large")])
    assert store.sizes("x") == {"large": len(data)}
    store.get_files([("x/large", tmp_path / "back")])
    assert (tmp_path / "back").read_bytes() == data
    assert "-3" in identity(store.url_of("x/large"))[1]  # how S3 marks what came in three parts


def test_artifact_is_published_found_and_read_back(store, filled, tmp_path):
    artifacts = ArtifactStore(store, tmp_path / "cache")
    record = publish(artifacts, filled)
    assert ArtifactStore(Store(store.url), tmp_path / "c2").lookup(KEY) == record
    folder = artifacts.fetch(record)
    assert (folder / "deep" / "b ü.txt").read_text() == "beta"
    assert (folder / "empty").read_text() == ""
    assert [holding.record for holding in holdings(artifacts)] == [record]
    again = publish(artifacts, filled)
    assert again == record
    assert store.folders(KEY) == [record.attempt]
    artifacts.remove(KEY)
    assert artifacts.lookup(KEY) is None
    assert store.sizes("stages") == {}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_named_and_mended(store, filled, tmp_path, damage):
    artifacts = ArtifactStore(store, tmp_path / "cache")
    record = publish(artifacts, filled)
    name = f"{KEY}/{record.attempt}/deep/b ü.txt"
    if damage == "delete":
        store.remove(name)
    else:
        store.write_bytes(name, b"bEta" if damage == "flip" else b"be")
    for look in (artifacts.verify, artifacts.fetch):
        with pytest.raises(ArtifactDamaged, match=r"deep/b ü\.txt"):
            look(record)
    if damage != "flip":  # same sizes need the bytes to be read, which publishing does not
        assert publish(artifacts, filled).attempt != record.attempt


def test_lease_passes_from_hand_to_hand(store):
    first, second = Lease(store, KEY, 30), Lease(store, KEY, 30)
    with first:
        assert first.try_acquire()
        assert not second.try_acquire()
        assert second.holder()
    with second:
        assert second.try_acquire()
    assert second.holder() is None


def test_urls_are_expanded_read_and_remembered(store, tmp_path):
    for name in ("b.json", "a.json", "c.txt"):
        store.write_bytes(f"data/{name}", f"[{name!r}]".encode())
    files = expand(f"{store.url}/data/*.json")
    assert files == [f"{store.url}/data/a.json", f"{store.url}/data/b.json"]
    assert len(expand(f"{store.url}/data")) == 3
    assert expand(f"{store.url}/none") == []
    with open_raw(files[0]) as raw, open_url(files[0]) as opened:
        assert raw.read() == opened.read() == b"['a.json']"
    memo = DigestMemo(tmp_path / "memo.sqlite")
    before, mark = memo.sha256(files[0]), identity(files[0])
    store.write_bytes("data/a.json", b"['A.json']")
    assert identity(files[0]) != mark
    assert memo.sha256(files[0]) != before


class Silent:
    def log(self, message: str) -> None: ...

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None: ...


def test_model_is_published_to_a_bucket_whole_and_its_loss_noticed(bucket, filled):
    target = f"{bucket.url}/published/model"
    files = {path.name: path for path in filled.rglob("*") if path.is_file()}
    Store(target).write_bytes("theirs", b"not ours")
    sizes = deliver(target, files, "# card", Silent())
    assert Store(target).sizes("").keys() == {*files, "README.md", MANIFEST, "theirs"}
    result = {"output_dir": target, "files": sizes}
    assert why_undelivered(result) is None
    deliver(target, {"a.txt": files["a.txt"]}, "# card", Silent())
    assert Store(target).sizes("").keys() == {"a.txt", "README.md", MANIFEST, "theirs"}
    assert "is missing" in (why_undelivered(result) or "")
    with pytest.raises(StageError, match=r"output_dir.*there is no such bucket"):
        deliver("s3://no-such-bucket/model", files, "# card", Silent())


CHECK = "import sys; from regrow.infra.store import Store; Store(sys.argv[1]).check_writable()"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials are refused"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "credentials are refused"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_EC2_METADATA_DISABLED": "true"}, "no credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "nothing answers there"),
    ],
)
def test_refusals_are_one_clear_message(s3_bucket, change, words):
    env = os.environ | s3_bucket.env | change
    env = {name: value for name, value in env.items() if value}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, s3_bucket.url],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert words in last
    assert s3_bucket.url in last
    assert s3_bucket.secret_key not in done.stderr


def test_missing_bucket_is_named_wherever_it_is_met(s3_bucket):
    for use in (Store.check_writable, lambda store: store.read_bytes("x")):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket.*there is no such bucket"):
            use(Store("s3://no-such-bucket/store"))


def test_full_store_is_named(s3_server, s3_bucket, tmp_path):
    s3_server.limit_bytes(s3_bucket, 1 << 20)
    (tmp_path / "large").write_bytes(os.urandom(3 << 20))
    store = Store(s3_bucket.url)
    with pytest.raises(StoreError, match="no space left, or a quota"):
        store.put_files([(tmp_path / "large", f"large-{i}") for i in range(3)])
