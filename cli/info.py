"""`rostra info`: the agent's figures for operators."""

from __future__ import annotations

from rostra.cli.api import path
from rostra.cli.command import Call, Command, say
from rostra.cli.errors import Failed


def _info(call: Call) -> None:
    try:
        stats = call.client.get(path("agent", "self")).get("Stats") or {}
    except Failed as e:
        raise Failed(f"Error querying agent: {e}") from e
    for group, values in sorted(stats.items()):
        say(f"{group}:")
        for key, value in sorted(values.items()):
            say(f"\t{key} = {value}")


COMMANDS = {
    "": Command("info [options]", "Provides debugging information for operators", _info, reach="agent", takes=0)
}
