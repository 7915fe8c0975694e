"""What clients saw: operations on keys with the times of call and answer, and what became of them.

All clients of a run live in one process, so one monotonic clock orders calls and answers. A written value names its
write: no two writes of a run have the same one. `None` stands for "there is no such key".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Final

PUT, CAS, DELETE, READ = "put", "cas", "delete", "read"
#: How fresh a read must be. A stale one may be of any past.
DEFAULT, CONSISTENT, STALE = "default", "consistent", "stale"

#: The outcomes of an operation. REFUSED: a compare-and-set that did not match. NOT_DONE: certainly without effect.
DONE, REFUSED, NOT_DONE, UNKNOWN = "done", "refused", "not done", "unknown"

#: The end of an operation that was never answered: it may take effect at any later time.
NEVER: Final = 1 << 62


@dataclass(slots=True)
class Op:
    """One operation on one key. Times in ns."""

    kind: str
    key: str
    call: int
    end: int = NEVER
    outcome: str = UNKNOWN
    value: str | None = None  # put, cas: what is written; read: what was seen
    expected: str | None = None  # cas: the value that must be there, None for no key
    mode: str = ""  # of a read
    version: int = 0  # of a read: the row's ModifyIndex
    client: str = ""

    @property
    def writes(self) -> bool:
        return self.kind != READ

    def __str__(self) -> str:
        answered = f"{self.end / 1e9:.6f}" if self.end != NEVER else "never"
        what = {
            PUT: f"put {self.value}",
            CAS: f"cas {self.expected} -> {self.value}",
            DELETE: "delete",
            READ: f"read {self.mode}: {self.value} at {self.version}",
        }[self.kind]
        return f"{self.call / 1e9:.6f} .. {answered:>14} {self.client:<8} {what}: {self.outcome}"


class History:
    """All operations of a run by key. Times are relative to its beginning."""

    def __init__(self) -> None:
        self.keys: dict[str, list[Op]] = defaultdict(list)
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def begin(self, op: Op) -> None:
        """It is about to be sent: whatever happens from now on, it may have been done."""
        self.keys[op.key].append(op)

    def end(self, op: Op, outcome: str, at: int = NEVER) -> None:
        """It was answered; or nobody waits for the answer any more."""
        op.outcome, op.end = outcome, at
        self.outcomes[f"{op.kind} {op.mode}".strip(), outcome] += 1
