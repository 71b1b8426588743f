"""The base as it was held in 4 or 8 bits during training: quantized and dequantized again."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from regrow.tasks.merge.base_model import Base
from regrow.tasks.merge.lazy import Read
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.modeling.quantized_experts import Codes, is_stack_of_experts


def dequantized(base: Base, quantization: Quantization) -> Read | None:
    """Reads the weights that the adapter was trained on; None when bitsandbytes is missing.

    Call it before the adapter is put on the base, which hides the layers' names.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    linear = {
        f"{name}.weight"
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and quantization.is_quantized(name)
    }

    stacks = {
        name
        for name, parameter in base.model.named_parameters()
        if quantization.experts and is_stack_of_experts(name, parameter.dim())
    }

    def read(name: str) -> Tensor:
        seen = stored = base.stored[name]
        if name in stacks:
            seen = Codes.of(stored, quantization.bits, quantization.settings).dense()
        elif name in linear:
            seen = _there_and_back(stored, quantization)
        return seen.to(torch.float32, copy=True)

    return read


def _there_and_back(weight: Tensor, quantization: Quantization) -> Tensor:
    from bitsandbytes import functional

    if quantization.bits == 8:
        numbers, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return functional.int8_vectorwise_dequant(numbers, scales)
    settings = quantization.settings
    packed, state = functional.quantize_4bit(
        weight,
        compress_statistics=bool(settings.get("bnb_4bit_use_double_quant", False)),
        quant_type=settings.get("bnb_4bit_quant_type", "fp4"),
    )
    return functional.dequantize_4bit(packed, state)
