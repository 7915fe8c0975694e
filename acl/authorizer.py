"""Who may do what: the questions that commands, queries, acts and routes ask before they run.

A command or query asks in `allowed(can, tables)`, and for each row in `visible(can, key, row)`. Implementations are
pure: they hold the rules of one token, resolved beforehand. Two with equal rules are equal, so that those who watch the
same with them share what is sent. `EVERYTHING` is the answer while ACLs are off.
"""

from __future__ import annotations

from typing import Protocol

#: The first words of each refusal for want of a right, as clients know them.
DENIED = "Permission denied"


class Authorizer(Protocol):
    def key_read(self, key: str) -> bool: ...
    def key_list(self, prefix: str) -> bool: ...
    def key_write(self, key: str) -> bool: ...
    def key_write_all(self, prefix: str) -> bool:
        """May write every key under `prefix`."""

    def node_read(self, node: str) -> bool: ...
    def node_write(self, node: str) -> bool: ...
    def service_read(self, service: str) -> bool: ...
    def service_write(self, service: str) -> bool: ...
    def session_read(self, node: str) -> bool: ...
    def session_write(self, node: str) -> bool: ...
    def intention_read(self, destination: str) -> bool: ...
    def intention_write(self, destination: str) -> bool: ...
    def operator_read(self) -> bool: ...
    def operator_write(self) -> bool: ...
    def agent_read(self, node: str) -> bool: ...
    def agent_write(self, node: str) -> bool: ...


class Everything:
    """May do everything."""

    def key_read(self, key: str) -> bool:
        return True

    def key_list(self, prefix: str) -> bool:
        return True

    def key_write(self, key: str) -> bool:
        return True

    def key_write_all(self, prefix: str) -> bool:
        return True

    def node_read(self, node: str) -> bool:
        return True

    def node_write(self, node: str) -> bool:
        return True

    def service_read(self, service: str) -> bool:
        return True

    def service_write(self, service: str) -> bool:
        return True

    def session_read(self, node: str) -> bool:
        return True

    def session_write(self, node: str) -> bool:
        return True

    def intention_read(self, destination: str) -> bool:
        return True

    def intention_write(self, destination: str) -> bool:
        return True

    def operator_read(self) -> bool:
        return True

    def operator_write(self) -> bool:
        return True

    def agent_read(self, node: str) -> bool:
        return True

    def agent_write(self, node: str) -> bool:
        return True


EVERYTHING = Everything()
