"""RaftLog among peers whose every word the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rostra.server.raft import Member, RaftLog, Timing
from rostra.server.raft.messages import Message, decode, encode
from tests.support.raft_state import AppliedEntries

TIMING = Timing(heartbeat_s=0.02, election_min_s=0.1, election_max_s=0.2)


class Peer:
    """The other end of a link: it hears what the server says and says what the test wants."""

    def __init__(self, raft: RaftLog, peer_id: str) -> None:
        self.id, self.heard, self.open = peer_id, [], True
        self.on_frame: Callable[[bytes], None] | None = None
        self.on_lost: Callable[[str], None] | None = None
        self._something = asyncio.Event()
        raft.accept(peer_id, self)  # type: ignore[arg-type]
        if self.open:
            self.say(type="ready")

    heard: list[Message]

    # FrameConnection
    def send(self, payload: bytes) -> None:
        message = decode("c1", payload)
        assert message is not None
        self.heard.append(message)
        self._something.set()

    def flush(self) -> None:
        pass

    def raise_bound(self, frame_bytes_max: int) -> None:
        pass

    def abort(self, reason: str = "") -> None:
        self.open = False

    close = abort

    # the test
    def say(self, **message: Any) -> None:
        assert self.on_frame is not None
        self.on_frame(encode("c1", message))

    def hang_up(self) -> None:
        self.open = False
        assert self.on_lost is not None
        self.on_lost("gone")

    async def hears(self, kind: str, **wanted: Any) -> Message:
        """The first message of that kind and content; drops what came before it."""
        return await self._hears(
            lambda said: said["type"] == kind and all(said[name] == value for name, value in wanted.items())
        )

    async def hears_entries(self) -> Message:
        """The first append that is not empty; drops what came before it."""
        return await self._hears(lambda said: said["type"] == "append_entries" and bool(said["entries"]))

    async def _hears(self, is_wanted: Callable[[Message], bool]) -> Message:
        async with asyncio.timeout(10):
            while True:
                for at, message in enumerate(self.heard):
                    if is_wanted(message):
                        del self.heard[: at + 1]
                        return message
                self._something.clear()
                await self._something.wait()

    async def votes(self) -> int:
        """Grant a pre-vote and a vote; the term."""
        asked = await self.hears("pre_vote")
        self.say(type="pre_vote_reply", term=asked["term"], current=asked["term"] - 1, granted=True)
        asked = await self.hears("request_vote", term=asked["term"])
        self.say(type="response_vote", term=asked["term"])
        return int(asked["term"])

    def answers(self, append: Message) -> None:
        last = append["entries"][-1][1] if append["entries"] else append["prevLogIdx"]
        answer = {"term": append["term"], "r": append["r"], "next_node_idx": last + 1}
        self.say(type="next_node_idx", reset=False, success=True, **answer)

    async def follows(self) -> None:
        """Answer all appends from now on."""
        while True:
            self.answers(await self.hears("append_entries"))


class Machine(AppliedEntries):
    """What is applied, and how the process would end."""

    def __init__(self) -> None:
        super().__init__()
        self.roles: list[tuple[bool, str | None, int]] = []
        self.stops: list[str] = []
        self.logs: list[RaftLog] = []

    async def start(self, directory: Path | None = None, others: Sequence[str] = (), **more: Any) -> RaftLog:
        async def dial(member: Member) -> Any:
            raise OSError("nobody there")

        raft = RaftLog(
            **{  # type: ignore[arg-type]
                "directory": directory,
                "node_id": "a",
                "cluster_id": "c1",
                "members": [Member(node, "127.0.0.1", 0, "", node) for node in ("a", *others)],
                "state": self,
                "dial": dial,
                "timing": TIMING,
                "on_role_change": lambda *role: self.roles.append(role),
                "fail_stop": self.stops.append,
                **more,
            }
        )
        await raft.start()
        self.logs.append(raft)
        return raft
