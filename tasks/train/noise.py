"""NEFTune: uniform noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914).

Transformers has it too, but scales by the length of the whole row; a packed row is many examples,
and the noise of each must follow its own length, or it would shrink with packing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regrow.tasks.modeling.context_slices import TOKEN_LENGTHS


class EmbeddingNoise:
    """Adds uniform(-1, 1) * alpha / sqrt(length * width) to each token's embedding in training."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._cu_seqlens: Tensor | None = None
        self._lengths: Tensor | None = None

    def attach(self, model: Any) -> None:
        """Hook the noise into the model's input embedding, for good.

        `model` is the outermost one that is called: PEFT goes past the hooks of the one inside.
        """
        model.register_forward_pre_hook(self._remember, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._add)

    def _remember(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._cu_seqlens = kwargs["cu_seq_lens_q"]
        self._lengths = kwargs.get(TOKEN_LENGTHS)  # where examples are cut, cu_seqlens has parts

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        assert self._cu_seqlens is not None
        scale = self._alpha / (self._length_of_each(output) * output.shape[-1]).sqrt()
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * scale[..., None].to(output.dtype)

    def _length_of_each(self, output: Tensor) -> Tensor:
        """[1, T]: the length of each token's example; [examples, 1] where they stand side by
        side."""
        if self._lengths is not None:
            return self._lengths[None]
        assert self._cu_seqlens is not None
        lengths = self._cu_seqlens.diff()
        examples, tokens = output.shape[:2]
        if examples == len(lengths) > 1:
            return lengths[:, None]
        return torch.repeat_interleave(lengths, lengths, output_size=tokens)[None]
