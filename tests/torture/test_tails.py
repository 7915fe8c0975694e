"""What the torture writes behind a journal is what a power cut may leave: the journal opens and has all that it had."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from rostra.server.raft.disk import DirectoryDisk
from rostra.server.raft.journal import Journal
from tests.torture import tails


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Journal]:
    disk = DirectoryDisk(directory, inline=True)
    journal = Journal.open(disk, cluster_id="c", node_id="n", segment_bytes=30_000, allocate_bytes=30_000)
    yield journal
    journal.close()
    disk.close()


@pytest.mark.parametrize("kind", tails.KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_a_spoiled_journal_has_all_entries(tmp_path: Path, kind: str, seed: int) -> None:
    rng = random.Random(seed)
    directory = tmp_path / "raft"
    with opened(directory) as journal:
        for index in range(2, 30 + 40 * (seed % 3)):
            journal.add(rng.randbytes(rng.choice([10, 800])), index, 1)
            journal.start_sync()
        had = journal[:]
    wiped = 0
    for _ in range(3):
        tails.spoil(directory, kind, rng)
        with opened(directory) as journal:
            assert journal[:] == had
            wiped += journal.wiped_bytes
    assert wiped > 0
