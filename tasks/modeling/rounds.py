"""What earlier rounds of a ReLoRA training have learnt: a frozen adapter beside the trained one.

ReLoRA (Lialin et al. 2023, arXiv 2307.05695) adds an adapter's product to the base weights and
starts it afresh, so that many updates of a low rank sum up to one of a high rank. Here the base is
left as it is: each finished round is appended to a frozen adapter `[B1 B2 ...] [A1; A2; ...]`. That
is the same sum, on a quantized base too, and not rounded to the base's type at each restart. The
price is a product of a growing rank; what is gained besides is that the whole result is a plain
adapter of the base that everybody has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from regrow.tasks.stage import StageError

TRAINED, EARLIER = "default", "earlier"
"""Names of the two adapters."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""{layer: (A of shape (rank, in), B of shape (out, rank))}; the scale is in A."""


class Rounds:
    """The finished rounds of a model's adapter."""

    def __init__(self, model: PeftModel, dtype: torch.dtype) -> None:
        """`dtype`: in which the frozen adapter computes; what is stored stays float32.

        Raises:
            StageError: for an adapter on something else than linear layers.
        """
        self._model, self._dtype = model, dtype
        self._factors: Factors = {}
        for name, layer in _adapted(model):
            if TRAINED not in layer.lora_A or layer.lora_A[TRAINED].weight.dim() != 2:
                raise StageError(f"relora: {name} is no linear layer; take it out of the targets")

    def finish(self) -> None:
        """Append the trained adapter to the frozen one; its own values stay as they are."""
        for name, layer in _adapted(self._model):
            a = layer.lora_A[TRAINED].weight.detach().float() * layer.scaling[TRAINED]
            b = layer.lora_B[TRAINED].weight.detach().float().clone()  # the live one trains on
            if name in self._factors:
                earlier_a, earlier_b = self._factors[name]
                a, b = torch.cat([earlier_a.to(a), a]), torch.cat([earlier_b.to(b), b], dim=1)
            # The long-lived ones stay off the GPU, where the frozen adapter holds them already.
            self._factors[name] = a.cpu(), b.cpu().contiguous()

    def restart(self, seed: int) -> None:
        """Put the finished rounds under the trained adapter, which starts afresh.

        Args:
            seed: of the new first values; the same on every rank.
        """
        self._freeze_into_model(self._dtype)
        generator = torch.Generator().manual_seed(seed)
        for _, layer in _adapted(self._model):
            fresh = torch.empty_like(layer.lora_A[TRAINED].weight, device="cpu")
            # As PEFT's own first values.
            torch.nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            layer.lora_A[TRAINED].weight.data.copy_(fresh)
            layer.lora_B[TRAINED].weight.data.zero_()

    def write(self, path: Path) -> None:
        """All finished rounds in one safetensors file."""
        halves = {f"{name}.A": a for name, (a, _) in self._factors.items()}
        save_file(halves | {f"{name}.B": b for name, (_, b) in self._factors.items()}, path)

    def read(self, path: Path) -> None:
        """Put the rounds of a file under the trained adapter."""
        self._factors = {}
        with safe_open(path, "pt") as file:
            for name in sorted({key[:-2] for key in file.keys()}):  # noqa: SIM118 (no iterator)
                self._factors[name] = file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B")
        self._freeze_into_model(self._dtype)

    def save_adapter(self, out: Path) -> None:
        """The finished rounds as an adapter that PEFT loads; call `finish` before."""
        self._freeze_into_model(torch.float32)
        self._model.save_pretrained(
            str(out), selected_adapters=[EARLIER], save_embedding_layers=False
        )
        for file in (out / EARLIER).iterdir():
            file.rename(out / file.name)
        (out / EARLIER).rmdir()

    def _freeze_into_model(self, dtype: torch.dtype) -> None:
        """Make the frozen adapter anew from all finished rounds, and let both compute."""
        model: Any = self._model
        if EARLIER in model.peft_config:
            model.delete_adapter(EARLIER)
        if not self._factors:
            return
        with torch.random.fork_rng():  # PEFT draws first values, which are overwritten
            model.add_adapter(EARLIER, self._config())
        for name, layer in _adapted(model):
            a, b = self._factors[name]
            for half, value in ((layer.lora_A, a), (layer.lora_B, b)):
                weight = half[EARLIER].weight
                weight.data = value.to(weight.device, dtype)
        model.base_model.set_adapter([TRAINED, EARLIER])
        for name, parameter in model.named_parameters():
            if f".{EARLIER}." in name:
                parameter.requires_grad_(False)

    def _config(self) -> Any:
        """Of the frozen adapter: no dropout, a scale of 1, on the same layers."""
        ranks = {re.escape(name): len(a) for name, (a, _) in self._factors.items()}
        most = max(ranks.values())
        return dataclasses.replace(
            self._model.peft_config[TRAINED],
            r=most,
            lora_alpha=most,
            rank_pattern={name: rank for name, rank in ranks.items() if rank != most},
            alpha_pattern={name: rank for name, rank in ranks.items() if rank != most},
            lora_dropout=0.0,
            inference_mode=False,
        )


def _adapted(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter, by their names in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
