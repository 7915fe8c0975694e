"""`rostra connect ca get-config`, and the door to the proxy's program (`rostra connect proxy`)."""

from __future__ import annotations

from rostra.cli.api import path
from rostra.cli.command import Call, Command, say
from rostra.cli.errors import Failed
from rostra.cli.output import tabbed_json

_CONFIGURATION = path("connect", "ca", "configuration")
NOT_YET = {
    "envoy": "rostra connect proxy -sidecar-for ID is the proxy, and the agent runs it for registered sidecars",
    "expose": "register a service for the path, or check it over TCP",
    "set-config": "the mesh CA has its defaults: leaves last 72 hours (rostra connect ca get-config)",
    "redirect-traffic": "give each upstream a local_bind_port and let the application connect there",
}


def _get_config(call: Call) -> None:
    try:
        say(tabbed_json(call.client.get(_CONFIGURATION)))
    except Failed as e:
        raise Failed(f"Error querying CA configuration: {e}") from e


def _proxy(argv: list[str]) -> int:
    from rostra.connect_proxy import run

    return int(run.main(argv) or 0)


def _proxy_help() -> str:
    from rostra.connect_proxy import run

    return run.USAGE


COMMANDS = {
    "ca get-config": Command(
        "connect ca get-config [options]", "Display the configuration of the CA", _get_config, reach="server", takes=0
    ),
    "proxy": Command(
        "connect proxy -sidecar-for ID [options]",
        "Runs the built-in proxy",
        program=_proxy,
        program_help=_proxy_help,
    ),
}
