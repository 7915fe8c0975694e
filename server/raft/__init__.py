"""Raft: the replicated log of the servers, on pysyncobj's core with our journal, wire and rules.

log.py          RaftLog, the port that the server uses: propose, read_index, lease, roles
core.py         pysyncobj's core, and the only module that knows its private names
guard.py        what the core may see and say; elections.py and replication.py are its two halves
transport.py    the links to the other servers; messages.py what is said on them
journal.py      what is on disk
"""

from rostra.server.raft.core import Timing
from rostra.server.raft.journal import DamagedJournal, JournalInUse, NewerFormat, WrongJournal, has_journal
from rostra.server.raft.log import RaftLog
from rostra.server.raft.transport import Member

__all__ = [
    "DamagedJournal",
    "JournalInUse",
    "Member",
    "NewerFormat",
    "RaftLog",
    "Timing",
    "WrongJournal",
    "has_journal",
]
