"""Real children: they get their config, answer, and end with their parent however it ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
import uvloop

from rostra.runtime.lifeline import LifelineClosed, spawn

CHILD = """
import sys, os, signal, time
from rostra.runtime.lifeline import FLAG, Lifeline
lifeline = Lifeline(int(sys.argv[sys.argv.index(FLAG) + 1]))
config = lifeline.receive()
if config.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
lifeline.send({"ready": config["name"], "pid": os.getpid(), "sigint": str(signal.getsignal(signal.SIGINT)),
               "group": os.getpgid(0), "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, []))})
def end():
    open(config["ended"], "w").write("in order")
    if config.get("prompt", True):
        os._exit(3)
lifeline.watch(end if config.get("ended") else None, grace_s=0.2)
if config.get("busy"):
    while True: pass
time.sleep(60)
"""


def child(code=CHILD):
    return spawn([sys.executable, "-c", code])


async def started(**config):
    c = child()
    await c.send({"name": "core", **config})
    return c, await asyncio.wait_for(c.receive(), 10)


def gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_child_gets_its_config_and_says_that_it_is_ready(factory):
    async def story():
        c, ready = await started()
        assert ready["ready"] == "core"
        assert ready["pid"] == c.pid
        assert ready["group"] == os.getpgid(0)
        assert ready["sigint"] == "1"  # SIG_IGN
        assert ready["blocked"] == ()
        assert c.returncode is None
        status, again = await asyncio.gather(c.stop(), c.wait())
        assert status == again == -signal.SIGTERM

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(story(), 20))


async def test_a_child_ends_when_its_lifeline_is_let_go():
    c, _ = await started()
    c.close()
    assert await asyncio.wait_for(c.wait(), 10) == 0


async def test_a_child_whose_loop_is_busy_ends_too():
    c, _ = await started(busy=True)
    c.close()
    assert await asyncio.wait_for(c.wait(), 10) == 0


async def test_a_child_may_end_in_order_but_not_for_ever(tmp_path):
    for prompt, status in ((True, 3), (False, 0)):
        path = tmp_path / str(prompt)
        c, _ = await started(ended=str(path), prompt=prompt)
        c.close()
        assert await asyncio.wait_for(c.wait(), 10) == status
        assert path.read_text() == "in order"


async def test_a_child_that_ignores_sigterm_is_killed():
    c, _ = await started(stubborn=True)
    assert await asyncio.wait_for(c.stop(grace_s=0.2), 10) == -signal.SIGKILL


async def test_a_child_that_dies_at_start_is_noticed_by_who_waits_for_it():
    c = child("raise SystemExit(78)")
    with pytest.raises(LifelineClosed):
        await asyncio.wait_for(c.receive(), 10)
    assert await asyncio.wait_for(c.wait(), 10) == 78
    assert await c.wait() == 78
    c.close()


def test_a_program_that_does_not_exist_is_an_error_and_leaves_nothing_open():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        spawn(["/nonexistent/program"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_ends_when_its_parent_is_killed():
    parent = (
        "import sys, asyncio\n"
        "from rostra.runtime.lifeline import spawn\n"
        "async def main():\n"
        "    c = spawn([sys.executable, '-c', sys.argv[1]])\n"
        "    await c.send({'name': 'core'})\n"
        "    print((await c.receive())['pid'], flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent, CHILD], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    assert gone(pid)


async def test_siblings_do_not_hold_each_others_lifelines():
    first, _ = await started()
    second, _ = await started()
    first.close()
    assert await asyncio.wait_for(first.wait(), 10) == 0
    await second.stop()


async def test_ctrl_c_at_the_terminal_is_left_to_the_parent():
    c, _ = await started()
    c.signal(signal.SIGINT)
    assert await asyncio.wait_for(c.stop(), 10) == -signal.SIGTERM  # and not by the SIGINT that came first
