"""The vocabulary of the log and of reads: every command and every query, once.

A new one is a dataclass in its resource's file and a line here. `servers_only` commands are proposed by servers about
the cluster itself; `EDGE_COMMANDS` is what may come from an agent.
"""

from __future__ import annotations

from typing import Any

from rostra.server.state import ca, catalog, cluster, health, intention, kv, operator, session
from rostra.wire.codec import Vocabulary

COMMANDS: tuple[type[Any], ...] = (
    kv.SetKey,
    kv.DeleteKey,
    kv.DeleteTree,
    catalog.Register,
    catalog.Deregister,
    session.CreateSession,
    session.DestroySession,
    session.ExpireSession,
    session.RenewSessions,
    intention.SetIntention,
    intention.DeleteIntention,
    ca.SetRoot,
    ca.DropRoot,
    ca.SetCaConfig,
    ca.NextSerial,
    cluster.Bootstrap,
    cluster.BindNode,
    cluster.SetMemberStatus,
    cluster.SetVoter,
    cluster.ForgetNode,
    cluster.NodeReports,
    cluster.StateHash,
    cluster.ReapTombstones,
    operator.SetAutopilot,
)

QUERIES: tuple[type[Any], ...] = (
    kv.GetKey,
    kv.ListKeys,
    kv.KeyNames,
    catalog.Nodes,
    catalog.ServiceNames,
    catalog.NodeServices,
    catalog.ServiceAddresses,
    health.ServiceInstances,
    health.ConnectInstances,
    health.NodeChecks,
    health.Checks,
    session.SessionInfo,
    session.Sessions,
    session.NodeSessions,
    intention.Intentions,
    intention.IntentionsFor,
    ca.Roots,
    ca.CaConfig,
    cluster.Members,
    operator.Autopilot,
)

EDGE_COMMANDS: tuple[type[Any], ...] = tuple(c for c in COMMANDS if not getattr(c, "servers_only", False))

COMMAND_VOCABULARY = Vocabulary(COMMANDS)
EDGE_VOCABULARY = Vocabulary(EDGE_COMMANDS)
QUERY_VOCABULARY = Vocabulary(QUERIES)
