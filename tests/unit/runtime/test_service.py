"""Background tasks have an owner and an end; delays grow and are bounded."""

import asyncio
import itertools

import pytest

from rostra.runtime.service import Tasks, backoff


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
