"""What an agent's configuration means for its node: its data directory, what proves that it may enrol, its core."""

from __future__ import annotations

import base64
from typing import Any

from rostra import __version__
from rostra.agent.config import Config
from rostra.runtime.identity import has_certificate
from rostra.runtime.secret import Secret, generate_secret, is_loopback, parse_secret, resolve_secrets


def core_settings(config: Config) -> dict[str, Any]:
    """What the core of this node is told; see `server/settings.py`."""
    advertise = config.advertise_addr or config.bind_addr
    joins = (*config.retry_join, *config.start_join)
    proofs = secrets(config)

    # A development server waits for nobody, so its clockwork may run as fast as the library allows.
    scale = config.raft_multiplier
    return {
        "node_name": config.node_name,
        "node_id": config.node_id,
        "data_dir": data_dir(config),
        "bind": config.bind_addr,
        "advertise": advertise,
        "datacenter": config.datacenter,
        "rpc_port": config.server_port,
        "serf_port": config.join_port,
        "bootstrap_expect": 1 if config.dev or config.bootstrap else config.bootstrap_expect,
        "non_voting_server": config.non_voting_server,
        "candidates": [_with_port(host, config.server_port) for host in joins],
        "secrets": [base64.b64encode(s.value).decode() for s in proofs],
        "dev": config.dev,
        "retry_interval_s": config.retry_interval_s,
        "heartbeat_s": 0.05 * scale,
        "election_min_s": 0.4 * scale,
        "election_max_s": 0.7 * scale,
        "log_level": config.log_level,
        "log_json": config.log_json,
        "version": __version__,
    }


def secrets(config: Config) -> tuple[Secret, ...]:
    """What proves that this node may enrol. None are needed where the cluster has issued it a certificate before."""
    encrypt = config.encrypt.reveal() or None
    joins = (*config.retry_join, *config.start_join)
    addresses = (config.bind_addr, config.advertise_addr or config.bind_addr)
    if config.dev and encrypt is None and not joins and all(map(is_loopback, addresses)):
        return (parse_secret(generate_secret()),)  # nobody else joins it: it needs no file of this user's
    if encrypt is None and data_dir(config) and has_certificate(data_dir(config)):
        return ()
    return resolve_secrets(encrypt.split(",") if encrypt else None, [*addresses, *joins])


def data_dir(config: Config) -> str:
    """Where state is kept; "" in development mode, which keeps none."""
    return "" if config.dev else config.data_dir


def _with_port(host: str, port: int) -> str:
    """The RPC address on a join address's host. A port in it is the join port's, which the agent asks, not the core."""
    bare = host.rpartition(":")[0] if host.count(":") == 1 else host
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
