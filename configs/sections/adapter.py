"""LoRA adapters: the small matrices trained in place of the full weights."""

from __future__ import annotations

from typing import Literal

from regrow.configs.sections.section import Count, Fraction, Positive, Section, Texts, Whole


class LoftqConfig(Section):
    """How LoftQ quantizes the base to find its first values."""

    loftq_bits: Literal[4, 8] = 4
    """Bits of the quantized base. Default 4, PEFT's."""
    loftq_iter: Count = 1
    """Alternations between quantizing and decomposing. Default 1, PEFT's."""


class PeftSection(Section):
    """Settings of PEFT that have no key of their own."""

    loftq_config: LoftqConfig | None = None
    """First values by LoftQ: the same as `peft_init_lora_weights: loftq`. Needs CUDA."""


class AdapterSection(Section):
    """Which adapter is trained; none means all weights are."""

    adapter: Literal["lora", "qlora"] | None = None
    """`lora`: train an adapter on the model in `bf16` (or in 8 bits, with `load_in_8bit`); `qlora`:
    on the model in 4 bits. Default: none, all weights are trained."""

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

    lora_target_parameters: Texts = ()
    """Names of parameters that belong to no linear layer and get an adapter, such as
    mlp.experts.gate_up_proj of a mixture of experts. Default: none."""

    lora_exclude_modules: Texts = ()
    """Names of layers that get no adapter although they are targets; or one regular expression.
    Default: none."""

    lora_rank_pattern: dict[str, Count] = {}
    """Other ranks than `lora_r` for some layers: {name or regular expression: rank}. Default:
    none."""

    lora_alpha_pattern: dict[str, Positive] = {}
    """Other values of `lora_alpha` for some layers. Default: none."""

    peft_layers_to_transform: Whole | tuple[Whole, ...] | None = None
    """Numbers of the transformer layers that get an adapter. Default: all of them."""

    peft_layers_pattern: Texts = ()
    """Name of the list that `peft_layers_to_transform` counts in, where it is not one of the usual
    (layers, h, blocks, ...). Default: PEFT finds it."""

    peft_trainable_token_indices: tuple[Whole, ...] | dict[str, tuple[Whole, ...]] | None = None
    """Token ids whose embeddings are trained beside the adapter, and no others; or {layer: ids}.
    Default: none."""

    lora_model_dir: str | None = None
    """Directory of an adapter to go on training. Its own rank, scale and targets hold; the digest
    of its files is part of the training's identity. Default: none, a fresh adapter."""

    loraplus_lr_ratio: Positive | None = None
    """LoRA+: the matrices B learn this many times faster than `learning_rate`; 16 is usual.
    Default: none, all learn alike."""

    loraplus_lr_embedding: Positive = 1e-6
    """LoRA+: the learning rate of adapters on embeddings. Default 1e-6, Axolotl's and PEFT's."""

    peft_use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA). Default false, PEFT's."""

    peft_use_dora: bool = False
    """Train direction and magnitude apart (DoRA). Default false, PEFT's."""

    peft_init_lora_weights: bool | str = True
    """First values of the adapter: true (no change of the model at the start), false (random; for
    tests), gaussian, orthogonal; from the base's weights: pissa, pissa_niter_16 (faster), olora,
    loftq (needs CUDA); from the training data: eva. Default true, PEFT's."""

    peft: PeftSection = PeftSection()
    """Settings of PEFT: `loftq_config`."""
