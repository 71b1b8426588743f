"""Chat templates by name, and what a recipe's `chat_template` means. Light: text only, no Jinja.

The texts (`chat_templates/*.jinja`) follow the published prompt formats of the model families; they
are this project's own.
"""

from __future__ import annotations

from pathlib import Path

from regrow.tasks.stage import StageError

_FOLDER = Path(__file__).parent / "chat_templates"

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.jinja"))
}
"""Name -> Jinja text."""

# Axolotl's names for templates with long texts of the model's maker in them (a system prompt,
# descriptions of tools): the model's own is used, which has them. Where a tokenizer has lost it,
# the bundled template of the same family stands in.
OF_MODELS = {
    "command_a": None,
    "command_a_rag": None,
    "command_a_tool_use": None,
    "exaone4": None,
    "gemma4": None,
    "gemma4_unified": None,
    "jamba": None,
    "llama3_2_vision": "llama3",
    "llama4": None,
    "llava": None,
    "phi_4": None,
    "pixtral": None,
    "qwen2_vl": "chatml",
    "qwen3_5": "qwen3",
}

OWN = "tokenizer_default"
_FALLBACK = "tokenizer_default_fallback_"


def template_text(name: str | None, jinja: str | None, key: str = "chat_template") -> str | None:
    """The Jinja text that a recipe asks for; None means the tokenizer's own template.

    Args:
        name: the recipe's `chat_template`.
        jinja: the recipe's `chat_template_jinja`: text, or a path to a file of it.

    Raises:
        StageError: for a name that is not known or a file that is not there.
    """
    if jinja and name in (None, "jinja"):
        return _jinja_text(jinja, key)
    if name == "jinja":
        raise StageError(f"{key}: jinja needs the template itself: set `{key}_jinja`")
    if name is None or name == OWN or name in OF_MODELS or name.startswith(_FALLBACK):
        return None
    return _named(name, key)


def fallback_text(name: str | None, key: str = "chat_template") -> str | None:
    """The template for a tokenizer that has none of its own, if the recipe's name means one."""
    if name is None or not name.startswith(_FALLBACK):
        family = OF_MODELS.get(name or "")
        return TEMPLATES[family] if family else None
    return _named(name.removeprefix(_FALLBACK), key)


def _named(name: str, key: str) -> str:
    if name not in TEMPLATES:
        raise StageError(
            f"{key}: there is no template named {name!r}, but {', '.join(sorted(TEMPLATES))}. "
            f"For the one that comes with the model set `{key}: {OWN}`; for any other give its "
            f"text with `{key}_jinja`"
        )
    return TEMPLATES[name]


def _jinja_text(jinja: str, key: str) -> str:
    if "{" in jinja:
        return jinja
    path = Path(jinja).expanduser()
    if not path.is_file():
        raise StageError(f"{key}_jinja: {jinja!r} is neither Jinja text nor a file")
    return path.read_text(encoding="utf-8")
