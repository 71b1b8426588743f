"""Packed examples as rows of a padded batch, for models that packed attention is not enough for.

Linear attention, state spaces and convolutions carry what they have read from one example into the
next, and some attentions have terms that the packed kernels do not. Inside the model's decoder each
example has a row of its own here, filled up at its end, of which what is causal reads nothing.
Outside, all stays packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_OF_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class SideBySide:
    """Two hooks of a decoder: before it works, and after."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._places: Tensor | None = None

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """[1, T, ...] -> [examples, longest, ...] of everything that has T tokens."""
        ends = kwargs.get("cu_seq_lens_q")
        if ends is None:  # generation, which is no packed batch
            self._rows = None
            return args, kwargs
        lengths = ends.long().diff()
        self._rows = torch.repeat_interleave(lengths)
        tokens = len(self._rows)
        starts = ends[:-1].long()[self._rows]
        self._places = torch.arange(tokens, device=ends.device) - starts
        size = (len(lengths), int(kwargs["max_length_q"]))
        args = tuple(self._apart(x, size) for x in args)
        return args, {
            name: self._apart(value, size)
            for name, value in kwargs.items()
            if name not in _OF_PACKED
        }

    def _apart(self, value: Any, size: tuple[int, int]) -> Any:
        assert self._rows is not None
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] == (1, len(self._rows)):
            found = value.new_zeros(*size, *value.shape[2:])
            return found.index_put((self._rows, self._places), value[0])
        if value.shape[1:] == (1, len(self._rows)):  # positions of several kinds [kinds, 1, T]
            return torch.stack([self._apart(each, size) for each in value])
        return value

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hidden states as they were packed: [1, T, H]."""
        if self._rows is None:
            return output
        rows, places = self._rows, self._places
        self._rows = self._places = None
        if isinstance(output, tuple):
            return (output[0][rows, places][None], *output[1:])
        output.last_hidden_state = output.last_hidden_state[rows, places][None]
        return output


def attach(model: Any) -> None:
    """Let the model's decoder work on examples side by side."""
    hooks = SideBySide()
    decoder = model.get_decoder()
    decoder = model.model if decoder is model else decoder  # Llama 4 says itself
    decoder.register_forward_pre_hook(hooks.before, with_kwargs=True)
    decoder.register_forward_hook(hooks.after)
    decoder.regrow_side_by_side = True


def is_attached(model: nn.Module) -> bool:
    """Whether a part of the model works so."""
    return any(getattr(part, "regrow_side_by_side", False) for part in model.modules())
