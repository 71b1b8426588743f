"""Linear layers that multiply in 8-bit floats, by torchao: their weights stay as they are."""

from __future__ import annotations

import torch
from torch import nn

from regrow.tasks.modeling.quantization import require_package
from regrow.tasks.stage import StageError

_MULTIPLE = 16
"""cuBLAS multiplies 8-bit floats in sizes that are a multiple of it (torchao's documentation)."""
_CAPABILITY = (8, 9)
"""Of NVIDIA's first devices with 8-bit floats (Ada; Hopper is 9.0)."""


def multiply_in_float8(model: nn.Module, device: str) -> int:
    """Swap the linear layers inside the model; how many there are.

    Each product's three factors (inputs, weights, gradients) are rounded to 8 bits, with a scale
    for each tensor, found anew each time; sums, weights and the optimizer stay as they are. The
    output head and layers of odd sizes multiply as before. On a CPU the products are emulated.

    Raises:
        StageError: torchao is missing, the device has no 8-bit floats, or no layer can be swapped.
    """
    require_package("torchao", "torchao", "fp8")
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda and torch.cuda.get_device_capability() < _CAPABILITY:
        raise StageError(
            f"fp8: {torch.cuda.get_device_name()} does not multiply 8-bit floats (NVIDIA's Ada, "
            "Hopper and later do); set fp8: false"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def fits(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module is head:
            return False
        return not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)

    count = sum(fits(module, name) for name, module in model.named_modules())
    if not count:
        raise StageError("fp8: the model has no linear layers that it is for; set fp8: false")
    config = Float8LinearConfig(emulate=not on_cuda)
    convert_to_float8_training(model, module_filter_fn=fits, config=config)
    return count
