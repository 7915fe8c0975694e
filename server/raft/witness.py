"""What the other servers have shown and acknowledged to this one: one that comes back with less has lost its log.

A server names its processes (`server/lived.py`) and says with each connection which they were, and how far its log goes
on its disk. A server that does not know a process of its own runs on an older copy that was put back, however often it
has been started since. A server whose log ends before its acknowledgements to a leader has lost a part of it. Such a
server is told so, which ends it, and nothing that it says counts. Processes are kept on the disk, what was acknowledged
only in memory. A server that is removed from the cluster is forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from rostra.runtime import log as logging
from rostra.server.raft.disk import SNAPSHOT, Disk
from rostra.server.raft.messages import Message

log = logging.get("raft")

FILE_NAME = "witness.json"
FORMAT = 1


class Witness:
    """Servers are known by the hash of their key."""

    def __init__(self, disk: Disk | None) -> None:
        self._disk = disk
        self._seen: dict[str, tuple[int, str]] = {}  # the last process, and how many-th it was
        self._acknowledged: dict[str, int] = {}
        self._is_writing = self._is_due = False
        if disk is not None:
            self._load(disk)

    def acknowledged(self, key_hash: str, index: int) -> None:
        """It has told this leader that it has the log up to `index` on its disk, and all of that is committed."""
        if index > self._acknowledged.get(key_hash, 0):
            self._acknowledged[key_hash] = index

    def problem(self, key_hash: str, said: Message) -> str:
        """What is wrong with a server that says this of itself ("lived"), or ""; then it is remembered."""
        starts, lineage = said["starts"], said["lineage"]
        seen_starts, seen_process = self._seen.get(key_hash, (0, ""))
        # This server may have been away for long, and have seen a process that is not named any more.
        if seen_process not in lineage and seen_starts > starts - len(lineage):
            return f"its data count {starts} starts, without the one that was seen here as number {seen_starts}"
        acknowledged = self._acknowledged.get(key_hash, 0)
        if said["last_index"] < acknowledged:
            return f"its log ends with entry {said['last_index']}, and it has acknowledged entry {acknowledged}"
        if lineage[-1] != seen_process:
            self._seen[key_hash] = (starts, lineage[-1])
            self._keep()
        return ""

    def forget_all_but(self, key_hashes: Collection[str]) -> None:
        """Only these are servers of the cluster, or may still be."""
        gone = [key for key in (*self._seen, *self._acknowledged) if key not in key_hashes]
        for key in gone:
            self._seen.pop(key, None)
            self._acknowledged.pop(key, None)
        if gone:
            self._keep()

    # -- the file

    def _load(self, disk: Disk) -> None:
        if FILE_NAME not in disk.names():
            return
        try:
            file = disk.open(FILE_NAME, read_only=True)
            try:
                data = json.loads(file.read(0, file.size))
            finally:
                file.close()
            if data["format"] <= FORMAT:
                self._seen = {str(key): (int(starts), str(process)) for key, (starts, process) in data["seen"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            log.warn("what is known of the other servers' processes cannot be read, and begins anew", error=str(e))

    def _keep(self) -> None:
        if self._disk is None:
            return
        self._is_due = self._is_writing
        if not self._is_writing:
            self._is_writing = True
            disk, data = self._disk, json.dumps({"format": FORMAT, "seen": self._seen}).encode()
            disk.submit(SNAPSHOT, lambda: disk.create(FILE_NAME, data).close(), self._kept)

    def _kept(self, _result: Any, error: Exception | None) -> None:
        self._is_writing = False
        if error is not None:
            log.warn("what is known of the other servers' processes could not be written", error=str(error))
        elif self._is_due:
            self._keep()
