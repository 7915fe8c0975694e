"""Raft: the replicated log of the servers, on pysyncobj's core with our journal, wire and rules.

log.py          RaftLog, the port that the server uses: propose, read_index, lease, roles
core.py         pysyncobj's core; the private names of its class stand here only. log.py uses one of its transport's,
                `_onMessageReceived`, to hand messages over
guard.py        what the core may see and say; elections.py and replication.py are its two halves
membership.py   which list of members is in force; members.py what such a list is
transport.py    the links to the other servers; messages.py what is said on them
journal.py      the log on disk; snapshots.py the files of snapshots, snapshotting.py their making, sending, installing
disk.py         the door to files
recovery.py     when most servers are lost: which data directory to go on from; recovery_disk.py reads and writes them
"""

from rostra.server.raft.core import Timing
from rostra.server.raft.disk import DirectoryInUse
from rostra.server.raft.journal import DamagedJournal, NewerFormat, WrongJournal, has_journal
from rostra.server.raft.log import RaftLog
from rostra.server.raft.members import Member
from rostra.server.raft.snapshotting import Limits, StateMachine

__all__ = [
    "DamagedJournal",
    "DirectoryInUse",
    "Limits",
    "Member",
    "NewerFormat",
    "RaftLog",
    "StateMachine",
    "Timing",
    "WrongJournal",
    "has_journal",
]
