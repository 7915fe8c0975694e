"""`rostra server`: the door to the core alone (service mode), with the agent's flags."""

from __future__ import annotations

from rostra.cli.command import Command


def _run(argv: list[str]) -> int:
    from rostra.agent import run

    return int(run.main_server(argv) or 0)


def _help() -> str:
    from rostra.agent import config

    return (
        "Usage: rostra server [options]\n\n"
        "  Runs a server's core alone; the agent of this host attaches to it. Takes the agent's flags.\n\n"
        f"Command Options\n\n{config.usage()}"
    )


COMMANDS = {"": Command("server [options]", "Runs a server's core alone", program=_run, program_help=_help)}
