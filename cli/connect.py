"""`rostra connect ca get-config|set-config`, and the door to the proxy's program (`rostra connect proxy`)."""

from __future__ import annotations

import json

from rostra.cli.api import path
from rostra.cli.command import Call, Command, Failed, Flag, say
from rostra.cli.output import tabbed_json

_CONFIGURATION = path("connect", "ca", "configuration")
NOT_YET = {
    "envoy": "rostra connect proxy -sidecar-for ID is the proxy, and the agent runs it for registered sidecars",
    "expose": "register a service for the path, or check it over TCP",
    "redirect-traffic": "give each upstream a local_bind_port and let the application connect there",
}


def _get_config(call: Call) -> None:
    try:
        say(tabbed_json(call.client.get(_CONFIGURATION)))
    except Failed as e:
        raise Failed(f"Error querying CA configuration: {e}") from e


def _set_config(call: Call) -> None:
    file = call["config-file"]
    if not file:
        raise Failed("The -config-file flag is required")
    try:
        with open(file, "rb") as f:
            data = f.read()
        json.loads(data)
    except OSError as e:
        raise Failed(f"Error loading CA config file: {file}: {e.strerror}") from e
    except json.JSONDecodeError as e:
        raise Failed(f"Error parsing CA config file: {file}:{e.lineno}:{e.colno}: {e.msg}") from None
    except UnicodeDecodeError:
        raise Failed(f"Error parsing CA config file: {file}: not UTF-8 text") from None
    try:
        call.client.put(_CONFIGURATION, data)
    except Failed as e:
        raise Failed(f"Error setting CA configuration: {e}") from e
    say("Configuration updated!")


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
    "ca set-config": Command(
        "connect ca set-config [options]",
        "Modify the configuration of the CA",
        _set_config,
        (Flag("config-file", "JSON file with the new configuration."),),
        reach="server",
        takes=0,
    ),
    "proxy": Command(
        "connect proxy -sidecar-for ID [options]",
        "Runs the built-in proxy",
        program=_proxy,
        program_help=_proxy_help,
    ),
}
