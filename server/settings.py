"""What a server process is told at its start: by the agent that spawned it (msgpack, over the lifeline) or by flags."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from rostra.wire.errors import BadRequest


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """Times in seconds. `secrets` are base64 as in `encrypt`; they never reach a log or a command line."""

    node_name: str
    data_dir: str  # "" in dev mode: nothing is kept
    bind: str
    advertise: str
    datacenter: str = "dc1"
    rpc_port: int = 8300
    serf_port: int = 8301
    bootstrap_expect: int = 0
    non_voting_server: bool = False  # a replica of everything that never votes
    candidates: tuple[str, ...] = ()  # host:port of other servers' RPC
    secrets: tuple[str, ...] = ()
    node_id: str = ""
    dev: bool = False
    retry_interval_s: float = 30.0
    election_min_s: float = 0.4
    election_max_s: float = 0.7
    heartbeat_s: float = 0.05
    log_level: str = "info"
    log_json: bool = False
    version: str = ""

    def to_map(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_map(cls, message: Any) -> CoreSettings:
        """Raises BadRequest where the agent is of another version and sends what this one does not know."""
        known = {f.name for f in fields(cls)}
        if not isinstance(message, dict) or not set(message) <= known:
            raise BadRequest("the agent that started this server is of another version; restart both from one version")
        return cls(**message)
