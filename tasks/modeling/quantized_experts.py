"""Stacks of experts in 4 or 8 bits: parameters [experts, ., .], dequantized where they work.

bitsandbytes and Transformers quantize linear layers alone, and a mixture's experts are stacked in
one parameter. Here such a parameter is a tensor of a type of its own, which any operation sees as
the weights in their compute type. (torch's parametrizations would do so too, but PEFT 0.21.2, which
adapts experts by one, does not take its own off again where there is another.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regrow.tasks.modeling.quantization import by_own_quantizer

aten = torch.ops.aten


@dataclass(frozen=True)
class Codes:
    """The numbers of one stack in bitsandbytes' formats."""

    data: Tensor
    """4 bits: uint8, two numbers in each; 8 bits: int8 [experts * rows, columns]."""
    scales: Any
    """4 bits: bitsandbytes' `QuantState`; 8 bits: float32, the largest number of each row."""
    bits: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    """Of the weights when dequantized."""

    @classmethod
    def of(cls, weights: Tensor, bits: int, settings: Mapping[str, Any]) -> Codes:
        """Quantize weights [experts, rows, columns]; `settings` as for linear layers."""
        from bitsandbytes import functional

        experts, rows, columns = weights.shape
        shape, weights = (experts, rows, columns), weights.contiguous()
        if bits == 8:
            half = weights.view(-1, columns).to(torch.float16)  # what int8 is made of there
            data, scales, _ = functional.int8_vectorwise_quant(half)
        else:
            data, scales = functional.quantize_4bit(
                weights,
                compress_statistics=bool(settings.get("bnb_4bit_use_double_quant", False)),
                quant_type=settings.get("bnb_4bit_quant_type", "fp4"),
            )
        return cls(data, scales, bits, shape, weights.dtype)

    def dense(self) -> Tensor:
        """All weights."""
        from bitsandbytes import functional

        if self.bits == 8:
            found = functional.int8_vectorwise_dequant(self.data, self.scales)
            return found.view(self.shape).to(self.dtype)
        return functional.dequantize_4bit(self.data, self.scales).view(self.shape)

    def expert(self, index: int) -> Tensor:
        """Those of one expert [rows, columns], without the others where that can be."""
        from bitsandbytes import functional

        index %= self.shape[0]
        _, rows, columns = self.shape
        if self.bits == 8:
            part = slice(index * rows, (index + 1) * rows)
            found = functional.int8_vectorwise_dequant(self.data[part], self.scales[part])
            return found.to(self.dtype)
        block = self.scales.blocksize
        if rows * columns % (2 * block):  # blocks go over the border between experts
            return self.dense()[index]
        numbers, blocks = rows * columns // 2, rows * columns // block
        absmax = _absmax(self.scales)[index * blocks : (index + 1) * blocks]
        state = functional.QuantState(
            absmax=absmax,
            shape=torch.Size((rows, columns)),
            dtype=self.dtype,
            blocksize=block,
            code=self.scales.code,
            quant_type=self.scales.quant_type,
        )
        packed = self.data.view(-1, 1)[index * numbers : (index + 1) * numbers]
        return functional.dequantize_4bit(packed, state).view(rows, columns)


def _absmax(state: Any) -> Tensor:
    """The largest number of each block, which double quantization holds in 8 bits."""
    from bitsandbytes import functional

    if not state.nested:
        return state.absmax
    return (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


class QuantizedStack(Tensor):
    """Frozen weights [experts, rows, columns] held as `Codes`.

    What is kept for the backward pass is this, too, and not the weights: they are dequantized there
    once more.
    """

    codes: Codes
    transposed: bool

    @staticmethod
    def __new__(cls, codes: Codes, transposed: bool = False) -> QuantizedStack:
        experts, rows, columns = codes.shape
        shape = (experts, columns, rows) if transposed else codes.shape
        self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=codes.dtype, device=codes.data.device
        )
        self.codes, self.transposed = codes, transposed
        return self

    def __init__(self, codes: Codes, transposed: bool = False) -> None:
        """All is done in `__new__`."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore
        return f"QuantizedStack({tuple(self.shape)}, {self.codes.bits} bits)"

    def dense(self) -> Tensor:
        """The weights, dequantized."""
        found = self.codes.dense()
        return found.transpose(1, 2) if self.transposed else found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What leaves the numbers alone stays quantized; any other operation gets the weights."""
        kwargs = kwargs or {}
        own = _OWN.get(func)
        found = own(*args, **kwargs) if own is not None else None
        if found is not None:
            return found
        args, kwargs = pytree.tree_map_only(QuantizedStack, QuantizedStack.dense, (args, kwargs))
        return func(*args, **kwargs)


def _same(stack: QuantizedStack, **kwargs: Any) -> QuantizedStack:
    return QuantizedStack(stack.codes, stack.transposed)


def _transpose(stack: QuantizedStack, first: int, second: int) -> QuantizedStack | None:
    if {first % 3, second % 3} != {1, 2}:
        return None
    return QuantizedStack(stack.codes, not stack.transposed)


def _select(stack: QuantizedStack, dim: int, index: int) -> Tensor | None:
    if dim % 3:
        return None
    found = stack.codes.expert(index)
    return found.t() if stack.transposed else found


def _set(stack: Any, source: Any) -> Any:
    """torch's parametrizations set a parameter to itself."""
    return stack if stack is source else None


def _copy(stack: QuantizedStack, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    to = stack.device if device is None else torch.device(device)
    elsewhere = to.index not in (None, stack.device.index) and to.type != "cpu"
    if to.type != stack.device.type or elsewhere:
        raise RuntimeError(f"{stack!r} stays on {stack.device}, where it was quantized")
    return _same(stack) if dtype in (None, stack.dtype) else None


_OWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.transpose.int: _transpose,
    aten.select.int: _select,
    aten.set_.source_Tensor: _set,
    aten._to_copy.default: _copy,
}


def is_stack_of_experts(name: str, dimensions: int) -> bool:
    """Whether a parameter of this name holds the weights of several experts."""
    return dimensions == 3 and "expert" in name.lower()


def quantized_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of those that hold experts in this form."""
    for name, module in model.named_modules():
        if any(isinstance(p, QuantizedStack) for p in module.parameters(recurse=False)):
            yield name, module


# ---- loading: what Transformers asks of a quantizer ----

_METHOD = "regrow_bitsandbytes"
"""Our name among Transformers' quantization methods; followed by the number of bits."""


def experts_too(config: Any) -> Any:
    """A `BitsAndBytesConfig` that makes Transformers quantize stacks of experts as they load, each
    before the next is read, besides what bitsandbytes quantizes.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    bits = 8 if config.load_in_8bit else 4
    return by_own_quantizer(config, f"{_METHOD}_{bits}", lambda: _quantizer(bits))


def _quantizer(bits: int) -> type:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    linear: Any = Bnb8BitHfQuantizer if bits == 8 else Bnb4BitHfQuantizer

    class Quantizer(linear):
        """bitsandbytes' for linear layers, ours for stacks of experts."""

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            if super().param_needs_quantization(model, param_name, **kwargs):
                return True
            found = model.get_parameter_or_buffer(param_name)
            return is_stack_of_experts(param_name, found.dim())

        def get_quantize_ops(self) -> Any:
            return _quantize_op(super().get_quantize_ops(), bits, self.quantization_config)

    return Quantizer


def _quantize_op(linear: Any, bits: int, config: Any) -> Any:
    from transformers.core_model_loading import ConversionOps

    settings = {name: getattr(config, name, None) for name in _OF_NF4}

    class Quantize(ConversionOps):
        def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, input_dict: dict[str, Any], **kwargs: Any
        ) -> dict[str, Any]:
            found = {}
            for name, value in input_dict.items():
                weights = value[0] if isinstance(value, list) else value
                if is_stack_of_experts(name, weights.dim()):
                    codes = Codes.of(weights, bits, settings)
                    stack = nn.Parameter(QuantizedStack(codes), requires_grad=False)
                    found[name] = stack
                else:
                    found |= linear.convert({name: value}, **kwargs)
            return found

    return Quantize()


_OF_NF4 = ("bnb_4bit_use_double_quant", "bnb_4bit_quant_type")
