"""`rostra version`: the version of this program, and of Consul's API that it speaks."""

from __future__ import annotations

import rostra
from rostra.cli.command import Call, Command, Flag, say
from rostra.cli.errors import Failed


def _version(call: Call) -> None:
    if call["format"] not in ("pretty", "json"):
        raise Failed(f'-format: "{call["format"]}" must be pretty or json')
    if call["format"] == "json":
        import json

        say(json.dumps({"Version": rostra.__version__, "ConsulAPI": rostra.CONSUL_API_VERSION}, indent=3))
        return
    say(f"Rostra v{rostra.__version__}")
    say(f"Speaks the HTTP API of Consul {rostra.CONSUL_API_VERSION}")


COMMANDS = {
    "": Command(
        "version [options]",
        "Prints the version",
        _version,
        (Flag("format", "pretty or json.", default="pretty"),),
        takes=0,
    )
}
