"""LoRA adapters: the small matrices trained in place of the full weights."""

from __future__ import annotations

from typing import Literal

from regrow.configs.sections.section import Count, Fraction, Positive, Section, Texts


class AdapterSection(Section):
    """Which adapter is trained; none means all weights are."""

    adapter: Literal["lora", "qlora"] | None = None
    """`lora`: train an adapter on the model in `bf16`; `qlora`: on a 4-bit model (not yet).
    Default: none, all weights are trained."""

    lora_r: Count | None = None
    """Rank of the adapter matrices. No default: it sets the adapter's size. 8 to 64 are usual."""

    lora_alpha: Positive | None = None
    """The adapter's output is scaled by lora_alpha / lora_r. No default. 1 to 2 times `lora_r` is
    usual."""

    lora_dropout: Fraction = 0.0
    """Share of the adapter's inputs set to zero while training. Default 0, Axolotl's."""

    lora_target_modules: Texts = ()
    """Names of the linear layers that get an adapter, such as q_proj; or one regular expression for
    full module names. No default: see `lora_target_linear`."""

    lora_target_linear: bool = False
    """Give every linear layer but the output head an adapter. Default false, Axolotl's."""

    lora_modules_to_save: Texts = ()
    """Modules trained in full beside the adapter, such as embed_tokens. Default: none."""

    lora_model_dir: str | None = None
    """Directory of an adapter to go on training (not yet)."""

    peft_use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA). Default false, PEFT's."""

    peft_use_dora: bool = False
    """Train direction and magnitude apart (DoRA). Default false, PEFT's."""

    peft_init_lora_weights: bool | str = True
    """First values of the adapter: true (no change of the model at the start), false (random; for
    tests), gaussian or orthogonal. Default true, PEFT's."""
