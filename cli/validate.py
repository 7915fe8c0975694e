"""`rostra validate`: reads configuration files as the agent would, without starting one."""

from __future__ import annotations

from rostra.cli.command import Call, Command, Flag, note, say
from rostra.cli.errors import Failed


def _validate(call: Call) -> None:
    if not call.args:
        raise Failed("Must specify at least one config file or directory")
    from rostra.agent import config

    try:
        found = config.validate(call.args, call["config-format"] or "")
    except config.ConfigErrors as e:
        raise Failed(f"Config validation failed: {e}" if len(e.problems) == 1 else str(e)) from e
    for warning in found.warnings:
        note(warning)
    if not call["quiet"]:
        say("Configuration is valid!")


COMMANDS = {
    "": Command(
        "validate [options] FILE_OR_DIRECTORY...",
        "Checks configuration files and directories as the agent would",
        _validate,
        (
            Flag("config-format", "hcl or json, whatever the names of the files end in."),
            Flag("quiet", "Print nothing where all is well.", "switch"),
        ),
    )
}
