"""Requests to S3 fail in every way: all runs finish, and every artifact is right."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from regrow.infra.artifacts import ArtifactStore, Record
from regrow.infra.store import Store
from tests.flows.conftest import place as place  # a fixture: a tiny pipeline
from tests.services.fault_proxy import FAULTS, proxy
from tests.services.pipelines import Pipelines

pytestmark = pytest.mark.services

STAGES = ("prepare", "train", "merge", "baseline", "evaluate", "publish")
BUILT = dict.fromkeys(STAGES, "built")


@pytest.fixture
def pipelines(place, tmp_path) -> Iterator[Pipelines]:
    # A heartbeat every two seconds: several in one run, so that faults meet them too.
    place.write_recipe(max_steps=4)
    made = Pipelines(place.env | {"REGROW_LEASE_SECONDS": "6"}, tmp_path / "runs.log")
    yield made
    made.close()


DELIVERY = "regrow-delivery.json"
"""What was published, with sizes."""
MODEL = ("prepare", "train", "merge")
"""Stages whose artifacts are the same bytes in each run; the others' hold times."""


def digests(artifacts: ArtifactStore) -> dict[str, dict[str, str]]:
    """{stage: {file: sha256}} of the complete artifacts that lead to the model."""
    return {
        record.stage: {name: entry.sha256 for name, entry in record.files.items()}
        for record in artifacts.records("stages")
        if record.stage in MODEL
    }


def published(folder: Store) -> dict[str, bytes]:
    """{file: bytes} of a publication, but of its card, which names the store and the time."""
    sizes = folder.sizes("published")
    listed = json.loads(folder.read_bytes(f"published/{DELIVERY}"))
    assert listed == {name: size for name, size in sizes.items() if name != DELIVERY}
    names = set(sizes) - {DELIVERY, "README.md"}
    return {name: folder.read_bytes(f"published/{name}") for name in names}


class Watcher:
    """Reads all records again and again, as another machine would, while they come into being."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts, self._stop = artifacts, threading.Event()
        self.looks, self.partial = 0, []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _watch(self) -> None:
        seen: set[str] = set()
        while not self._stop.wait(0.5):
            for family in ("stages", "units"):
                for key in self._artifacts.children(family):
                    if key not in seen:
                        self._look(key, seen)

    def _look(self, key: str, seen: set[str]) -> None:
        try:
            record = self._artifacts.lookup(key)
            if record is not None:
                self._artifacts.verify(record)
                seen.add(key)
                self.looks += 1
        except Exception as error:  # noqa: BLE001 (whatever a reader meets is the finding)
            self.partial.append(f"{key}: {error}")


def run_many(count: int, place, s3_server, pipelines, tmp_path: Path, monkeypatch) -> None:
    """`count` runs, each in a bucket of its own behind a proxy with another seed."""
    local = tmp_path / "right"
    home = {"REGROW_HOME": str(tmp_path / "home-right"), "REGROW_STORE": str(local)}
    target = {"output_dir": f"{local}/published"}
    assert pipelines.run(place.recipe, home, "publish", target) == BUILT
    right = Right(
        digests(ArtifactStore(Store(local), tmp_path / "unused")), published(Store(local))
    )
    assert set(right.digests) == set(MODEL)
    assert "model.safetensors" in right.published
    requests, faults, seconds, failed = 0, dict.fromkeys(FAULTS, 0), [], []
    for seed in range(count):
        bucket = s3_server.bucket()
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        clean = ArtifactStore(Store(f"{bucket.url}/store"), tmp_path / f"clean-{seed}")
        env = bucket.env | {"REGROW_HOME": str(tmp_path / f"home-{seed}")}
        with proxy(s3_server.endpoint, FAULTS, seed) as faulty, Watcher(clean) as watcher:
            begin = time.monotonic()
            try:
                env |= {"AWS_ENDPOINT_URL": faulty.url}
                target = {"output_dir": f"{bucket.url}/published"}
                assert pipelines.run(place.recipe, env, "publish", target) == BUILT
                check_all_right(clean, right)
                assert published(Store(bucket.url)) == right.published
            except AssertionError as error:  # told at the end, with all others
                failed.append(f"run {seed}: {error}")
            seconds.append(time.monotonic() - begin)
        failed += [f"run {seed}: partly visible: {seen}" for seen in watcher.partial]
        print(f"run {seed}: {seconds[-1]:.1f} s, {faulty.requests} requests", flush=True)
        requests += faulty.requests
        faults = {name: faults[name] + faulty.faults[name] for name in faults}
    print(
        f"\n{count} runs through the faulty proxy: {requests} requests, "
        + ", ".join(f"{number} {name}" for name, number in faults.items())
        + f"; {sum(seconds) / count:.1f} s a run, longest {max(seconds):.1f} s; "
        + ("all finished, every artifact right, no partial record seen" if not failed else "")
    )
    assert not failed, "\n\n".join([f"{len(failed)} faults in {count} runs", *failed])
    assert all(faults.values())


@dataclass(frozen=True)
class Right:
    """What a run without faults makes."""

    digests: Mapping[str, Mapping[str, str]]
    published: Mapping[str, bytes]


def check_all_right(clean: ArtifactStore, right: Right) -> None:
    """What lies in the store is right, whole, and nothing else."""
    assert digests(clean) == right.digests
    assert {record.stage for record in clean.records("stages")} == {
        s for s in STAGES if s != "baseline"
    }
    records: list[Record] = [*clean.records("stages"), *clean.records("units")]
    for record in records:
        clean.verify(record)
        assert clean.store.folders(record.key) == ([record.attempt] if record.files else [])


@pytest.mark.slow
def test_runs_finish_right_through_a_faulty_network(
    place, s3_server, pipelines, tmp_path, monkeypatch
):
    run_many(5, place, s3_server, pipelines, tmp_path, monkeypatch)


@pytest.mark.extended
def test_fifty_runs_finish_right_through_a_faulty_network(
    place, s3_server, pipelines, tmp_path, monkeypatch
):
    run_many(50, place, s3_server, pipelines, tmp_path, monkeypatch)
