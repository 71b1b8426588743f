"""Adds the loss that balances a mixture's experts to the token loss, and reports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from regrow.tasks.modeling.expert_balance import Routers, balance_losses
from regrow.tasks.train.loader import ROW_LENGTHS, MicroBatches

_Base = Trainer if TYPE_CHECKING else object


class Balancing(_Base):
    """Trainer behaviour for mixtures of experts; mixed in before `Optimization`.

    The loss of a step is its tokens' mean loss plus the coefficient times its rows' mean balance
    loss, however rows are shared out to micro-batches and processes.
    """

    def __init__(
        self, *, batches: MicroBatches, routers: Routers | None = None, **kwargs: Any
    ) -> None:
        """`routers`: of the model, where their loss is wanted."""
        super().__init__(batches=batches, **kwargs)  # pyright: ignore[reportCallIssue]
        self._routers, self._order = routers, batches
        self._balance: list[Tensor] = []  # [sum over rows, rows] of each micro-batch since a report

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the Trainer does, and the balance of experts."""
        lengths = inputs.pop(ROW_LENGTHS, ())
        if self._routers is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._routers.listening() as logits:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self._balance_term(logits, lengths)
        return (loss, outputs) if return_outputs else loss

    def _balance_term(self, logits: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
        """This micro-batch's part in the mean over the rows of the step."""
        routers = self._routers
        assert routers is not None, "there is nothing to balance"
        if not lengths:  # a batch of padding takes part, with a gradient of zero
            return 0.0 * sum(layer.float().sum() for layer in logits)  # type: ignore[return-value]
        total = balance_losses(logits, lengths, routers.top_k).sum()
        self._balance.append(torch.stack([total.detach(), total.new_tensor(len(lengths))]))
        rows = self._order.rows_in_step(self.state.global_step)
        # Gradients are averaged over the processes that read other rows; the token loss is
        # multiplied alike (`Trainer.compute_loss`).
        readers = self.accelerator.num_processes // self.get_tp_size()
        return total * (routers.coefficient * readers / rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean balance loss of the steps since the last report."""
        if "loss" in logs and self._routers is not None:
            sums = torch.stack([*self._balance, torch.zeros(2, device=self.args.device)]).sum(0)
            self._balance = []
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            total, rows = sums.tolist()
            logs["router_aux_loss"] = total / max(rows, 1.0)
        super().log(logs, start_time)
