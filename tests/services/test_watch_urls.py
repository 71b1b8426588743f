"""A look at source data in an object store reads what has changed alone, whichever pod it is in."""

from __future__ import annotations

from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings
from tests.flows.test_watch import look
from tests.flows.test_watch import started as started  # a fixture


def test_another_pod_does_not_read_again_what_has_not_changed(
    started, tmp_path, mock_s3_server, mock_bucket, monkeypatch
):
    client = mock_s3_server.client()
    for name in ("a", "b"):
        client.put_object(Bucket=mock_bucket.name, Key=f"data/{name}", Body=name.encode())
    url = f"{mock_bucket.url}/data/*"
    look(url, tmp_path / "store")

    read: list[str] = []
    home = tmp_path / "pod-2"
    monkeypatch.setenv("REGROW_HOME", str(home))  # its disk is new
    memo = Workplace(load_settings()).memo
    original = type(memo).sha256
    monkeypatch.setattr(
        type(memo), "sha256", lambda self, place: read.append(place) or original(self, place)
    )
    look(url, tmp_path / "store")
    assert read == []
    client.put_object(Bucket=mock_bucket.name, Key="data/b", Body=b"changed")
    look(url, tmp_path / "store")
    assert read == [f"{mock_bucket.url}/data/b"]
    assert started == ["finetune/tiny"]
