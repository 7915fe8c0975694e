"""`rostra connect proxy`: flags, signals and the composition of source and proxy.

Runs as the agent's child (`-lifeline-fd`: it dies with the agent) or as a unit of its own, which needs only the agent's
HTTP address. Exit status: 0 after SIGTERM or SIGINT, 1 when it cannot begin, with one line that says why.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from rostra.connect_proxy.admin import serve_admin
from rostra.connect_proxy.log import LEVELS, Log
from rostra.connect_proxy.serve import Limits, Proxy
from rostra.connect_proxy.source import AgentClient, AgentError, AgentSource, FileSource
from rostra.runtime import core_dumps

USAGE = """Usage: rostra connect proxy [options]

  Runs the built-in proxy of the service mesh for one service.

  -sidecar-for=ID         proxy for the service with this ID, as registered with the local agent
  -proxy-id=ID            proxy with this ID
  -http-addr=URL          the local agent: http://host:port, https://host:port or unix:///path
                          (CONSUL_HTTP_ADDR; default http://127.0.0.1:8500)
  -ca-file=FILE           whom to trust for an https agent (CONSUL_CACERT)
  -token=SECRET           ACL token (CONSUL_HTTP_TOKEN)
  -token-file=FILE        file with the ACL token (CONSUL_HTTP_TOKEN_FILE)
  -log-level=LEVEL        trace, debug, info, warn or err (default info)
  -max-connections=N      refuse more than these (default: as many as file descriptors allow)
  -handshake-timeout=N    seconds that a peer has for its TLS handshake (default 10)
  -idle-timeout=N         close connections that move nothing for N seconds (default 0: never)
  -admin-addr=HOST:PORT   serve /stats and /ready over HTTP; loopback addresses only

Without registration, for development:

  -service=NAME           speak as this service
  -upstream=NAME:PORT     reach this service at 127.0.0.1:PORT; may be given several times
  -listen=HOST:PORT       public listener, together with -service-addr
  -service-addr=HOST:PORT where the application listens
"""
_FDS_WANTED = 1024

if TYPE_CHECKING:
    from rostra.connect_proxy.adhoc import AdHocSource


class UsageError(Exception):
    """The command line cannot be understood; the message says what to change."""


@dataclass(slots=True)
class Options:
    """The command line. Each field is a flag; one whose default is a number takes a number."""

    sidecar_for: str = ""
    proxy_id: str = ""
    http_addr: str = ""
    ca_file: str = ""
    token: str = ""
    token_file: str = ""
    log_level: str = "info"
    max_connections: int = 0
    handshake_timeout: float = 10.0
    idle_timeout: float = 0.0
    admin_addr: str = ""
    lifeline_fd: int = -1
    service: str = ""
    upstream: list[str] = field(default_factory=list)
    listen: str = ""
    service_addr: str = ""
    snapshot: str = ""  # for tests and benchmarks: a file instead of an agent
    help: bool = False


def parse_options(argv: Sequence[str], env: dict[str, str]) -> Options:
    """The options in `argv` (without the program's name), completed from `env`. Raises UsageError."""
    options = Options(
        http_addr=env.get("CONSUL_HTTP_ADDR") or "http://127.0.0.1:8500",
        ca_file=env.get("CONSUL_CACERT", ""),
        token=env.get("CONSUL_HTTP_TOKEN", ""),
        token_file=env.get("CONSUL_HTTP_TOKEN_FILE", ""),
    )
    if env.get("CONSUL_HTTP_SSL", "").lower() in ("1", "true") and "://" not in options.http_addr:
        options.http_addr = "https://" + options.http_addr
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument in ("-", "--"):
            raise UsageError(f"unexpected argument {argument!r}")
        name, has_value, value = argument.lstrip("-").partition("=")
        attribute = "help" if name == "h" else name.replace("-", "_")
        if attribute not in Options.__slots__ or "_" in name:
            raise UsageError(f"unknown flag -{name}")
        if attribute == "help":
            options.help = True
            continue
        if not has_value:
            if not rest:
                raise UsageError(f"-{name} needs a value")
            value = rest.pop(0)
        if attribute == "upstream":
            options.upstream.append(value)
            continue
        try:
            setattr(options, attribute, type(getattr(options, attribute))(value))
        except ValueError:
            raise UsageError(f"-{name}={value!r} is not a number") from None
    _check(options)
    return options


def _check(options: Options) -> None:
    if options.help:
        return
    if options.log_level.lower() not in LEVELS:
        raise UsageError(f"-log-level={options.log_level!r} is none of {', '.join(LEVELS)}")
    if sum(map(bool, (options.sidecar_for, options.proxy_id, options.snapshot, options.service))) != 1:
        raise UsageError("give one of -sidecar-for, -proxy-id and -service")
    if not options.service and (options.upstream or options.listen or options.service_addr):
        raise UsageError("-upstream, -listen and -service-addr belong to -service; a registered proxy has its own")
    if options.handshake_timeout <= 0 or options.idle_timeout < 0 or options.max_connections < 0:
        raise UsageError("timeouts and limits must be positive")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal or the end of the lifeline; returns the exit status."""
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv, dict(os.environ))
        if options.help:
            print(USAGE, end="")
            return 0
        if options.lifeline_fd >= 0:
            _die_with(options.lifeline_fd)
        core_dumps.switch_off()
        log = Log(options.log_level)
        _raise_fd_limit(log)
        proxy = Proxy(log, Limits(options.max_connections, options.handshake_timeout, options.idle_timeout))
        source = _source(options, log, proxy)
    except (UsageError, AgentError, OSError) as error:
        print(f"rostra connect proxy: {error}", file=sys.stderr)
        return 1
    failure: list[str] = []

    def fail(reason: str) -> None:
        failure.append(reason)
        proxy.stop()

    proxy.loop.wake_on_signals()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: proxy.stop())
    if options.lifeline_fd < 0:
        signal.signal(signal.SIGINT, lambda _signal, _frame: proxy.stop())
    if options.admin_addr:
        try:
            log.info("admin listening", address=serve_admin(options.admin_addr, proxy.stats))
        except (OSError, ValueError) as error:
            print(f"rostra connect proxy: -admin-addr={options.admin_addr}: {error}", file=sys.stderr)
            return 1
    threading.excepthook = partial(_thread_died, log)
    gc.freeze()  # what exists now stays: not worth looking at again
    source.start(fail)
    proxy.run()
    log.debug("stopped", **proxy.stats())
    if failure:
        log.error(failure[0])
        return 1
    return 0


def _source(options: Options, log: Log, proxy: Proxy) -> AgentSource | FileSource | AdHocSource:
    if options.snapshot:
        return FileSource(options.snapshot, log, proxy.post_snapshot)

    def read_token() -> str:
        with open(options.token_file, encoding="utf-8") as file:
            return file.read().strip()

    token = options.token or (read_token() if options.token_file else "")
    client = AgentClient(options.http_addr, token, ca_file=options.ca_file)
    if options.service:
        from rostra.connect_proxy.adhoc import AdHocSource, parse_ad_hoc

        try:
            plan = parse_ad_hoc(options.service, options.upstream, options.listen, options.service_addr)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return AdHocSource(client, log, proxy.post_snapshot, plan)
    return AgentSource(
        client,
        log,
        proxy.post_snapshot,
        proxy_id=options.proxy_id,
        sidecar_for=options.sidecar_for,
        read_token=read_token if options.token_file and not options.token else None,
    )


def _thread_died(log: Log, args: threading.ExceptHookArgs) -> None:
    """Nobody would miss it: end, and let whoever supervises this proxy start it again.

    (`runtime.service.end_with_threads` is the same for the other programs.)
    """
    name = args.thread.name if args.thread is not None else "?"
    try:
        log.error("a thread has died, stopping at once", thread=name, error=repr(args.exc_value))
    finally:
        os._exit(70)


def _die_with(fd: int) -> None:
    """The agent's child: Ctrl-C is the agent's business, and the end of `fd` is ours.

    (`runtime.lifeline` does the same, but brings asyncio along, which this program has no other use for.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.set_inheritable(fd, False)
    os.set_blocking(fd, True)

    def wait() -> None:
        try:
            while os.read(fd, 4096):
                pass
        except OSError:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _raise_fd_limit(log: Log) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass
    if soft != resource.RLIM_INFINITY and soft < _FDS_WANTED:
        log.warn("few file descriptors", limit=soft, change="raise LimitNOFILE of the unit (or ulimit -n)")
