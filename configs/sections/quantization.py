"""Quantized base models."""

from __future__ import annotations

from typing import Any, Literal

from regrow.configs.sections.section import Section


class QuantizationSection(Section):
    """In how many bits the frozen base model is held."""

    load_in_8bit: bool = False
    """Hold the base model in 8 bits (bitsandbytes LLM.int8), for `adapter: lora`. Default false."""

    load_in_4bit: bool = False
    """Hold the base model in 4 bits (bitsandbytes NF4 with double quantization), for
    `adapter: qlora`, which sets it. Default false."""

    quantize_moe_experts: bool = False
    """Hold a mixture's experts in those bits, too, where the model stacks them in one parameter
    (bitsandbytes by itself quantizes linear layers alone). `lora_target_parameters` adapts them.
    Default false, Axolotl's."""

    bnb_config_kwargs: dict[str, Any] = {}
    """Arguments of Transformers' BitsAndBytesConfig, such as bnb_4bit_quant_type. Default: nf4,
    double quantization, computing in `bf16`: QLoRA's (arXiv 2305.14314) and Axolotl's."""

    model_quantization_config: Literal["Mxfp4Config", "FineGrainedFP8Config"] | None = None
    """How a base model that is stored quantized is read; with `model_quantization_config_kwargs:
    {dequantize: true}`, the only one that can be trained and merged here, in `bf16`. Default: such
    a model is read so anyway."""

    model_quantization_config_kwargs: dict[str, Any] = {}
    """Arguments of that configuration: {dequantize: true}. Default: none."""
