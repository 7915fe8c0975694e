"""`rostra`: the table of nouns, and how an ending becomes an exit status.

`main()` is the console script. It imports a noun's module only when that noun was given, and asks nothing of the
environment but its arguments. Every failure is one line on stderr: 1 for what did not work, 130 after Ctrl-C, 141 where
the reader of our output went away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

_NOUNS = {
    "agent": "Runs a Rostra agent",
    "catalog": "Interact with the catalog",
    "connect": "Interact with the service mesh",
    "force-leave": "Marks a failed node as left",
    "info": "Provides debugging information for operators",
    "intention": "Interact with service intentions",
    "keygen": "Generates a new cluster secret",
    "kv": "Interact with the key-value store",
    "maint": "Controls node or service maintenance mode",
    "members": "Lists the members of a cluster",
    "operator": "Provides tools for operators of the servers",
    "recover": "Goes on after most servers were lost",
    "server": "Runs a server's core alone",
    "services": "Interact with services",
    "validate": "Validate config files/directories",
    "version": "Prints the version",
}
#: Nouns that are not there yet, and what does their work today.
_NOT_YET = {
    "acl": "there are no ACLs: keep client_addr on loopback",
    "config": "there are no configuration entries",
    "debug": "rostra info, /v1/agent/metrics and the agent's log tell what there is",
    "event": "write a key and let a blocking query (/v1/kv/KEY?index=N&wait=60s) wait for it",
    "exec": "run it with your own tool on the hosts that rostra members lists",
    "join": "start the agent with -retry-join=ADDRESS",
    "keyring": "set encrypt in the files of each node (docs/operations.md, Changing the secret)",
    "leave": "stop the agent, then rostra force-leave NAME at another one",
    "lock": "make a session (PUT /v1/session/create) and rostra kv put -acquire -session=ID KEY",
    "login": "there are no ACLs: no token is needed",
    "logout": "there are no ACLs: no token is needed",
    "monitor": "the agent's log is its standard error (journalctl -f -u rostra)",
    "reload": "rostra services register FILE applies a definition at once; for other settings restart the agent",
    "rtt": "there are no network coordinates",
    "snapshot": "rostra kv export saves the keys (docs/operations.md, Backup)",
    "tls": "nodes get their certificates by themselves; rostra keygen makes the secret for it",
    "watch": "blocking queries (?index=N&wait=60s) on any path answer when something has changed",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command of these words (default: the process's) and returns its exit status."""
    if argv is None:
        _open_standard_files()
        _insist_on_utf8()
    words = sys.argv[1:] if argv is None else argv
    try:
        "".join([] if words[:1] == ["kv"] else words).encode()  # keys and values are bytes
    except UnicodeEncodeError:
        return _fail(f"rostra: an argument is not UTF-8: {next(w for w in words if not w.isprintable())!a}")
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _open_standard_files() -> None:
    """Something may have started us with one of them closed: a file that we open later must not take its number, nor
    our lines."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _insist_on_utf8() -> None:
    """Paths and names are UTF-8 for all who read them; Python takes it from the locale, and only at its start."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def _run(words: list[str]) -> int:
    if len(words) > 1 and words[0] == "help":
        return _run([*words[1:], "-h"])
    if not words or words[0] in ("-h", "-help", "--help", "help"):
        (sys.stdout if words else sys.stderr).write(_overview())
        return 0 if words else 127
    noun, rest = words[0], words[1:]
    if noun in ("-v", "-version", "--version"):
        noun, rest = "version", []
    if noun in _NOT_YET:
        return _fail(f"rostra {noun}: not yet available in this version; {_NOT_YET[noun]}")
    if noun not in _NOUNS:
        from rostra.cli.command import did_you_mean

        return _fail(f"rostra: there is no command {noun!r}{did_you_mean(noun, _NOUNS)} (rostra -h lists them)")
    return _run_noun(noun, rest)


def _run_noun(noun: str, words: list[str]) -> int:
    import importlib

    from rostra.cli.command import (
        Command,
        check_arguments,
        did_you_mean,
        help_text,
        parse,
    )
    from rostra.cli.errors import Failed, HelpWanted, UsageError

    module = importlib.import_module(f"rostra.cli.{noun.replace('-', '_')}")
    commands: dict[str, Command] = module.COMMANDS
    name, rest = _choose(commands, words)
    title = f"rostra {noun} {name}".rstrip()
    if name not in commands:
        if rest and rest[0] in ("-h", "-help", "--help"):
            sys.stdout.write(_noun_overview(noun, name, module))
            return 0
        if not rest:
            sys.stderr.write(_noun_overview(noun, name, module))
            return 1
        not_yet: dict[str, str] = getattr(module, "NOT_YET", {})
        if rest[0] in not_yet:
            return _fail(f"{title} {rest[0]}: not yet available in this version; {not_yet[rest[0]]}")
        known = {c.removeprefix(name).strip().split(" ")[0]: 0 for c in commands if c.startswith(name)}
        hint = did_you_mean(rest[0], known) or f"; there are {', '.join(known)}"
        return _fail(f"{title}: there is no subcommand {rest[0]!r}{hint}")
    command = commands[name]
    try:
        if command.program:
            if any(word in ("-h", "-help", "--help") for word in rest):
                raise HelpWanted
            return command.program(rest)
        call = parse(rest, command.all_flags)
        check_arguments(call, command.takes)
        assert command.run is not None
        return command.run(call) or 0
    except HelpWanted:
        sys.stdout.write(help_text(command))
        return 0
    except UsageError as e:
        return _fail(f"{title}: {e} ({title} -h)")
    except Failed as e:
        return _fail(str(e), e.status)
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except Exception as e:
        if os.environ.get("ROSTRA_DEBUG"):
            raise
        return _fail(f"{title}: internal error: {type(e).__name__}: {e} (ROSTRA_DEBUG=1 shows where)")


def _choose(commands: Iterable[str], words: list[str]) -> tuple[str, list[str]]:
    """The command with the most words, and what is left; or a group of commands, where more words are needed."""
    groups = {" ".join(name.split()[:n]) for name in commands for n in range(1, len(name.split()) + 1)}
    name, rest = "", list(words)
    while rest and rest[0] and f"{name} {rest[0]}".strip() in groups:
        name = f"{name} {rest.pop(0)}".strip()
    return name, rest


def _overview() -> str:
    lines = [f"    {noun:<{max(map(len, _NOUNS))}}    {summary}" for noun, summary in _NOUNS.items()]
    return "\n".join(["Usage: rostra [-version] [-help] <command> [<args>]", "", "Available commands are:", *lines, ""])


def _noun_overview(noun: str, name: str, module: object) -> str:
    commands = {c: command for c, command in module.COMMANDS.items() if c.startswith(name)}  # type: ignore[attr-defined]
    width = max(map(len, commands))
    lines = [f"    {c:<{width}}    {command.summary}" for c, command in sorted(commands.items())]
    title = f"rostra {noun} {name}".rstrip()
    return "\n".join(
        [f"Usage: {title} <subcommand> [options] [args]", "", f"  {_NOUNS[noun]}.", "", "Subcommands:", *lines, ""]
    )


def _fail(message: str, status: int = 1) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
