"""The agent as its HTTP handlers see it: every part that a request may need, in one value.

`agent/running.py` builds it once; tests build it with the parts they exercise. It has no behaviour of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from rostra.acl.authorizer import EVERYTHING, Authorizer
from rostra.agent.config.settings import Config
from rostra.agent.metrics import Metrics
from rostra.wire.caller import Caller

if TYPE_CHECKING:
    from rostra.agent.core_process import CoreProcess
    from rostra.agent.leaf import Leaves
    from rostra.agent.local import LocalAgent
    from rostra.agent.proxycfg import ProxyConfigs
    from rostra.agent.results import Results
    from rostra.agent.servers_port import Servers
    from rostra.agent.sync import Sync

#: What every agent has, and a test leaves out that asks for none of it.
_LEFT_OUT: Any = cast(Any, None)


@dataclass(slots=True)
class CoreNumbers:
    """What the core of this host said of itself last, and when (monotonic seconds)."""

    asked_at: float = -1.0
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Agent:
    """`core`: of this host, None on a client. `force_leave(node, prune)` takes a node out of the cluster by hand."""

    servers: Servers
    results: Results
    metrics: Metrics = field(default_factory=Metrics)
    node_name: str = ""
    node_id: str = ""
    datacenter: str = "dc1"
    config: Config = field(default_factory=Config)
    local: LocalAgent = _LEFT_OUT
    leaves: Leaves = _LEFT_OUT
    proxies: ProxyConfigs = _LEFT_OUT
    sync: Sync | None = None
    core: CoreProcess | None = None
    force_leave: Callable[[str, bool], Awaitable[Any]] = _LEFT_OUT
    #: What a caller may do with what this agent answers by itself. Servers ask for the rest.
    authorize: Callable[[Caller], Authorizer] = lambda caller: EVERYTHING
    core_numbers: CoreNumbers = field(default_factory=CoreNumbers)
