"""The machines that wait to train with this one: sent away when a run has nothing to train."""

from __future__ import annotations

from collections.abc import Callable

from regrow.infra.nodes import Nodes, nodes_here
from regrow.infra.settings import SettingError
from regrow.tasks.build import Outcome
from regrow.tasks.stage import Stage


class OtherMachines:
    """What they have heard in one run: its train stage tells them how it ended, if it trains."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._know = False

    def ended(self, stage: Stage, outcome: Outcome | None) -> None:
        """A stage has ended: found or built, or by an error (None)."""
        if stage.name == "train":
            self._know = outcome is None or not outcome.cached

    def send_away(self, error: BaseException | None) -> None:
        """At the end of the run: those that wait hear of it, if they have not."""
        nodes = _nodes()
        if nodes is None or not nodes.is_first or self._know:
            return
        if error is not None and not isinstance(error, Exception):
            return  # told to stop: whoever told it ends the others too
        # Only here: it imports torch, and most runs are on one machine.
        from regrow.tasks.train.machines import send_away

        send_away(nodes, self._say, str(error).partition("\n")[0] if error else "")


def _nodes() -> Nodes | None:
    try:
        return nodes_here()
    except SettingError:
        return None  # a machine that trains says it
