"""The agent as its HTTP handlers see it: every part that a request may need, in one value.

`agent/run.py` builds it once; tests build it with the parts they exercise. It has no behaviour of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rostra.acl.authorizer import EVERYTHING, Authorizer
from rostra.agent.metrics import Metrics
from rostra.wire.caller import Caller

if TYPE_CHECKING:
    from rostra.agent.results import Results
    from rostra.agent.servers_port import Servers


@dataclass(slots=True, eq=False)
class Agent:
    """`config`, `local`, `leaves` and `members` belong to other modules and are typed there.

    The names that `agent/http` itself reads are repeated here, so that a test needs no configuration.
    """

    servers: Servers
    results: Results
    metrics: Metrics = field(default_factory=Metrics)
    node_name: str = ""
    node_id: str = ""
    datacenter: str = "dc1"
    config: Any = None
    local: Any = None  # LocalAgent
    leaves: Any = None  # Leaves
    members: Any = None
    #: What a caller may do with what this agent answers by itself. Servers ask for the rest.
    authorize: Callable[[Caller], Authorizer] = lambda caller: EVERYTHING
    #: What other modules hang here by name, when it has no field of its own.
    parts: dict[str, Any] = field(default_factory=dict)
