"""The tokenizer as a recipe wants it, saved into the artifact; and a light reader of it.

Saving needs Transformers; reading needs only `tokenizers`, so a worker process starts in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from regrow.infra import hub
from regrow.tasks.stage import StageError

TOKENIZER_FILES = (
    "tokenizer*",
    "*token*.json",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "config.json",
)
# Where the tokenizer was loaded from is no part of what it is.
_PLACE_KEYS = ("is_local", "local_files_only", "name_or_path")


@dataclass(frozen=True)
class SavedTokenizer:
    """What a worker needs to know of a saved tokenizer."""

    path: str
    """Its `tokenizer.json`."""
    eos_token: str
    eos_id: int
    special: tuple[tuple[str, str], ...]
    """(role, text) of the named special tokens, as chat templates get them."""
    special_texts: tuple[str, ...]
    """Text of every token that is marked special."""
    chat_template: str | None
    tekken: str | None = None
    """mistral-common's own file, where that writes the conversations."""


def save_tokenizer(
    place: str,
    out: Path,
    *,
    special_tokens: Mapping[str, Any],
    tokens: tuple[str, ...],
    chat_template: str | None,
    fallback_template: str | None,
    trust_remote_code: bool,
) -> SavedTokenizer:
    """Load the tokenizer at `place`, change it as the recipe says and save it into `out`.

    Raises:
        StageError: when it cannot be loaded, is not a fast tokenizer or has no eos token.
    """
    from transformers import AutoTokenizer

    patterns = (*TOKENIZER_FILES, "*.py") if trust_remote_code else TOKENIZER_FILES
    directory = hub.local_directory(place, "model", patterns)
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StageError(f"tokenizer at {place}: it cannot be loaded ({error})") from error
    if special_tokens:
        loaded.add_special_tokens(
            {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in special_tokens.items()}
        )
    loaded.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    if loaded.pad_token is None and loaded.eos_token is not None:
        loaded.pad_token = loaded.eos_token  # masks never go by it, and batches of prompts need one
    loaded.chat_template = chat_template or loaded.chat_template or fallback_template
    loaded.save_pretrained(str(out))
    forget_place(out / "tokenizer_config.json")
    if loaded.eos_token is None:
        raise StageError("the tokenizer has no eos token; set `special_tokens: {eos_token: ...}`")
    if not (out / "tokenizer.json").is_file():
        raise StageError(
            f"tokenizer at {place}: it has no tokenizer.json and cannot be made into one, so "
            "characters cannot be traced to tokens; name another with `tokenizer_config`"
        )
    return describe(loaded, out)


def describe(loaded: Any, out: Path) -> SavedTokenizer:
    """What workers need to know of a tokenizer that is saved in `out`."""
    template = loaded.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    special = {k: str(v) for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
    added = loaded.added_tokens_decoder.values()
    return SavedTokenizer(
        path=str(out / "tokenizer.json"),
        eos_token=str(loaded.eos_token),
        eos_id=int(loaded.eos_token_id),
        special=tuple(sorted(special.items())),
        special_texts=tuple(sorted({token.content for token in added if token.special})),
        chat_template=template,
    )


def forget_place(path: Path) -> None:
    """Take out of a saved configuration what says where it came from."""
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in _PLACE_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def load_backend(path: str | Path) -> Tokenizer:
    """A saved `tokenizer.json`, set to report the exact characters of every token.

    Byte-level tokenizers may leave white space out of a token's offsets (`trim_offsets`); which
    token a space belongs to would then be unknown. Nor may it cut or pad.
    """
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    data["truncation"] = data["padding"] = None
    return Tokenizer.from_str(json.dumps(_untrimmed(data), ensure_ascii=False))


def _untrimmed(value: Any) -> Any:
    if isinstance(value, dict):
        parts = ("pre_tokenizer", "post_processor", "processors", "pretokenizers", "decoder")
        inner = {k: _untrimmed(v) if k in parts else v for k, v in value.items()}
        return {**inner, "trim_offsets": False} if "trim_offsets" in inner else inner
    return [_untrimmed(item) for item in value] if isinstance(value, list) else value
