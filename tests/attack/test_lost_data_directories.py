"""Parts of a server's data directory are lost, old, or another server's: nothing acknowledged is, and it is said so.

w3 is stopped, w1 and w2 acknowledge 200 writes, both die; w2 starts on what is left, with w3, and w1 comes last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import uvloop

from tests.support.lost_data import FORMER_LIFE, SAME_LIFE, Outcome, Servers, empty, play, prepare, remove, replace

#: Relative to the data directory. Sockets and locks are made anew at each start.
PARTS = (
    "node-id",
    "tls",
    "tls/node.key",
    "tls/issued.pem",
    "tls/trust.json",
    "tls/node.pem",
    "tls/anchors.pem",
    "tls/lived.json",
    "server",
    "server/format",
    "server/bootstrap.json",
    "server/lived.json",
    "server/raft",
    "server/raft/journal-00000001",
    "server/raft/witness.json",
)
#: What pairs are made of.
HALVES = ("node-id", "tls", "tls/lived.json", "server", "server/bootstrap.json", "server/lived.json", "server/raft")
WAYS = ("removed", "emptied", "older", "another's")

#: What is no loss: the server starts and has everything.
HARMLESS = {"tls/issued.pem", "tls/node.pem", "tls/anchors.pem", "server/raft/witness.json"}


@dataclass(frozen=True)
class Loss:
    parts: tuple[tuple[str, str], ...]  # (part, way)
    copy: str = FORMER_LIFE  # which one is put back where the way is "older"

    def __str__(self) -> str:
        of = " (same life)" if self.copy == SAME_LIFE else ""
        return " and ".join(f"{part or 'all'} {way}" for part, way in self.parts) + of

    def inflict(self, prepared: Servers, directory: Path) -> None:
        for part, way in self.parts:
            self._how(prepared, part, way)(directory / part)

    def _how(self, prepared: Servers, part: str, way: str) -> Callable[[Path], None]:
        if way == "removed":
            return remove
        if way == "emptied":
            return empty
        return partial(replace, by=prepared.directory / (self.copy if way == "older" else "w1") / part)


def singles() -> Iterator[Loss]:
    for part, way in itertools.product(PARTS, WAYS):
        yield Loss(((part, way),))
    for part in ("server/raft", "server", "server/raft/journal-00000001"):
        yield Loss(((part, "older"),), SAME_LIFE)


def pairs() -> Iterator[Loss]:
    for (one, other), way in itertools.product(itertools.combinations(HALVES, 2), WAYS):
        if not other.startswith(one + "/"):
            yield Loss(((one, way), (other, way)))
    for one, other in (("tls", "server/raft"), ("tls/lived.json", "server/raft"), ("server/lived.json", "server/raft")):
        yield Loss(((one, "older"), (other, "older")), SAME_LIFE)
        yield Loss(((one, "removed"), (other, "older")))
    yield Loss((("", "removed"),))
    yield Loss((("", "older"),))


FEW = [
    Loss((("server", "removed"),)),
    Loss((("server", "emptied"),)),
    Loss((("server/raft", "older"),), SAME_LIFE),
    Loss((("server/raft", "another's"),)),
    Loss((("tls", "removed"),)),
    Loss((("tls/node.key", "another's"),)),
    Loss((("tls/lived.json", "removed"), ("server", "removed"))),
    Loss((("tls/lived.json", "older"), ("server/raft", "older")), SAME_LIFE),
    Loss((("", "older"),)),
    Loss((("tls/issued.pem", "emptied"),)),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Servers:
    return uvloop.run(prepare(tmp_path_factory.mktemp("prepared")))


def check(prepared: Servers, directory: Path, loss: Loss) -> Outcome:
    outcome = uvloop.run(play(prepared, directory, partial(loss.inflict, prepared)))
    if outcome.how != "serves":
        said = outcome.said
        assert said, f"{loss}: {outcome.how}, and no line says so"
        assert "\n" not in said, said
        assert str(directory / "w2") in said or outcome.how == "waits", said
        assert any(way in said for way in ("estore", "ut back", "remove-peer", "add-peer", "start it with")), said
    if all(part in HARMLESS for part, _ in loss.parts):
        assert outcome.how == "serves", f"{loss}: {outcome}"
    print(f"{loss}: {outcome.how}: {outcome.said}")
    return outcome


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_what_was_acknowledged_survives_a_loss_and_the_refusal_says_what_to_do(
    prepared: Servers, tmp_path: Path, loss: Loss
) -> None:
    check(prepared, tmp_path, loss)


@pytest.mark.long
@pytest.mark.parametrize("loss", [*singles(), *pairs()], ids=str)
def test_what_was_acknowledged_survives_every_loss_of_one_part_or_two(
    prepared: Servers, tmp_path: Path, loss: Loss
) -> None:
    check(prepared, tmp_path, loss)
