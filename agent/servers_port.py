"""The port through which everything in the agent reaches the servers, and the values that cross it.

`agent/servers.py` implements it over RPC; tests implement it over a plain `Store`. It knows no HTTP and no sockets.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rostra.wire.caller import ANONYMOUS, Caller

Key = str | tuple[str, ...]
Row = tuple[Any, ...]
Mode = Literal["default", "consistent", "stale"]


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """One evaluation of a query. `rows` come in any order; `granules` are the 64-bit hashes of its read set."""

    index: int
    granules: tuple[int, ...]
    rows: list[tuple[Key, Row]]


@dataclass(frozen=True, slots=True)
class Barrier:
    """What a server said when asked 'how new must an answer be now?'."""

    index: int
    known_leader: bool
    last_contact_ms: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a watch. `full`: a first answer begins here, drop what you had. `done` False: more of it follows.

    Rows come in any order.
    """

    index: int
    full: bool
    done: bool
    granules: tuple[int, ...]
    rows: list[tuple[Key, Row]]
    removed: list[Key]


class Servers(Protocol):
    async def write(self, command: Any, *, caller: Caller = ANONYMOUS, timeout_s: float = 10.0) -> Any:
        """The result of applying `command` once, whatever leader changes happen meanwhile. Raises RostraError."""

    async def read(self, query: Any, *, min_index: int = 0, token: str = "") -> ReadAnswer:
        """One evaluation of `query` by a server whose index is at least `min_index`. Raises RostraError."""

    async def barrier(self, mode: Mode) -> Barrier:
        """Shared by requests; a request only joins a barrier that starts after it arrived. Raises NoLeader."""

    def watch(self, query: Any, *, token: str = "") -> AsyncIterator[Delta]:
        """A first answer, then changes. Never ends by itself; after a lost session it starts again with full=True."""

    async def act(
        self,
        kind: str,
        args: dict[str, Any],
        *,
        caller: Caller = ANONYMOUS,
        timeout_s: float = 10.0,
        once: bool = False,
    ) -> Any:
        """Something that is not a log entry: sign a leaf, renew a session, ask for the leader.

        After a lost connection it is asked again, unless `once`: then Timeout says that it may have been done.
        """

    def on_touched(self, callback: Callable[[int, frozenset[int] | None], None]) -> None:
        """`callback(index, hashes touched since the last call)`, in order, before the barrier's waiters resume.

        None instead of a set means: forget every cached answer.
        """

    @property
    def connected(self) -> bool: ...
