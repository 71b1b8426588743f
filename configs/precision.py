"""Axolotl's words for number formats, old and new, in the words of `bf16`."""

from __future__ import annotations

from regrow.configs.draft import Draft
from regrow.configs.faults import Notice

_ON: tuple[object, ...] = (True, "full")


def read_precision(draft: Draft) -> None:
    """`bfloat16`, `float32`, `fp16` and `float16` are values of `bf16` here."""
    full = draft.data.get("float32") is True
    _same_word(draft, "bfloat16", True, ())
    _same_word(draft, "float32", False, _ON)
    _half(draft, full)


def _same_word(draft: Draft, name: str, meaning: bool, contrary: tuple[object, ...]) -> None:
    given = draft.data.pop(name, False)
    if given is True and draft.data.get("bf16") in contrary:
        draft.fault((name,), "`bf16` says otherwise", "Keep one of the two", given)
    elif given is True:
        why = f"it means `bf16: {str(meaning).lower()}`"
        draft.notices.append(Notice("renamed", (name,), why, "bf16"))
        draft.data["bf16"] = meaning
    elif given is not False:
        draft.fault((name,), "expected true or false", "Use `bf16`", given)


def _half(draft: Draft, full: bool) -> None:
    """float16 is bfloat16 here: as many bits, no loss scaling, and every run resumes exactly."""
    for name in ("fp16", "float16"):
        given = draft.data.pop(name, False)
        if given is True and full:
            draft.fault((name,), "`float32` says otherwise", "Keep one of the two", given)
        elif given is True and draft.data.get("bf16") not in _ON:
            why = (
                f"`{name}: true` asks for 16 bits, and those of float16 need loss scaling, which "
                "is not here; bfloat16 takes the same memory"
            )
            draft.set(("bf16",), True, why)
        elif given is True:
            draft.ignore(name, "`bf16` comes first, as in Axolotl")
        elif given is not False:
            draft.fault((name,), "expected true or false", "Use `bf16: true`", given)
