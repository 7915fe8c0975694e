"""`rostra agent`: the door to the agent's program, which reads its own flags (`agent/config/`)."""

from __future__ import annotations

from rostra.cli.command import Command


def _run(argv: list[str]) -> int:
    from rostra.agent import run

    return int(run.main(argv) or 0)


def _help() -> str:
    from rostra.agent import config

    return (
        "Usage: rostra agent [options]\n\n"
        "  Runs the agent of this host until it is interrupted; with -server or -dev, a server with it.\n\n"
        f"Command Options\n\n{config.usage()}"
    )


COMMANDS = {"": Command("agent [options]", "Runs a Rostra agent", program=_run, program_help=_help)}
