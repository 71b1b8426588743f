"""A base in 4 bits whose layers are divided over processes (tensor parallelism).

Transformers 5.23 divides weights while it loads them, and bitsandbytes' layers take no divided
ones. Here each process quantizes its own part of a weight as soon as that part is read, and keeps
it as bitsandbytes does on one process; the sums and cuts around a layer stay Transformers'.

What the numbers are: bitsandbytes gives a scale to each 64 numbers along a weight's rows. Where the
rows that a process has are multiples of 64 long (a column-divided layer has whole rows, a
row-divided one `in_features / processes` of each), its blocks are blocks of the whole weight, with
the same codes and scales. Else blocks hold other neighbours, as good as the whole's. Double
quantization takes a weight's scales 256 at a time, less their mean, so that scales of a part are
rounded otherwise than those of the whole (in 8 bits: by up to a few thousandths).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from regrow.tasks.modeling.quantization import by_own_quantizer

_METHOD = "regrow_bitsandbytes_4_parts"
"""Our name among Transformers' quantization methods."""


def in_parts(config: Any) -> Any:
    """A `BitsAndBytesConfig` of 4 bits that lets Transformers divide the model, too."""
    return by_own_quantizer(config, _METHOD, _quantizer)


def _quantizer() -> type:
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name

    class Quantize(Bnb4bitQuantize):
        """bitsandbytes' own, of this process's part."""

        def convert(self, input_dict: Any, *args: Any, model: Any = None, **kwargs: Any) -> Any:
            for name in input_dict:
                layer, _ = get_module_from_name(model, name)
                if isinstance(layer.weight, DTensor):
                    _take_off_division(layer, self.hf_quantizer.quantization_config)
            return super().convert(input_dict, *args, model=model, **kwargs)

    class Quantizer(Bnb4BitHfQuantizer):
        def get_quantize_ops(self) -> Any:
            return Quantize(self)

    return Quantizer


def _take_off_division(layer: Any, config: Any) -> None:
    """The empty weight of a layer that is to hold a part of it as an undivided one, which the hooks
    around the layer are told by the mark that Transformers' own quantizers leave."""
    from bitsandbytes.nn import modules

    parameter: Any = modules.Params4bit
    layer.weight = parameter(
        torch.empty(0, device="meta"),
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        module=layer,
    )
    layer._hf_quantized_needs_local_tp = True


def is_part(layer: Any) -> bool:
    """Whether a layer holds a quantized part of its weight."""
    return getattr(layer, "_hf_quantized_needs_local_tp", False)


@torch.no_grad()
def divide_adapters(model: nn.Module) -> bool:
    """Divide adapters on layers of quantized parts, with the first values that PEFT drew.

    PEFT 0.21.2 reads the sizes of a whole adapter off the base's weight, which in 4 bits is a
    column of bytes. It has drawn it whole, then, and given it wrong sizes.

    Returns:
        Whether that was all adapters, which then are those of one process.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        held: Any = [*layer.lora_A.values(), *layer.lora_B.values()]
        for linear in held if is_part(layer.get_base_layer()) else ():
            weight = linear.weight
            if isinstance(weight, DTensor) and _sizes(linear) != weight.shape:
                drawn, mesh, ways = weight.to_local(), weight.device_mesh, weight.placements
                assert drawn.shape == _sizes(linear)
                part = distribute_tensor(drawn, mesh, ways, src_data_rank=None)
                linear.weight = nn.Parameter(part, requires_grad=weight.requires_grad)
    return all(
        not isinstance(getattr(layer.get_base_layer(), "weight", None), DTensor) for layer in layers
    )


def _sizes(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features
