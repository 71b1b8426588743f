"""Push a model to the Hugging Face hub, in one commit: all of it is there or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.tasks.publish.delivery import CARD
from regrow.tasks.stage import StageError


def push(repo_id: str, private: bool, files: Mapping[str, Path], card: str, api: Any = None) -> str:
    """Commit the files and the card; the commit's URL.

    The access token is the one of `hf auth login`, or of the environment, as the hub's own
    library finds it.

    Args:
        private: for a repository that does not exist yet.
        api: what speaks to the hub; default `huggingface_hub.HfApi()`.

    Raises:
        StageError: without network or permission; nothing has been changed on the hub then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message="Publish with Regrow")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(
            f"hub_model_id: cannot push to {repo_id} ({reason}). Log in with `hf auth login` as "
            "someone who may write there, check the network and HF_HUB_OFFLINE, or leave "
            "hub_model_id out and publish to output_dir"
        ) from error
    return str(commit.commit_url)
