"""The program between the agent and the script of a check: it sees to it that nothing of the script outlives either.

Run as a plain file, `python -I -S wrapper.py FD TIMEOUT_S BYTES_MAX PROGRAM ARG…`: it imports five small modules, so a
check costs one short start. The script gets a process group of its own. The group is killed when the agent's end of FD
closes (the agent died or gave up), when the time is over, and when the script has ended but left something behind. The
answer goes over FD: `<exit code> <timed out 0|1> <bytes of output in all>\\n` and the last BYTES_MAX of the output.
"""

import errno
import os
import select
import signal
import sys


def main(argv: list[str]) -> None:
    lifeline, timeout_s, keep = int(argv[1]), float(argv[2]), int(argv[3])
    program = argv[4:]
    os.set_inheritable(lifeline, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out_read, out_write = os.pipe()
    try:
        script = os.posix_spawnp(
            program[0],
            program,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, out_write, 1), (os.POSIX_SPAWN_DUP2, out_write, 2)],
            setpgroup=0,
            setsigdef=[signal.SIGINT, signal.SIGPIPE],
        )
    except (OSError, ValueError) as error:  # the latter: a program without a name
        os.write(lifeline, _answer(-1, False, _not_started(program[0], error)))
        return
    os.close(out_write)
    ended = os.pidfd_open(script)
    tail, total, timed_out = _watch(lifeline, out_read, ended, timeout_s, keep)
    try:
        os.killpg(script, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status = os.waitpid(script, 0)
    try:
        os.write(lifeline, _answer(os.waitstatus_to_exitcode(status), timed_out, tail, total))
    except OSError:
        pass  # nobody is left to hear it


def _watch(lifeline: int, out: int, ended: int, timeout_s: float, keep: int) -> tuple[bytes, int, bool]:
    """Collects output until the script ends, the time is over or the agent is gone."""
    poll = select.poll()
    for fd in (lifeline, out, ended):
        poll.register(fd, select.POLLIN)
    clock = os.times
    deadline = clock().elapsed + timeout_s
    tail, total, timed_out, running = b"", 0, False, True
    while running:
        left = deadline - clock().elapsed
        events = poll.poll(max(0, int(left * 1000) + 1)) if left > 0 else []
        if not events:
            timed_out = True
            break
        ready = {fd for fd, _ in events}
        if out in ready:
            data = os.read(out, 65536)
            if not data:
                poll.unregister(out)
            total += len(data)
            tail = (tail + data)[-keep:]
        elif ended in ready or lifeline in ready:
            running = False
    os.set_blocking(out, False)
    while True:  # what was written just before the end
        try:
            data = os.read(out, 65536)
        except BlockingIOError:
            break
        if not data or total > 16 * 1024 * 1024:
            break
        total += len(data)
        tail = (tail + data)[-keep:]
    return tail, total, timed_out


def _not_started(program: str, error: OSError | ValueError) -> bytes:
    if program and "/" not in program and isinstance(error, FileNotFoundError):
        return f'exec: "{program}": executable file not found in $PATH'.encode()
    number = error.errno if isinstance(error, OSError) else errno.ENOENT
    return f"fork/exec {program}: {os.strerror(number or 0).lower()}".encode()


def _answer(code: int, timed_out: bool, tail: bytes, total: int | None = None) -> bytes:
    return f"{code} {int(timed_out)} {len(tail) if total is None else total}\n".encode() + tail


if __name__ == "__main__":
    main(sys.argv)
