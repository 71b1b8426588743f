"""The base model, its tokenizer, and the implementation that runs it."""

from __future__ import annotations

from regrow.configs.sections.section import Section

PACKED_ATTENTION = "regrow_packed"


class SpecialTokens(Section):
    """Tokens that take a special role in the tokenizer."""

    bos_token: str | None = None
    """Put before a text. Default: the tokenizer's own."""
    eos_token: str | None = None
    """Ends an answer. Default: the tokenizer's own."""
    pad_token: str | None = None
    """Fills rows up; never trained on. Default: the tokenizer's own, else `eos_token`."""
    unk_token: str | None = None
    """Stands for what the vocabulary lacks. Default: the tokenizer's own."""
    additional_special_tokens: tuple[str, ...] = ()
    """Further tokens that are never split. Default: none."""


class ModelSection(Section):
    """Which model is fine-tuned."""

    base_model: str
    """Hub id (`org/name`) or directory of the model to fine-tune; its weights must be
    safetensors."""

    base_model_config: str | None = None
    """Hub id or directory of the model's `config.json`: `base_model` itself, or not given."""

    revision_of_model: str | None = None
    """Branch, tag or commit of `base_model` on the hub. Default: the newest commit, whose hash is
    recorded."""

    reinit_weights: bool = False
    """Train from random weights (of `seed`): of `base_model` only the architecture and the
    tokenizer count. Without `adapter`. Default false."""

    tokenizer_config: str | None = None
    """Hub id or directory of the tokenizer. Default: that of `base_model`."""

    tokenizer_use_mistral_common: bool = False
    """Write conversations with Mistral's own package, mistral-common, in place of a chat template;
    for models that come with a `tekken.json`. Default false."""

    model_type: str | None = None
    """Class of the model: AutoModelForCausalLM, or a `*ForCausalLM` or `*LMHeadModel`. Accepted
    without effect: the model's own `config.json` names its class."""

    tokenizer_type: str | None = None
    """Class of the tokenizer: AutoTokenizer, or a `*Tokenizer`. Accepted without effect: the
    tokenizer's files name its class."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Default false: such code can do anything on the
    machine."""

    special_tokens: SpecialTokens = SpecialTokens()
    """Tokens to put in place of the tokenizer's own `bos_token`, `eos_token`, `pad_token`,
    `unk_token`, and `additional_special_tokens`."""

    tokens: tuple[str, ...] = ()
    """New tokens for the vocabulary; the embedding grows with them. Default: none."""

    attn_implementation: str | None = None
    """Attention kernel. Whatever Axolotl name is given, Regrow's packed attention runs
    (`regrow_packed`), which keeps attention inside each example on every device."""
