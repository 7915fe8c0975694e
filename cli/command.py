"""What a command of the CLI is, with flags in Go's grammar: one dash or two, `-f=v` or `-f v`, none after an argument.

A noun's module declares `COMMANDS`, a map from the words after the noun ("" where there are none) to a `Command`;
`cli/main.py` finds it, parses its flags into a `Call` and runs it. Must not import anything slow: it is on the way of
every command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rostra.cli.errors import HelpWanted, UsageError

if TYPE_CHECKING:
    from rostra.cli.api import Client


class Flag(NamedTuple):
    """`kind`: "switch", "choice" (a switch that may be left open: None), "text", "whole" (≥ 0), "texts" (repeatable)
    or "pairs" (repeatable key=value).
    """

    name: str
    help: str
    kind: str = "text"
    default: Any = None


_AGENT_FLAGS = (
    Flag("http-addr", "Address of the agent: host:port, http://…, https://… or unix://PATH. Also CONSUL_HTTP_ADDR."),
    Flag("token", "ACL token. Also CONSUL_HTTP_TOKEN."),
    Flag("token-file", "File that holds the ACL token. Also CONSUL_HTTP_TOKEN_FILE."),
    Flag("ca-file", "CA certificates to trust for https. Also CONSUL_CACERT."),
    Flag("ca-path", "Directory of CA certificates to trust for https. Also CONSUL_CAPATH."),
    Flag("client-cert", "Client certificate for https. Also CONSUL_CLIENT_CERT."),
    Flag("client-key", "Key of the client certificate. Also CONSUL_CLIENT_KEY."),
    Flag("tls-server-name", "Name to expect in the certificate. Also CONSUL_TLS_SERVER_NAME."),
)
_SERVER_FLAGS = (
    Flag("datacenter", "Datacenter to ask; default: the agent's own."),
    Flag("stale", "Let any server answer, not only the leader.", "switch"),
)


class Call:
    """One invocation: its flags by name, its arguments, and the way to the agent."""

    def __init__(self, flags: Mapping[str, Any], args: Sequence[str]) -> None:
        self.flags = flags
        self.args = list(args)
        self._client: Client | None = None

    def __getitem__(self, flag: str) -> Any:
        return self.flags[flag]

    @property
    def client(self) -> Client:
        if self._client is None:
            from rostra.cli.api import client_for

            self._client = client_for(self.flags)
        return self._client


class Command(NamedTuple):
    """`reach` says which HTTP flags it takes: "agent", "server" (with -datacenter and -stale) or "" for none.

    `takes` is how many arguments it has at most; None where it looks at them itself.
    """

    usage: str
    summary: str
    run: Callable[[Call], int | None] | None = None
    flags: tuple[Flag, ...] = ()
    reach: str = ""
    text: str = ""
    takes: int | None = None
    program: Callable[[list[str]], int] | None = None  # takes its own flags: the agent, the server, the proxy
    program_help: Callable[[], str] | None = None

    @property
    def all_flags(self) -> tuple[Flag, ...]:
        http = {"": (), "agent": _AGENT_FLAGS, "server": _AGENT_FLAGS + _SERVER_FLAGS}[self.reach]
        return (*self.flags, *http)


def parse(argv: Sequence[str], flags: Sequence[Flag]) -> Call:
    """The call that these words make. Raises UsageError or HelpWanted."""
    known = {flag.name: flag for flag in flags}
    values: dict[str, Any] = {flag.name: _default(flag) for flag in flags}
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
        if name in ("h", "help"):
            raise HelpWanted
        flag = known.get(name) or known.get(_dashed(name))
        if flag is None:
            raise UsageError(f"flag provided but not defined: -{name}{did_you_mean(name, known, '-')}")
        if flag.kind in ("switch", "choice") and not equals:
            text = "true"
        elif not equals:
            if not rest:
                raise UsageError(f"flag needs an argument: -{name}")
            text = rest.pop(0)
        _take(values, flag, text)
    return Call(values, rest)


def _dashed(name: str) -> str:
    """`MinQuorum`, as settings are shown, is the flag `min-quorum`."""
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).removeprefix("-")


def check_arguments(call: Call, takes: int | None) -> None:
    """Raises UsageError for an argument that nobody would look at. `-flag false` leaves "false" over, too."""
    if takes == 0 and call.args:
        raise UsageError(f"unexpected argument {call.args[0]!r}: only flags are taken, as -flag=value")
    if takes is not None and len(call.args) > takes:
        raise UsageError(f"too many arguments (expected {takes}, got {len(call.args)})")


def _default(flag: Flag) -> Any:
    if flag.kind == "switch":
        return False
    if flag.kind == "texts":
        return []
    return {} if flag.kind == "pairs" else flag.default


def _take(values: dict[str, Any], flag: Flag, text: str) -> None:
    if flag.kind in ("switch", "choice"):
        if text.lower() not in ("1", "t", "true", "0", "f", "false"):
            raise UsageError(f'invalid boolean value "{text}" for -{flag.name}')
        values[flag.name] = text.lower() in ("1", "t", "true")
    elif flag.kind == "whole":
        if not text.isascii() or not text.isdigit():
            raise UsageError(f'invalid value "{text}" for flag -{flag.name}: not a whole number')
        values[flag.name] = int(text)
    elif flag.kind == "texts":
        values[flag.name].append(text)
    elif flag.kind == "pairs":
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f'invalid value "{text}" for flag -{flag.name}: it must have the form key=value')
        values[flag.name][key] = value
    else:
        values[flag.name] = text


def help_text(command: Command) -> str:
    """What `-h` prints."""
    if command.program_help:
        return command.program_help()
    lines = [f"Usage: rostra {command.usage}", "", f"  {command.summary}"]
    if command.text:
        lines += ["", *(f"  {line}".rstrip() for line in command.text.strip().splitlines())]
    if command.reach:
        lines += ["", "HTTP API Options", "", *_flag_lines(command.all_flags[len(command.flags) :])][:-1]
    if command.flags:
        lines += ["", "Command Options", "", *_flag_lines(command.flags)]
    return "\n".join(lines).rstrip() + "\n"


def _flag_lines(flags: Sequence[Flag]) -> list[str]:
    lines = []
    shown = {"switch": "", "choice": "=<true|false>", "whole": "=<uint>", "pairs": "=<key=value>"}
    for flag in sorted(flags):
        lines += [f"  -{flag.name}{shown.get(flag.kind, '=<string>')}", f"     {flag.help}", ""]
    return lines


def did_you_mean(word: str, known: Mapping[str, Any], prefix: str = "") -> str:
    """`; did you mean "x"?` where something known is close, else nothing."""
    import difflib

    close = difflib.get_close_matches(word, [k for k in known if k], n=1, cutoff=0.6)
    return f'; did you mean "{prefix}{close[0]}"?' if close else ""


def say(line: str = "") -> None:
    """One line of the command's answer."""
    sys.stdout.write(f"{line}\n")


def note(line: str) -> None:
    """One line for the person, which is not part of the answer."""
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n")
