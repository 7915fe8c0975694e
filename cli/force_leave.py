"""`rostra force-leave`: an operator says that a failed node is gone for good."""

from __future__ import annotations

from rostra.cli.api import path
from rostra.cli.command import Call, Command, Flag
from rostra.cli.errors import Failed


def _force_leave(call: Call) -> None:
    if len(call.args) != 1:
        raise Failed("A single node name must be specified to force-leave")
    try:
        call.client.put(path("agent", "force-leave", call.args[0]), query={"prune": "1"} if call["prune"] else None)
    except Failed as e:
        raise Failed(f"Error force leaving: {e}") from e


COMMANDS = {
    "": Command(
        "force-leave [options] NODE",
        "Marks a failed node as left and removes it, with its services, from the catalog.",
        _force_leave,
        (Flag("prune", "Remove the node from the list of members, too.", "switch"),),
        reach="agent",
        text="A node that is alive is refused. One that comes back later is a member again.",
    )
}
