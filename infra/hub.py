"""Models and data sets on the Hugging Face hub: their commit, and a local copy of it.

A place on the hub is written `hub://<owner>/<name>@<commit>`: with the commit in it, what it means
never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regrow.infra import model_copies
from regrow.infra.store import is_url

_PREFIX = "hub://"
# What the hub's own downloads allow (HF_HUB_ETAG_TIMEOUT); without one a silent firewall hangs us.
_ANSWER_SECONDS = 10.0


class HubError(ValueError):
    """The hub cannot give what was asked; the message names it and the remedy."""


def is_hub_place(place: str) -> bool:
    """Whether `place` is a pinned place on the hub."""
    return place.startswith(_PREFIX)


def pin(repo_id: str, revision: str | None, kind: str, key: str) -> str:
    """The place `hub://<repo_id>@<commit>` that a revision (default: main) means now.

    Without network the commit last downloaded to this machine is used.

    Args:
        kind: "model" or "dataset".
        key: the recipe key to name in an error.

    Raises:
        HubError: when neither the hub nor the local cache knows it.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().repo_info(
            repo_id, revision=revision, repo_type=kind, timeout=_ANSWER_SECONDS
        )
        return f"{_PREFIX}{repo_id}@{info.sha}"
    # No connection is an error of whichever HTTP library this version of the hub's client uses.
    except Exception as error:
        commit = _cached_commit(repo_id, revision, kind)
        if commit is not None:
            return f"{_PREFIX}{repo_id}@{commit}"
        raise HubError(
            f"{key}: {repo_id!r} is neither a path that exists here nor a {kind} that the "
            f"Hugging Face hub gives ({_first_line(error)}). Check the spelling, the network, "
            "HF_HUB_OFFLINE and, for a private one, your login (`hf auth login`)"
        ) from error


def split_place(place: str) -> tuple[str, str]:
    """(repository id, commit) of a pinned place."""
    assert is_hub_place(place), place
    repo_id, _, commit = place.removeprefix(_PREFIX).rpartition("@")
    return repo_id, commit


def local_directory(place: str, kind: str = "model", patterns: Sequence[str] | None = None) -> Path:
    """A local directory with the files of a place: the path itself, or a download of the commit
    or of what an fsspec URL names.

    Raises:
        HubError: when the download fails.
        StoreError: the same, for a URL.
    """
    if not is_hub_place(place):
        return model_copies.local_copy(place, patterns) if is_url(place) else Path(place)
    from huggingface_hub import snapshot_download

    repo_id, commit = split_place(place)
    try:
        allowed = list(patterns) if patterns else None
        return Path(
            snapshot_download(repo_id, revision=commit, repo_type=kind, allow_patterns=allowed)
        )
    except Exception as error:
        raise HubError(f"{repo_id} at {commit}: {_first_line(error)}") from error


def _cached_commit(repo_id: str, revision: str | None, kind: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = f"{kind}s--" + repo_id.replace("/", "--")
    reference = Path(HF_HUB_CACHE) / folder / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
