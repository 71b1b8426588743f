"""How far the device is behind the host at points of a step: where it is not, it waits for him."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

from transformers import TrainerCallback

_SETTLED = 4  # steps before the host is as far ahead as it will be
_LAYER = "DecoderLayer"  # how the classes of Transformers' layers end
_EVERY = 8  # layers between two that are told


class Lag(TrainerCallback):
    """Marks points of each step; `summary` gives the medians over the settled steps."""

    def __init__(self) -> None:
        self._steps: list[list[tuple[str, float, Any]]] = []
        self._layers: list[list[tuple[float, Any]]] = []
        """Of each step, where a layer begins: forward, and again where it is recomputed."""
        self._begin: tuple[float, Any] | None = None

    def _mark(self, name: str) -> None:
        import torch

        if self._begin is None:
            torch.cuda.synchronize()
            self._begin = time.monotonic(), self._event()
        self._steps[-1].append((name, time.monotonic(), self._event()))

    def _event(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.register_forward_hook(lambda *_: self._mark("forward pass ends"))
        for name, module in model.named_modules():
            if type(module).__name__.endswith(_LAYER):
                module.register_forward_pre_hook(self._layer_begins)
            if name.endswith("lm_head"):
                module.register_forward_pre_hook(lambda *_: self._mark("head begins"))

    def _layer_begins(self, *_: Any) -> None:
        self._layers[-1].append((time.monotonic(), self._event()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.append([])
        self._layers.append([])
        self._mark("step begins")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark("gradients are clipped")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark("weights are moved")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark("step ends")

    def summary(self) -> dict[str, list[float]]:
        """{point: [host's milliseconds since the point before, the device's lag in ms]}."""
        import torch

        torch.cuda.synchronize()
        assert self._begin is not None
        start, first = self._begin
        took, lag, before = defaultdict(list), defaultdict(list), start
        for number, points in enumerate(self._steps):
            for name, at, event in points:
                if number >= _SETTLED:
                    took[name].append(1e3 * (at - before))
                    lag[name].append(first.elapsed_time(event) - 1e3 * (at - start))
                before = at
        middle = statistics.median
        found = {name: [round(middle(took[name]), 1), round(middle(lag[name]), 1)] for name in took}
        return found | self._of_layers(start, first)

    def _of_layers(self, start: float, first: Any) -> dict[str, list[float]]:
        """{a step's layer: [host's milliseconds since the layer before that is told, lag]}."""
        found = {}
        for number, points in enumerate(self._layers[_SETTLED:], _SETTLED):
            for at in range(0, len(points), _EVERY):
                host, event = points[at]
                lag = first.elapsed_time(event) - 1e3 * (host - start)
                took = 1e3 * (host - points[max(at - _EVERY, 0)][0])
                found[f"{number}.{at}"] = [round(took, 1), round(lag, 1)]
        return found
