"""What a base model and its tokenizer are: a digest of their files, or a commit on the hub.

Each key holds only what its stage reads: `prepare` the tokenizer's files, `train` and `merge` the
weights and their configuration. Must not import torch: a plan is made with this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from regrow.infra import hub
from regrow.infra.digests import DigestMemo
from regrow.infra.model_copies import files_at, memo_of_copies
from regrow.infra.store import is_url
from regrow.tasks.stage import StageError, fingerprint

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json")
_MODEL_FILES = ("*.safetensors", "*.json", "*.py", "*.model")  # no pickles, no second formats


def locate(base: str, revision: str | None, key: str = "base_model") -> str:
    """Where a model or tokenizer is: an absolute local directory, a URL, or a pinned hub place.

    Raises:
        StageError: for a local path that is not a directory.
        HubError: when it is neither local nor known to the hub.
        StoreError: for a URL of a store that refuses or does not answer.
    """
    if is_url(base):
        return _at_url(base.rstrip("/"), key)
    path = Path(base).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if path.exists():
        raise StageError(f"{key}: {base} is a file; give the directory of a model")
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise StageError(
            f"{key}: there is no directory {path.absolute()}. Give the directory of a model in "
            "safetensors form, or the name of one on the Hugging Face hub (owner/name)"
        )
    return hub.pin(base, revision, "model", key)


def _at_url(url: str, key: str) -> str:
    if not files_at(url):
        raise StageError(
            f"{key}: there are no files directly below {url}; give the URL of a model's directory, "
            "and check the credentials that lead there"
        )
    return url


def tokenizer_digest(place: str, memo: DigestMemo) -> str:
    """Identity of the tokenizer at a place. Raises StageError when there is none."""
    if hub.is_hub_place(place):
        return place
    there = set(_names(place))
    files = [name for name in _TOKENIZER_FILES if name in there]
    if not files:
        raise StageError(
            f"{place} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES[:5])}); copy one "
            "there or name another directory with `tokenizer_config`"
        )
    return _digest_of(place, files, memo)


def weights_digest(place: str, memo: DigestMemo) -> str:
    """Identity of weights and configuration at a place. Raises StageError without them."""
    if hub.is_hub_place(place):
        return place
    names = {n for n in _names(place) if any(fnmatch(n, each) for each in _WEIGHT_PATTERNS)}
    if "config.json" not in names:
        raise StageError(f"base_model: {place} holds no config.json, so it is not a model")
    if names == {"config.json"}:
        raise StageError(
            f"base_model: {place} holds no .safetensors file; other weight formats are not read. "
            "Convert it once with Transformers: from_pretrained(...).save_pretrained(...)"
        )
    return _digest_of(place, names, memo)


def adapter_digest(place: str, memo: DigestMemo) -> str:
    """Identity of the adapter at a place. Raises StageError when there is none."""
    if hub.is_hub_place(place):
        return place
    files = ("adapter_config.json", "adapter_model.safetensors")
    there = set(_names(place))
    missing = [name for name in files if name not in there]
    if missing:
        raise StageError(
            f"lora_model_dir: {place} holds no {' and no '.join(missing)}; give the directory of "
            "an adapter as PEFT stores it"
        )
    return _digest_of(place, files, memo)


def weights_at(place: str, digest: str | None) -> Path:
    """A local directory with the model at a place; of a URL, only when it is that of the digest.

    Raises:
        StageError: when what the URL holds is not what the digest was made of.
        HubError, StoreError: when a download fails.
    """
    directory = hub.local_directory(place, "model", _MODEL_FILES)
    _check_copy(place, directory, digest, weights_digest)
    return directory


def adapter_at(place: str, digest: str | None) -> Path:
    """The same for an adapter."""
    directory = hub.local_directory(place, "model", ("adapter_*",))
    _check_copy(place, directory, digest, adapter_digest)
    return directory


def tokenizer_at(place: str, digest: str, patterns: Sequence[str]) -> str:
    """The same for a tokenizer; a place that is no URL is given back as it is."""
    if not is_url(place) or hub.is_hub_place(place):
        return place
    directory = hub.local_directory(place, "model", patterns)
    _check_copy(place, directory, digest, tokenizer_digest)
    return str(directory)


def _check_copy(
    place: str, directory: Path, digest: str | None, digest_of: Callable[[str, DigestMemo], str]
) -> None:
    """Compare a downloaded copy with the digest that entered the key."""
    if not is_url(place) or hub.is_hub_place(place):
        return  # a hub's place holds its commit; a local one was read by the plan of this run
    found = digest_of(str(directory), memo_of_copies())
    if found != digest:
        raise StageError(
            f"{place} has changed since the plan was made (its digest is now {found[:12]}..., "
            f"planned was {str(digest)[:12]}...). Run again to plan with what it is now"
        )


def _names(place: str) -> list[str]:
    """Names of the files directly in a directory or below a URL."""
    if is_url(place):
        return files_at(place)
    return [path.name for path in Path(place).iterdir() if path.is_file()]


def _digest_of(place: str, names: Iterable[str], memo: DigestMemo) -> str:
    return fingerprint({name: memo.sha256(f"{place}/{name}") for name in sorted(names)})
