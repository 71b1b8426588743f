"""The machines that wait to train with this one: sent away when a run does not train with them."""

from __future__ import annotations

from collections.abc import Callable

from regrow.infra.nodes import Nodes, nodes_here
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import SettingError
from regrow.tasks.stage import Stage


class OtherMachines:
    """What they have heard in one run: its train stage, once at work, meets and tells them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._know = False

    def ended(self, stage: Stage, begun: bool) -> None:
        """A stage has ended, well or not.

        Args:
            begun: its own work had begun. For training that means that the others were met: it is
                the first thing that it does, and they have heard how it ended.
        """
        if stage.name == "train":
            self._know = begun

    def send_away(self, error: BaseException | None) -> None:
        """At the end of the run: those that wait hear of it, if they have not.

        It is the last thing of a run that has its end without it, so whatever fails is a warning.
        """
        nodes = _nodes()
        if nodes is None or not nodes.is_first or self._know:
            return
        if error is not None and not isinstance(error, Exception):
            return  # told to stop: whoever told it ends the others too
        # Only here: it imports torch, and most runs are on one machine.
        from regrow.tasks.train.machines import send_away

        try:
            send_away(nodes, self._say, _in_a_line(error))
        except Exception as fault:  # noqa: BLE001 (torch's own, sockets'; it is told)
            why = mask_secrets(str(fault))
            self._say(f"warning: the other machines may wait for ever, end them: {why}")


def _in_a_line(error: BaseException | None) -> str:
    if error is None:
        return ""
    return mask_secrets(str(error)).partition("\n")[0] or type(error).__name__


def _nodes() -> Nodes | None:
    try:
        return nodes_here()
    except SettingError:
        return None  # a machine that trains says it
