"""The local cache stays within its limit, loses the least recently used, and nothing in use."""

import os
import subprocess
import sys
import time

import pytest

from regrow.infra.artifacts import ArtifactStore
from regrow.infra.cache import LocalCache
from regrow.infra.pins import pin
from regrow.infra.settings import SettingError, load_settings
from regrow.infra.store import Store

KILOBYTE = 1000


def entry(root, name: str, used: float, size: int = KILOBYTE):
    """An entry as an earlier process left it, last used at `used` (seconds since 1970)."""
    path = root / name / "attempt-1"
    path.mkdir(parents=True)
    (path / "file").write_bytes(b"x" * size)
    os.utime(path, (used, used))
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def make_room(root, size: int, limit: int | None = 3 * KILOBYTE, last: tuple[str, ...] = ()):
    LocalCache(root, limit).make_room(size, lambda: last)


def test_least_recently_used_goes_first_and_no_more_than_needed(root):
    old, older, new = (
        entry(root, f"stages/{name}", used) for name, used in (("b", 200), ("a", 100), ("c", 300))
    )
    make_room(root, KILOBYTE)
    assert (old.exists(), older.exists(), new.exists()) == (True, False, True)


def test_nothing_goes_while_there_is_room(root):
    kept = entry(root, "stages/a", 1)
    make_room(root, KILOBYTE)
    make_room(root, 10 * KILOBYTE, limit=None)
    assert kept.exists()


def test_use_makes_an_entry_young(root):
    used, other = entry(root, "stages/a", 100), entry(root, "stages/b", 200)
    code = (
        "import sys; from pathlib import Path; from regrow.infra.cache import LocalCache\n"
        "LocalCache(Path(sys.argv[1]), None).use('stages/a/attempt-1')"
    )
    subprocess.run([sys.executable, "-c", code, root], check=True)  # its use ends with it
    make_room(root, 2 * KILOBYTE)
    assert (used.exists(), other.exists()) == (True, False)


def test_what_a_living_process_uses_stays_and_goes_when_it_is_killed(root):
    used = entry(root, "stages/a", 100)
    code = (
        "import sys, time; from pathlib import Path; from regrow.infra.cache import LocalCache\n"
        "LocalCache(Path(sys.argv[1]), None).use('stages/a/attempt-1')\n"
        "print('in use', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in use\n"
    make_room(root, 3 * KILOBYTE)
    assert used.exists()
    process.kill()
    process.wait()
    make_room(root, 3 * KILOBYTE)
    assert not used.exists()
    assert list((root / "in-use").iterdir()) == []


def test_pinned_ones_go_last(root):
    pinned, young = entry(root, "stages/a", 100), entry(root, "stages/b", 200)
    make_room(root, 2 * KILOBYTE, last=("stages/a",))
    assert (pinned.exists(), young.exists()) == (True, False)


def test_downloads_left_by_killed_processes_go_after_a_day(root):
    left = root / "stages/a/attempt-1.0123.partial"
    left.mkdir(parents=True)
    make_room(root, 1)
    assert left.exists()
    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    make_room(root, 1)
    assert not left.exists()


def test_artifacts_are_fetched_again_after_they_went(tmp_path, monkeypatch):
    monkeypatch.setenv("REGROW_CACHE_GB", "0.000003")
    artifacts = ArtifactStore(Store(f"memory://{tmp_path.name}"), tmp_path / "cache")
    (tmp_path / "out").mkdir()
    for name in "ab":
        (tmp_path / "out" / "file").write_bytes(name.encode() * 2000)
        key = f"stages/{name}"
        artifacts.publish(key, tmp_path / "out", stage="s", spec={}, inputs={}, result={})
    pin(artifacts.store, "keep", "stages/a")
    code = (
        "import sys; from pathlib import Path; from regrow.infra.cache import LocalCache\n"
        "root = Path(sys.argv[1]); (root / 'stages/old/attempt-1').mkdir(parents=True)\n"
        "(root / 'stages/old/attempt-1/file').write_bytes(b'x' * 2000)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], check=True)
    for name in "ab":  # both are in use here, so both stay, beyond the limit
        folder = artifacts.fetch(artifacts.lookup(f"stages/{name}"))
        assert (folder / "file").read_bytes() == name.encode() * 2000
    assert not (tmp_path / "cache/stages/old/attempt-1").exists()


def test_limit_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("REGROW_CACHE_GB", "lots")
    with pytest.raises(SettingError, match=r"REGROW_CACHE_GB.*lots"):
        load_settings()
