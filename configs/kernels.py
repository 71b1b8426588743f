"""Axolotl's words for kernels, and `kernels: off` as YAML reads it, in the words of `kernels`."""

from __future__ import annotations

from typing import Any, Literal, get_args

from regrow.configs.draft import Draft
from regrow.configs.faults import Notice

KernelName = Literal["attention", "mlp", "experts", "rms_norm", "cross_entropy"]
"""The names in `regrow.tasks.modeling.kernels`."""

# Axolotl's and its plugins' keys, by the kernel of ours that does the same.
_WORDS: dict[str, tuple[str, ...]] = {
    "attention": ("lora_qkv_kernel", "lora_o_kernel", "liger_rope", "unsloth_lora_qkv",
                  "unsloth_lora_o", "unsloth_rope", "flash_attn_fuse_qkv"),
    "mlp": ("lora_mlp_kernel", "liger_swiglu", "liger_glu_activation", "unsloth_lora_mlp",
            "flash_attn_fuse_mlp"),
    "rms_norm": ("liger_rms_norm", "unsloth_rms_norm", "flash_attn_rms_norm"),
    "cross_entropy": ("liger_fused_linear_cross_entropy", "liger_cross_entropy",
                      "cut_cross_entropy", "chunked_cross_entropy", "unsloth_cross_entropy_loss",
                      "flash_attn_cross_entropy"),
}  # fmt: skip


def read_kernels(draft: Draft) -> None:
    """Bring what a recipe says of kernels to the field `kernels`.

    A key of Axolotl's that is true asks for what `auto` does anyway. A kernel is left out when
    keys name it and all of them are false.
    """
    if isinstance(draft.data.get("kernels"), bool):  # YAML reads `off` and `on` so
        draft.data["kernels"] = "auto" if draft.data["kernels"] else "off"
    if draft.data.get("kernels") == ["auto"]:
        draft.data["kernels"] = "auto"
    given = {key: draft.data.pop(key) for key in all_words() if key in draft.data}
    for key, value in given.items():
        if not isinstance(value, bool):
            draft.fault((key,), "expected true or false", "Use `kernels`", value)
    if "kernels" in draft.data:
        for key in given:
            draft.ignore(key, "`kernels` says which kernels run")
        return
    left_out = [name for name, words in _WORDS.items() if _is_off(words, given)]
    chosen: Any = [name for name in get_args(KernelName) if name not in left_out]
    if left_out:
        draft.data["kernels"] = ["auto", *chosen]
    for name, words in _WORDS.items():
        why = f"its `{name}` does the same{', and is left out' if name in left_out else ''}"
        draft.notices += [Notice("renamed", (w,), why, "kernels") for w in words if w in given]


def all_words() -> list[str]:
    """Axolotl's keys for kernels."""
    return [word for words in _WORDS.values() for word in words]


def _is_off(words: tuple[str, ...], given: dict[str, Any]) -> bool:
    values = [given[word] for word in words if word in given]
    return bool(values) and not any(values)
