"""Background tasks have an owner and an end; delays grow and are bounded."""

import asyncio
import itertools
import subprocess
import sys

import pytest

from rostra.runtime.service import Tasks, backoff
from tests.support.waiting import eventually


async def test_a_crash_is_logged_with_its_name_and_told_to_the_owner(capsys):
    told = asyncio.get_running_loop().create_future()

    async def crash():
        raise LookupError("no such thing")

    async with Tasks("owner", lambda name, error: told.set_result((name, error))) as tasks:
        tasks.start("reaper", crash())
        name, error = await asyncio.wait_for(told, 5)
    assert (name, str(error)) == ("reaper", "no such thing")
    line = capsys.readouterr().err
    assert "owner: task crashed: task=reaper" in line
    assert "LookupError: no such thing" in line


async def test_a_task_that_ends_is_forgotten():
    async with Tasks("owner") as tasks:
        assert await tasks.start("sum", asyncio.sleep(0, 3)) == 3
        await asyncio.sleep(0)
        assert len(tasks) == 0


async def test_stop_cancels_the_last_started_first_and_waits():
    ended = []

    async def work(name):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    tasks = Tasks("owner")
    for name in "abc":
        tasks.start(name, work(name))
    assert tasks.names == ["a", "b", "c"]
    await asyncio.sleep(0)
    await tasks.stop()
    assert ended == ["c", "b", "a"]
    assert tasks.stopped


async def test_a_task_that_ignores_its_end_is_named_and_left(capsys):
    done = asyncio.Event()

    async def stubborn():
        while not done.is_set():
            try:
                await done.wait()
            except asyncio.CancelledError:
                pass

    tasks = Tasks("owner")
    task = tasks.start("stubborn", stubborn())
    await asyncio.sleep(0)
    await tasks.stop(0.05)
    assert "task does not stop: task=stubborn" in capsys.readouterr().err
    done.set()
    await task


async def test_a_task_may_stop_its_own_owner():
    tasks = Tasks("owner")
    await asyncio.wait_for(tasks.start("end", tasks.stop()), 5)


async def test_nothing_starts_after_stop():
    tasks = Tasks("owner")
    await tasks.stop()
    with pytest.raises(RuntimeError, match="'late'"):
        tasks.start("late", asyncio.sleep(0))


def test_delays_double_up_to_the_most():
    assert list(itertools.islice(backoff(1, 10, random=lambda: 1.0), 6)) == [1, 2, 4, 8, 10, 10]
    assert list(itertools.islice(backoff(1, 10, random=lambda: 0.0), 3)) == [0.5, 1, 2]
    assert all(0.5 <= d <= 1 for d in itertools.islice(backoff(1, 1), 50))


async def test_kept_work_is_run_again_however_it_ends_and_the_same_end_is_said_once(capsys):
    waiting = asyncio.get_running_loop().create_future()
    lives: list[int] = []

    async def work():
        lives.append(len(lives))
        match len(lives):
            case 1 | 2 | 3:
                raise OSError(24, "Too many open files")
            case 4:
                return  # as if it had nothing more to do
            case 5:
                waiting.cancel()
                await waiting  # nobody asked this task to end
            case 6:
                raise LookupError("a defect")
        await asyncio.Event().wait()

    async with Tasks("owner") as tasks:
        tasks.keep("journal", work, first_s=0.001, most_s=0.002)
        await eventually(lambda: len(lives) == 7)
        assert tasks.names == ["journal"]
    said = [line for line in capsys.readouterr().err.splitlines() if "has ended, is started again" in line]
    reasons = [line.partition("reason=")[2].partition(" in_s")[0] for line in said]
    assert reasons == [
        '"[Errno 24] Too many open files"',
        '"it came to an end"',
        '"something that it waited for was cancelled"',
        '"a defect"',
    ]
    assert all("what=journal" in line for line in said)


async def test_the_end_of_kept_work_that_was_steady_is_said_each_time_and_its_pauses_begin_anew(capsys):
    lives = []

    async def work():
        lives.append(0)
        await asyncio.sleep(0.002)
        raise OSError("again")

    async with Tasks("owner") as tasks:
        tasks.keep("steady", work, first_s=0.001, most_s=60.0, steady_s=0.001)
        await eventually(lambda: len(lives) >= 12)  # the pause before the 12th would be seconds
    assert capsys.readouterr().err.count("reason=again") >= 11


async def test_kept_work_ends_with_its_owner_even_where_it_takes_no_notice():
    async def deaf():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    tasks = Tasks("owner")
    task = tasks.keep("deaf", deaf)
    await asyncio.sleep(0)
    await tasks.stop()
    assert task.done()


async def test_an_owner_that_ends_the_process_hears_of_kept_work_that_returns():
    told = asyncio.get_running_loop().create_future()
    async with Tasks("owner", lambda name, error: told.set_result((name, str(error)))) as tasks:
        tasks.keep("duties", lambda: asyncio.sleep(0))
        assert await asyncio.wait_for(told, 5) == ("duties", "duties has ended, which it must not")


def test_a_thread_that_dies_ends_the_process_and_is_named():
    code = """
import threading
from rostra.runtime.service import end_with_threads
end_with_threads()
threading.Thread(target=lambda: {}["gone"], name="journal").start()
threading.Event().wait(20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 70
    assert "a thread has died, stopping at once: thread=journal" in done.stderr


def test_a_thread_waits_for_the_interpreter_no_longer_than_one_reader_has_of_a_turn_of_the_loop():
    code = """
import sys
from rostra.runtime.service import take_turns_with_threads
from rostra.wire.turns import SLICE_S
before = sys.getswitchinterval()
take_turns_with_threads()
print(before > SLICE_S > sys.getswitchinterval())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "True\n"
