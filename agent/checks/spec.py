"""One check as it is kept and run, whatever its kind: flat, so that files of other versions can be read.

`agent/definition.py` makes specs of definitions, `agent/local.py` keeps them, `kinds.py` knows which fields count for
which kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TIMEOUT_DEFAULT_S = 10.0
OUTPUT_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class CheckSpec:
    """What to run, how often, and how many results it takes to change the status."""

    id: str
    name: str
    type: str  # the name of its kind
    status: str = "critical"  # until the first result
    notes: str = ""
    service_id: str = ""
    token: str = ""
    interval_s: float = 0.0
    timeout_s: float = TIMEOUT_DEFAULT_S
    ttl_s: float = 0.0
    http: str = ""
    method: str = ""
    header: dict[str, tuple[str, ...]] = field(default_factory=dict)
    body: str = ""
    tls_skip_verify: bool = False
    tls_server_name: str = ""
    tcp: str = ""
    args: tuple[str, ...] = ()
    alias_node: str = ""
    alias_service: str = ""
    success_before_passing: int = 0
    failures_before_warning: int = 0
    failures_before_critical: int = 0
    deregister_after_s: float = 0.0  # 0: never
    output_bytes_max: int = OUTPUT_BYTES_MAX
