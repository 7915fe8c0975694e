"""Whether a server has lived in this data directory, and up to where: what shows that a part of it is lost or old.

A server's promises are in its log. So it notes beside its key (`tls/lived.json`) who it is and which processes it has
been. It also notes up to which place of its journal all is on the disk; the same note lies beside the log
(`server/lived.json`). Each says what the other part must be. A start without a part that the notes name, or on a
journal that ends before the place noted, is refused: others count on what was promised since. A running server notes
its place every few seconds and when it stops. If all of the directory is an old copy, no note in it can show that; only
the other servers know (`raft/witness.py`).
"""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rostra.runtime.data_directory import UnusableData
from rostra.runtime.files import write_durably
from rostra.runtime.identity import read_key_hash, read_node_id
from rostra.runtime.log import get
from rostra.server.membership import FILE_NAME as BOOTSTRAP
from rostra.server.membership import Membership, Stored
from rostra.server.raft.journal import BEGINNING_PLACE, Place
from rostra.server.raft.messages import LINEAGE_MAX
from rostra.wire.errors import BadRequest, RostraError

log = get("server")

FILE_NAME = "lived.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Lived:
    """One note. `place`: all of the journal up to there was on the disk."""

    cluster_id: str
    node_id: str
    name: str
    key_hash: str
    starts: int = 0
    place: Place = BEGINNING_PLACE
    lineage: tuple[str, ...] = ()  # names of its latest processes


class Life:
    """The notes of one data directory, read by the process that is its next."""

    def __init__(self, directory: Path, lived: Lived | None) -> None:
        self._beside_key, self._beside_log = paths(directory)
        self._lived = lived
        self._writing = threading.Lock()  # a stop notes its end while an earlier note may still be on its way
        #: How many-th start this is, and the names of the latest processes, this one last.
        self.starts = 1 + (lived.starts if lived is not None else 0)
        former = lived.lineage if lived is not None else ()
        self.lineage = (*former, uuid.uuid4().hex[:12])[-LINEAGE_MAX:]

    @property
    def place(self) -> Place:
        return self._lived.place if self._lived is not None else BEGINNING_PLACE

    def begin(self, cluster_id: str, node_id: str, name: str, key_hash: str) -> None:
        """It is about to speak: this is another start. Blocks. Raises OSError."""
        self._lived = Lived(cluster_id, node_id, name, key_hash, self.starts, self.place, self.lineage)
        self._write()

    def reached(self, place: Place) -> None:
        """All of the journal up to there is on the disk. Blocks. Raises OSError."""
        with self._writing:
            if self._lived is not None:
                self._lived = replace(self._lived, place=max(place, self.place))
                self._write()

    def _write(self) -> None:
        assert self._lived is not None
        data = _dump(self._lived)
        write_durably(self._beside_key, data)  # first: this one alone is no loss, see `look`
        write_durably(self._beside_log, data)


def paths(directory: Path) -> tuple[Path, Path]:
    """Beside the key, and beside the log."""
    return directory / "tls" / FILE_NAME, directory / "server" / FILE_NAME


def look(directory: Path, stored: Stored, *, has_log: bool) -> Life:
    """What is known of former lives. `stored` is in bootstrap.json; `has_log`: something of a journal is there.

    Raises UnusableData where a part of the directory is gone, old, or another server's; nothing was changed then.
    """
    beside_key, beside_log = paths(directory)
    first, first_wrong = _read(beside_key)
    second, second_wrong = _read(beside_log)
    if first is None and second is None:
        if first_wrong == second_wrong == "missing":
            _check_identity(directory, stored.committed)  # a version without notes ran here, or nothing did
            return Life(directory, None)
        raise UnusableData(
            f"{beside_key} is {first_wrong} and {beside_log} {second_wrong}: nothing shows any more that what this"
            f" server has promised is in its log. {_way_out(None, directory)}"
        )
    lived = first or second
    assert lived is not None
    if first is None or (second is not None and first.starts < second.starts):
        _check_parts(directory, lived, stored, has_log)  # more than the note may be gone
        wrong = first_wrong or f"older than {beside_log}"
        raise UnusableData(
            f"{beside_key} is {wrong}: it alone shows that the log of {lived.name} is no older copy. If nothing else"
            f" was lost here or put back from a backup, copy {beside_log} there. {_way_out(lived, directory)}"
        )
    if second is None and second_wrong != "missing":
        log.warn("a note of this server's former life is damaged, and written anew", path=str(beside_log))
    if second is not None and (first.node_id, first.cluster_id) != (second.node_id, second.cluster_id):
        raise UnusableData(
            f"{beside_log} is of server {_whose(second)}, and {beside_key} of {_whose(first)}: server/ or tls/ was"
            f" copied from another server. {_way_out(first, directory)}"
        )
    _check_parts(directory, first, stored, has_log)
    place = max(first.place, second.place) if second is not None else first.place
    return Life(directory, replace(first, place=place))


def _check_parts(directory: Path, lived: Lived, stored: Stored, has_log: bool) -> None:
    """All that the notes name is there, and is what they name."""

    def refuse(what: str, problem: str) -> UnusableData:
        return UnusableData(
            f"{directory / what}: {problem}, and this data directory is that of server {_whose(lived)}, which has run"
            f" and promised to remember (is a mount missing?). {_way_out(lived, directory)}"
        )

    cluster = stored.committed
    if cluster is None and not has_log:
        raise refuse("server", f"{BOOTSTRAP} and the log in it are gone")
    if cluster is None:
        raise refuse(f"server/{BOOTSTRAP}", "gone, or of before it had a cluster")
    if cluster.cluster_id != lived.cluster_id:
        raise refuse(f"server/{BOOTSTRAP}", f"of cluster {cluster.cluster_id} instead of {lived.cluster_id}")
    if not has_log:
        raise refuse("server/raft", "its log is gone")
    node_id = read_node_id(directory)
    if node_id != lived.node_id:
        raise refuse("node-id", f"{node_id[:64] or 'nothing'} instead of {lived.node_id}")
    _check_key(directory, lived.key_hash, lived.name, refuse)


def _check_identity(directory: Path, cluster: Membership | None) -> None:
    """Without notes: the id and the key are those of one member of its cluster."""
    if cluster is None:
        return

    def refuse(what: str, problem: str) -> UnusableData:
        names = ", ".join(f"{m.name}: {m.node_id}" for m in cluster.members)
        return UnusableData(
            f"{directory / what}: {problem}; the servers in {directory / 'server' / BOOTSTRAP} are {names}."
            f" {_way_out(None, directory)}"
        )

    node_id = read_node_id(directory)
    me = next((m for m in cluster.members if m.node_id == node_id), None)
    if me is None:
        raise refuse("node-id", f"{node_id[:64] or 'nothing'}, no server's id: it was lost, or is another node's")
    _check_key(directory, me.key_hash, me.name, refuse)


def _check_key(directory: Path, key_hash: str, name: str, refuse: Any) -> None:
    try:
        found = read_key_hash(directory)
    except BadRequest as e:
        raise refuse("tls/node.key", e.message.partition("node.key: ")[2] or e.message) from None
    if found != key_hash:
        raise refuse("tls/node.key", f"not {name}'s key" if found else "the key is gone")


def _whose(lived: Lived) -> str:
    return f"{lived.name} ({lived.node_id}) of cluster {lived.cluster_id}"


def _way_out(lived: Lived | None, directory: Path) -> str:
    node_id, name = (lived.node_id, lived.name) if lived is not None else ("ID", "NAME")
    return f"Nothing was changed. {way_out(node_id, name, directory)}"


def way_out(node_id: str, name: str, directory: Path) -> str:
    """What an operator does about a server whose data directory has lost something."""
    return (
        "Put back what is missing, never an older copy; or replace this server: on another one run `rostra operator"
        f" raft remove-peer -id={node_id}`, empty {directory} wholly, start it again, and let it in with `rostra"
        f" operator raft add-peer {name}`"
    )


def accept(directory: Path, place: Place) -> None:
    """After a recovery, which an operator has chosen knowing the price: the log as it is counts. Raises OSError."""
    for path in paths(directory):
        lived = _read(path)[0]
        if lived is not None and lived.place > place:
            write_durably(path, _dump(replace(lived, place=place)))


def noted_places(directory: Path) -> list[Place]:
    """The places that the notes name."""
    notes = [_read(path)[0] for path in paths(directory)]
    return [lived.place for lived in notes if lived is not None]


# -- the file --------------------------------------------------------------------------------------------------------


def _dump(lived: Lived) -> bytes:
    data = {
        "what": "A server has lived here. Do not remove, copy or restore this file alone: see docs/operations.md",
        "format": FORMAT,
        "cluster_id": lived.cluster_id,
        "node_id": lived.node_id,
        "name": lived.name,
        "key_hash": lived.key_hash,
        "starts": lived.starts,
        "lineage": list(lived.lineage),
        "segment": lived.place[0],
        "offset": lived.place[1],
    }
    return json.dumps(data, indent=1).encode() + b"\n"


def _read(path: Path) -> tuple[Lived | None, str]:
    """The note, or why there is none. Raises UnusableData for one that cannot be read or is of a newer version."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] > FORMAT:
            raise UnusableData(f"{path}: format {data['format']} of a newer Rostra; this one knows up to {FORMAT}")
        texts = {name: data[name] for name in ("cluster_id", "node_id", "name", "key_hash")}
        numbers = [data[name] for name in ("starts", "segment", "offset")]
        if not all(type(t) is str and t for t in texts.values()) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError
        lineage = tuple(str(process) for process in data["lineage"])
        return Lived(**texts, starts=numbers[0], place=(numbers[1], numbers[2]), lineage=lineage), ""
    except FileNotFoundError:
        return None, "missing"
    except RostraError:
        raise
    except OSError as e:
        raise UnusableData(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        return None, "damaged"
