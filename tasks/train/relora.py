"""ReLoRA: at each restart what was learnt is kept, and the adapter begins anew.

Lialin et al. 2023 (arXiv 2307.05695); the words and defaults are Axolotl's.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.tasks.modeling.rounds import Rounds

logger = logging.getLogger(__name__)

ROUNDS_FILE = "rounds.safetensors"
"""Of a checkpoint: the rounds that were finished before it."""


@dataclass(frozen=True)
class Pruning:
    """What is taken out of the optimizer's moments at a restart: they are of another adapter."""

    method: str
    """magnitude: the smallest; random, reset: a random choice."""
    ratio: float
    """The share that becomes 0."""


class ReLoRA(TrainerCallback):
    """Finishes a round after every so many steps."""

    def __init__(
        self,
        rounds: Rounds,
        every: int,
        pruning: Pruning,
        seed: int,
        path: Path,
        kept: Path | None = None,
        *,
        writes: bool = True,
    ) -> None:
        """`path`: the file for checkpoints, beginning with what a checkpoint had (`kept`).

        Args:
            every: optimizer steps of a round.
            writes: whether this rank writes the file.
        """
        self._rounds, self._every, self._pruning = rounds, every, pruning
        self._seed, self._writes = seed, writes
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if writes:
            path.unlink(missing_ok=True)
        if kept is not None and kept.is_file():
            rounds.read(kept)
            if writes:
                path.write_bytes(kept.read_bytes())

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called on all ranks. A checkpoint of the same step was taken before."""
        step = state.global_step
        if step == 0 or step % self._every:
            return
        self._rounds.finish()
        self._rounds.restart(_number(self._seed, step, "first values"))
        prune(optimizer, self._pruning, _number(self._seed, step, "pruning"))
        if self._writes:
            self._rounds.write(self.path)
        logger.info("relora: round %d begins after step %d", step // self._every + 1, step)


def _number(seed: int, step: int, purpose: str) -> int:
    """A seed that depends on nothing but these."""
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return int.from_bytes(digest[:4])


@torch.no_grad()
def prune(optimizer: Any, pruning: Pruning, seed: int) -> None:
    """Set a share of the moments to 0: of torch's AdamW, and of bitsandbytes' in 32 or 8 bits.

    Both moments lose the same elements, chosen by the first one. (The paper's code and Axolotl
    choose for each by itself: a first moment without its second one gives a huge step.)
    """
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                chosen = _chosen(state["exp_avg"], pruning, generator)
                state["exp_avg"][chosen] = 0
                state["exp_avg_sq"][chosen] = 0
            elif "state1" in state:
                chosen = _chosen(_values(state), pruning, generator)
                _zero_code(state, "1", chosen)
                _zero_code(state, "2", chosen)


_BLOCK = 256
"""Elements with one scale in bitsandbytes' 8-bit states (`Optimizer2State.init_state`, 0.50.2)."""


def _values(state: dict[str, Any]) -> Tensor:
    """bitsandbytes' first moment as numbers."""
    moment: Tensor = state["state1"]
    if moment.dtype != torch.uint8:
        return moment
    table, scales = state["qmap1"], state["absmax1"].repeat_interleave(_BLOCK)
    codes = moment.flatten().to(table.device).int()
    return (table[codes] * scales[: moment.numel()]).view_as(moment)


def _zero_code(state: dict[str, Any], number: str, chosen: Tensor) -> None:
    """Zero where `chosen`; in 8 bits that is the code which the table takes for 0."""
    moment: Tensor = state[f"state{number}"]
    chosen = chosen.to(moment.device)  # a paged one counts as the host's, its table does not
    in_codes = moment.dtype == torch.uint8
    moment[chosen] = state[f"qmap{number}"].abs().argmin().to(torch.uint8) if in_codes else 0


def _chosen(moment: Tensor, pruning: Pruning, generator: torch.Generator) -> Tensor:
    """A mask of what becomes 0, as the moment in shape."""
    count = int(pruning.ratio * moment.numel())
    if pruning.method == "magnitude":
        order = moment.abs().flatten().argsort(stable=True)
    else:
        order = torch.randperm(moment.numel(), generator=generator).to(moment.device)
    mask = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
    mask[order[:count]] = True
    return mask.view_as(moment)
