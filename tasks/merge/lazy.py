"""A model whose weights are in memory only while the layer that needs them works.

Each parameter rests as a tensor of the right shape that holds next to nothing (or as the loaded
number in a small type) and becomes the real float32 weight for a moment. So a model is computed in
float32, and merged, in the memory of its largest layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

Read = Callable[[str], Tensor]
"""(name of a parameter in the bare model) -> its weights in float32."""


def put_to_rest(model: nn.Module) -> None:
    """Give every parameter on the meta device a place that takes no memory; ties stay tied."""
    resting: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                new = resting.setdefault(id(parameter), _nothing(parameter))
                module.register_parameter(name, new)


def _nothing(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
    return nn.Parameter(empty, requires_grad=False)


class Weights:
    """The parameters of a bare model, before an adapter is put on it."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        """{parameter: name}; of tied ones the first name."""
        self._resting = {parameter: parameter.data for parameter in self.names}

    @contextlib.contextmanager
    def awake(self, parameters: Iterable[nn.Parameter], read: Read) -> Iterator[None]:
        """Inside, these parameters are their real weights in float32."""
        chosen = {p: self.names[p] for p in parameters if p in self.names}
        for parameter, name in chosen.items():
            parameter.data = read(name)
        try:
            yield
        finally:
            for parameter in chosen:
                parameter.data = self._resting[parameter]

    @torch.no_grad()
    def logits(
        self, model: Any, batch: dict[str, Any], read: Read, merging: bool = False
    ) -> Tensor:
        """Logits [T, V] in float32 of the model, or of it with an adapter.

        Args:
            merging: merge each adapted layer before it works, and take it apart afterwards.
        """
        handles = []
        for unit in units(model):
            borrow = _Borrow(self, read, merging)
            handles += [
                unit.register_forward_pre_hook(borrow.before),
                unit.register_forward_hook(borrow.after, always_call=True),
            ]
        try:
            return model.eval()(**batch).logits[0].float()
        finally:
            for handle in handles:
                handle.remove()


class _Borrow:
    """Hooks of one unit: its weights come before it works and go afterwards."""

    def __init__(self, weights: Weights, read: Read, merging: bool) -> None:
        self._weights, self._read, self._merging = weights, read, merging
        self._open = contextlib.ExitStack()

    def before(self, module: nn.Module, args: Any) -> None:
        self._open.enter_context(self._weights.awake(_parameters(module), self._read))
        if self._merging:
            self._open.enter_context(merged(module))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.close()


def units(model: nn.Module) -> list[nn.Module]:
    """Layers that work on weights of their own: adapted ones whole, others by direct parameters."""
    found, inside = [], set()
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside |= {id(part) for part in module.modules()}
            found.append(module)
        elif any(True for _ in module.parameters(recurse=False)):
            found.append(module)
    return found


def _parameters(unit: nn.Module) -> Iterable[nn.Parameter]:
    """An adapted layer's own and those inside it; of another layer the direct ones."""
    yield from unit.parameters(recurse=isinstance(unit, BaseTunerLayer))


@contextlib.contextmanager
def merged(unit: nn.Module) -> Iterator[None]:
    """Inside, PEFT has merged the unit's adapters into its weights, which must be awake."""
    layers = [part for part in unit.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.merge()  # what is not finite shows in the logits; looking for it takes half the time
    try:
        yield
    finally:
        # Not `unmerge`, which subtracts: the weights themselves are put back by `awake`.
        for layer in layers:
            layer.merged_adapters.clear()
