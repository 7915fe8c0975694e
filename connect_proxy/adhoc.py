"""A proxy for a service that nobody registered: `-service web -upstream db:9191`, for a developer at a terminal.

The snapshot is put together here from the agent's ordinary endpoints (leaf, roots, healthy proxies, intentions), asked
every two seconds. A registered sidecar gets the same from the agent in one piece and at once (`source.AgentSource`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from rostra.connect_proxy.log import Log
from rostra.connect_proxy.snapshot import Address, Endpoint, Leaf, ProxySnapshot, Rule, SnapshotError, Upstream
from rostra.connect_proxy.source import AgentClient, AgentError, with_addresses

EVERY_S: Final = 2.0
#: Asked about to learn the default when no intention is for '*'; the name cannot be a service's.
_NOBODY: Final = "-"


@dataclass(frozen=True, slots=True)
class AdHoc:
    """What the command line says. `listen` and `local` None: this proxy only reaches out."""

    service: str
    upstreams: tuple[tuple[str, Address], ...] = ()
    listen: Address | None = None
    local: Address | None = None


def parse_ad_hoc(service: str, upstreams: Sequence[str], listen: str, service_addr: str) -> AdHoc:
    """From the flags' values; ValueError names the wrong one."""
    if bool(listen) != bool(service_addr):
        raise ValueError("-listen and -service-addr belong together")
    return AdHoc(
        service,
        tuple(_upstream_flag(text) for text in upstreams),
        _address("-listen", listen) if listen else None,
        _address("-service-addr", service_addr) if service_addr else None,
    )


class AdHocSource:
    """Asks every two seconds and hands on what has changed."""

    def __init__(self, client: AgentClient, log: Log, use: Callable[[ProxySnapshot], None], plan: AdHoc) -> None:
        self._client = client
        self._log = log
        self._use = use
        self._plan = plan

    def start(self, _failed: Callable[[str], None]) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="source", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        last: ProxySnapshot | None = None
        complaint = ""
        while True:
            try:
                snapshot = with_addresses(self._ask(), lambda host: host)
                if snapshot != last:
                    last = snapshot
                    self._use(snapshot)
                complaint = ""
            except (AgentError, SnapshotError, LookupError, TypeError, ValueError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    self._log.warn("no snapshot from the agent", error=complaint or repr(error))
            time.sleep(EVERY_S)

    def _ask(self) -> ProxySnapshot:
        plan = self._plan
        name = quote(plan.service, safe="")
        roots = self._get("/v1/agent/connect/ca/roots")
        leaf = self._get(f"/v1/agent/connect/ca/leaf/{name}")
        prefix = str(leaf["ServiceURI"]).rpartition("/svc/")[0]
        rules, default_allow = self._intentions(name) if plan.listen else ((), False)
        return ProxySnapshot(
            proxy_id=f"{plan.service}-proxy",
            service=plan.service,
            trust_domain=roots["TrustDomain"],
            datacenter=prefix.rpartition("/dc/")[2],
            leaf=Leaf(leaf["CertPEM"], leaf["PrivateKeyPEM"], leaf.get("SerialNumber", "")),
            roots=tuple(root["RootCert"] for root in roots["Roots"]),
            public=plan.listen,
            local=plan.local,
            default_allow=default_allow,
            intentions=rules,
            upstreams=tuple(self._upstream(upstream, bind, prefix) for upstream, bind in plan.upstreams),
        )

    def _upstream(self, name: str, bind: Address, uri_prefix: str) -> Upstream:
        instances = self._get(f"/v1/health/connect/{quote(name, safe='')}?passing=1")
        endpoints = tuple(
            Endpoint(
                entry["Service"]["Address"] or entry["Node"]["Address"],
                entry["Service"]["Port"],
                (entry["Service"].get("Weights") or {}).get("Passing", 1),
            )
            for entry in instances
        )
        return Upstream(name, bind, "", f"{uri_prefix}/svc/{quote(name)}", endpoints)

    def _intentions(self, name: str) -> tuple[tuple[Rule, ...], bool]:
        found = self._get(f"/v1/connect/intentions/match?by=destination&name={name}").get(self._plan.service) or []
        rules = tuple(
            # Permissions instead of an action: this proxy does not look into requests, so none can be allowed.
            Rule(
                i["SourceName"],
                i.get("Action") or "deny",
                i.get("Precedence", 0),
                i.get("ID") or "",
                i.get("DestinationName") or "",
            )
            for i in found
        )
        if any(rule.source == "*" for rule in rules):
            return rules, False
        check = self._get(f"/v1/connect/intentions/check?source={_NOBODY}&destination={name}")
        return rules, check["Allowed"] is True

    def _get(self, path: str) -> Any:
        answer = self._client.get(path)
        if answer.status != 200:
            text = answer.body[:300].decode("utf-8", "replace").strip()
            raise AgentError(f"the agent answered {answer.status} to {path.partition('?')[0]}: {text}")
        return json.loads(answer.body)


def _upstream_flag(text: str) -> tuple[str, Address]:
    """`name:port` or `name:address:port`."""
    name, _, where = text.partition(":")
    if not name or not where:
        raise ValueError(f"-upstream={text!r} is not NAME:PORT")
    return name, _address("-upstream", where)


def _address(flag: str, text: str) -> Address:
    host, _, port = text.rpartition(":")
    try:
        return Address(host.strip("[]") or "127.0.0.1", int(port))
    except ValueError:
        raise ValueError(f"{flag}={text!r}: not an address with a port") from None
