"""The agent process: reads its configuration, spawns its core, and then runs all other parts until a signal.

`running.py` has the parts. They are imported while the core starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rostra.agent.config import Config, ConfigErrors, load
from rostra.agent.core_process import CoreProcess
from rostra.agent.node_settings import core_settings, data_dir
from rostra.runtime import core_dumps
from rostra.runtime import log as logging
from rostra.runtime.service import cannot, end_with_threads, take_turns_with_threads
from rostra.wire.errors import BadRequest, RostraError

if TYPE_CHECKING:
    from rostra.runtime.data_directory import DataDirectory

log = logging.get("agent")

STOP_S = 1.6
FDS_NEEDED = 4096
FDS_LEAST = 64  # with fewer the loop itself cannot be made, and the process is aborted


def main(argv: Sequence[str]) -> int:
    """`rostra agent`. The exit status: 0 after SIGINT or SIGTERM, 1 where it could not start."""
    core_dumps.switch_off()
    try:
        config = load(argv)
    except ConfigErrors as e:
        for problem in e.problems:
            print(f"rostra agent: {problem}", file=sys.stderr)
        return 1
    logging.configure(config.log_level, as_json=config.log_json)
    try:
        _check_bind(config.bind_addr)
        for warning in config.warnings:
            log.warn(warning)
        return _run(config)
    except RostraError as e:
        print(f"rostra agent: {e.message}", file=sys.stderr)
        return _status(e)
    except OSError as e:
        print(f"rostra agent: cannot start: {cannot(e)}", file=sys.stderr)
        return 1


def _status(error: RostraError) -> int:
    """78 where another start would find the same: a person has to look at the data directory."""
    from rostra.runtime.data_directory import UnusableData

    return 78 if isinstance(error, UnusableData) else 1


def main_server(argv: Sequence[str]) -> int:
    """`rostra server`: the core alone, for a unit of its own; an agent on this host attaches to it."""
    try:
        config = load(["-server", *argv])
    except ConfigErrors as e:
        for problem in e.problems:
            print(f"rostra server: {problem}", file=sys.stderr)
        return 1
    from rostra.server.run import run
    from rostra.server.settings import CoreSettings

    failed: list[str] = []

    def ready(message: dict[str, Any]) -> None:
        if "error" in message:
            failed.append(message["error"][1])
            print(f"rostra server: {message['error'][1]}", file=sys.stderr)

    try:
        return run(CoreSettings.from_map(core_settings(config)), ready, None)
    except RostraError as e:
        print(f"rostra server: {e.message}", file=sys.stderr)
        return 1


def _check_bind(host: str) -> None:
    """Said before all that follows from an address: of a foreign one an operator would first be asked for a secret."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError as e:
            if e.errno == errno.EADDRNOTAVAIL:
                raise BadRequest(
                    f"-bind: {host} is no address of this host: choose one that `ip address` shows"
                ) from None


def _run(config: Config) -> int:
    lock = _lock(config)
    pid_file = Path(config.pid_file) if config.pid_file else None
    if pid_file is not None:
        try:
            pid_file.write_text(f"{os.getpid()}\n")
        except OSError as e:
            raise BadRequest(f"cannot write the pid file {pid_file}: {e.strerror}; change it with -pid-file") from None
    _raise_fd_limit()
    end_with_threads()
    take_turns_with_threads()
    core: CoreProcess | None = None
    if config.server or config.dev:
        core = CoreProcess(core_settings(config))
        core.begin()  # it starts while the imports below go on
    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, core))
    except RostraError as e:
        print(f"rostra agent: {e.message}", file=sys.stderr)
        return (core.exit_status if core is not None else 0) or _status(e)
    finally:
        if pid_file is not None:
            pid_file.unlink(missing_ok=True)
        if lock is not None:
            lock.release()


def _lock(config: Config) -> DataDirectory | None:
    if not data_dir(config):
        return None
    from rostra.runtime.data_directory import DataDirectory

    return DataDirectory.lock(config.data_dir, "agent.lock")


def _raise_fd_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft < FDS_LEAST:
        raise BadRequest(
            f"{soft} file descriptors are too few to start, {FDS_LEAST} are the least:"
            " ulimit -n, or LimitNOFILE= in the unit"
        )
    if soft < FDS_NEEDED:
        log.warn(
            "few file descriptors: watches and proxies will be refused when they run out",
            limit=soft,
            wanted=FDS_NEEDED,
            change="ulimit -n, or LimitNOFILE= in the unit",
        )


async def _serve(config: Config, core: CoreProcess | None) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(
        signal.SIGHUP,
        lambda: log.warn(
            "reload is not available yet: `rostra services register FILE` applies a changed service at once; other"
            " settings need a restart, which proxies with supervise = false and a core of its own outlive"
        ),
    )
    from rostra.agent.running import RunningAgent

    running = RunningAgent(config, core, give_up=stop.set)
    starting = asyncio.ensure_future(running.start())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        # A signal must end a start that waits for something, too.
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not stop.is_set():
            starting.result()
            await stopping
        log.info("stopping")
        return running.status
    finally:
        starting.cancel()
        stopping.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await running.stop()
