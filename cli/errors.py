"""How a command of the CLI ends where it does not work."""

from __future__ import annotations


class UsageError(Exception):
    """The command line itself is wrong; `str(e)` is one line for the user."""


class Failed(Exception):
    """The command was understood and did not work; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class HelpWanted(Exception):
    """-h, -help or --help was given."""
