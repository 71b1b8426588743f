"""Chat templates by name, and what a recipe's `chat_template` means. Light: text only, no Jinja.

The texts follow the published prompt formats of the model families; they are this project's own.
"""

from __future__ import annotations

from pathlib import Path

from regrow.tasks.stage import StageError

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# Gemma and Mistral know no system role: its text goes in front of the first user message.
_SYSTEM_TO_USER = """\
{%- set first = namespace(text='') -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set first.text = messages[0]['content'] | trim + '\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set turns = messages -%}
{%- endif -%}
"""

_GEMMA = (
    "{{- bos_token -}}\n"
    + _SYSTEM_TO_USER
    + """\
{%- for message in turns -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' }}
{{- first.text + message['content'] | trim + '<end_of_turn>\\n' }}
{%- set first.text = '' -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
)

_MISTRAL = (
    "{{- bos_token -}}\n"
    + _SYSTEM_TO_USER
    + """\
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{ '[INST] ' + first.text + message['content'] + ' [/INST]' }}
{%- set first.text = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- else -%}
{{ raise_exception('after the first message only user and assistant roles are known') }}
{%- endif -%}
{%- endfor -%}
"""
)

_PHI_3 = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>\\n' }}
{%- endif -%}
"""

_ALPACA = """\
{{- bos_token if bos_token is defined -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- else -%}
{{ message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "phi_3": _PHI_3,
}
"""Name -> Jinja text."""

# Axolotl's names for templates that come with the models they belong to: the model's own is used.
# Where a tokenizer has lost it, the bundled template of the same family stands in.
_OF_MODELS = {
    "cohere": None,
    "command_a": None,
    "deepseek_v2": None,
    "deepseek_v3": None,
    "exaone": None,
    "exaone4": None,
    "falcon_h1": "chatml",
    "gemma3": "gemma",
    "gemma3n": "gemma",
    "gemma4": None,
    "gemma4_unified": None,
    "jamba": None,
    "llama3_2_vision": "llama3",
    "llama4": None,
    "mistral_v2v3": "mistral",
    "mistral_v3_tekken": "mistral",
    "mistral_v7_tekken": None,
    "phi_35": "phi_3",
    "phi_4": None,
    "qwen2_vl": "chatml",
    "qwen3": "chatml",
    "qwen3_5": "chatml",
    "qwen_25": "chatml",
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
    if name is None or name == OWN or name in _OF_MODELS or name.startswith(_FALLBACK):
        return None
    return _named(name, key)


def fallback_text(name: str | None, key: str = "chat_template") -> str | None:
    """The template for a tokenizer that has none of its own, if the recipe's name means one."""
    if name is None or not name.startswith(_FALLBACK):
        family = _OF_MODELS.get(name or "")
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
