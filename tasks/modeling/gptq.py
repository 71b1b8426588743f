"""Weights that are stored as GPTQ, in plain numbers.

Of a linear layer there are whole numbers of a few bits, packed into int32, the group of each input,
and a scale and a zero point for each group and output (arXiv 2210.17323; the files are AutoGPTQ's).
Up to its float16 what gptqmodel 7.7.0 makes of them, which asks for PyTorch 2.14, and over whose
layers PEFT 0.21 trains an adapter but does not merge it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from regrow.tasks.stage import StageError

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 4, 8)  # others do not fill an int32
_SHIFTED = {"gptq": 1, "gptq_v2": 0}
"""Format of the files -> what was taken from each zero point before it was stored."""


def plain_weights(directory: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """{name: weights} of a model directory, those of quantized layers in float32.

    Args:
        settings: `quantization_config` of its config.json.

    Raises:
        StageError: for a kind of GPTQ that is not read.
    """
    bits, shift = _checked(directory, settings)
    with ExitStack() as stack:
        paths = sorted(directory.glob("*.safetensors"))
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        layers = sorted(n.removesuffix(".qweight") for n in places if n.endswith(".qweight"))
        found = {}
        for layer in layers:
            names = [f"{layer}.{part}" for part in _PARTS]
            if missing := [name for name in names if name not in places]:
                raise StageError(
                    f"base_model: {directory} is stored as GPTQ and has no {missing[0]}; use the "
                    "unquantized model"
                )
            parts = [places.pop(name).get_tensor(name) for name in names]
            found[f"{layer}.weight"] = dequantized(*parts, bits=bits, shift=shift)
        return found | {name: file.get_tensor(name) for name, file in places.items()}


def _checked(directory: Path, settings: Mapping[str, Any]) -> tuple[int, int]:
    bits = settings.get("bits")
    form = settings.get("checkpoint_format") or "gptq"
    if bits in _BITS and form in _SHIFTED and not settings.get("dynamic"):
        return bits, _SHIFTED[form]
    raise StageError(
        f"base_model: the weights in {directory} are stored as GPTQ in a way that is not read "
        f"(bits {bits}, checkpoint_format {form}, dynamic {settings.get('dynamic')}); those in 2, "
        "4 or 8 bits all over, of the format gptq or gptq_v2, are. Use the unquantized model"
    )


def dequantized(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, shift: int
) -> Tensor:
    """A layer's weights [O, I] in float32.

    Args:
        qweight: [I * bits / 32, O]. qzeros: [G, O * bits / 32]. scales: [G, O]. g_idx: [I].
        shift: what was taken from the zero points.
    """
    zeros = (_unpacked(qzeros, bits, 1) + shift) & (2**bits - 1)
    group = g_idx.long()
    return ((_unpacked(qweight, bits, 0) - zeros[group]) * scales.float()[group]).t().contiguous()


def _unpacked(packed: Tensor, bits: int, axis: int) -> Tensor:
    """The numbers along an axis, the lowest bits of each int32 first."""
    shape = [1] * (packed.dim() + 1)
    shape[axis + 1] = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(shape)
    return ((packed.unsqueeze(axis + 1) >> shifts) & (2**bits - 1)).flatten(axis, axis + 1)
