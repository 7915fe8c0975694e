"""What operators set about the servers themselves: how the leader cares for them (autopilot).

Names and defaults are Consul's. Times are whole milliseconds. A setting that is not given has its default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rostra.acl.authorizer import Authorizer
from rostra.server.state.rows import AutopilotRow
from rostra.server.state.tables import Tables
from rostra.server.state.transaction import Tx, View
from rostra.wire.errors import BadRequest

#: What a time or a number here may be at most: a day, and more servers or entries than there will be.
MILLISECONDS_MAX, COUNT_MAX = 86_400_000, 1 << 31


@dataclass(frozen=True, slots=True)
class SetAutopilot:
    """Replace the configuration. `cas`: only if its `modify_index` is this (0: it was never set).

    `auto_admit_servers` None leaves that as it is: Consul's clients write back what they read and do not know it.
    """

    kind: ClassVar[str] = "operator.autopilot"
    cleanup_dead_servers: bool = True
    last_contact_threshold_ms: int = 200
    max_trailing_logs: int = 250
    min_quorum: int = 0
    server_stabilization_time_ms: int = 10_000
    auto_admit_servers: bool | None = None
    cas: int | None = None

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_write()

    def apply(self, tx: Tx) -> bool:
        """True when set; False when `cas` names another version."""
        for name, most in (
            ("last_contact_threshold_ms", MILLISECONDS_MAX),
            ("max_trailing_logs", COUNT_MAX),
            ("min_quorum", COUNT_MAX),
            ("server_stabilization_time_ms", MILLISECONDS_MAX),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise BadRequest(f"{name} must be between 0 and {most}")
        table = tx.tables.autopilot
        old = table.get("")
        if self.cas is not None and self.cas != (old.modify_index if old is not None else 0):
            return False
        admit = self.auto_admit_servers
        if admit is None:
            admit = old is not None and old.auto_admit_servers
        row = AutopilotRow(
            self.cleanup_dead_servers,
            self.last_contact_threshold_ms,
            self.max_trailing_logs,
            self.min_quorum,
            self.server_stabilization_time_ms,
            admit,
            old.create_index if old is not None else tx.index,
            tx.index,
        )
        if old is None or row[:6] != old[:6]:
            tx.put(table, "", row)
            tx.touch("table:autopilot", "")
        return True


@dataclass(frozen=True, slots=True)
class Autopilot:
    """{"": AutopilotRow}: the defaults, with index 0, while nothing was set."""

    kind: ClassVar[str] = "operator.autopilot"

    def allowed(self, can: Authorizer, tables: Tables) -> bool:
        return can.operator_read()

    def keys(self, view: View) -> list[str]:
        view.reads("table:autopilot")
        return [""]

    def row(self, view: View, key: str) -> AutopilotRow | None:
        return (view.tables.autopilot.get("") or AutopilotRow()) if key == "" else None

    def visible(self, can: Authorizer, key: str, row: AutopilotRow) -> bool:
        return True
