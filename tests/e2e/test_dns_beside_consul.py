"""The same questions to a real Consul and to an agent over the same catalog: equal answers, or a named reason.

`tests/unit/dns/consul_answers.json` holds what Consul 1.8.7 said to a smaller list, for machines without one.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import dnslib
import pytest

from tests.support.processes import Agent, Api, Processes, eventually, free_port, new_host

CONSUL = os.environ.get("ROSTRA_CONSUL_BIN", "")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not CONSUL, reason="ROSTRA_CONSUL_BIN names no consul binary"),
]

META = {f"key{n}": f"a value of some length {n}" for n in range(60)}


def _service(name: str, address: str = "", **more: Any) -> dict[str, Any]:
    return {"Service": name, "Address": address, "Port": 80, **more}


CATALOG: list[dict[str, Any]] = [
    *({"Node": f"n{i}", "Address": f"10.0.0.{i}", "Service": _service("web", Tags=[f"v{i}"])} for i in (1, 2, 3)),
    {"Node": "ext", "Address": "www.example.com", "Service": _service("search")},
    {"Node": "far", "Address": "10.0.0.9", "Service": _service("alias", "alias.example.com")},
    {"Node": "far", "Address": "10.0.0.9", "Service": _service("nx", "nx.example.com")},
    {"Node": "far", "Address": "10.0.0.9", "Service": _service("inner", "web.service.consul")},
    {"Node": "far", "Address": "10.0.0.9", "Service": _service("inner2", "n1.node.consul")},
    {"Node": "far", "Address": "10.0.0.9", "Service": _service("innernx", "none.service.consul")},
    {"Node": "sa", "Address": "10.0.0.7", "Service": _service("sa", "10.9.9.9")},
    {"Node": "sa", "Address": "10.0.0.7", "Service": _service("sa6", "fd00::99")},
    {"Node": "dotted", "Address": "10.0.0.8", "Service": _service("dotted", Tags=["a.b"])},
    {
        "Node": "px",
        "Address": "10.0.0.5",
        "Service": _service("web-proxy", Kind="connect-proxy", Proxy={"DestinationServiceName": "web"}),
    },
    {"Node": "px", "Address": "10.0.0.5", "Service": _service("native", Connect={"Native": True})},
    {"Node": "many", "Address": "10.0.0.44", "NodeMeta": META},
]
SIX = "9.9." + "0." * 28 + "d.f.ip6.arpa"
NAMES = (
    "web.service.consul v1.web.service.consul _web._tcp.service.consul _web._v2.service.consul search.service.consul "
    "alias.service.consul nx.service.consul inner.service.consul inner2.service.consul innernx.service.consul "
    "sa.service.consul sa6.service.consul a.b.dotted.service.consul none.service.consul n1.node.consul ext.node.consul "
    "many.node.consul web.connect.consul native.connect.consul none.connect.consul consul ns.consul "
    f"0a000001.addr.consul 9.9.9.10.in-addr.arpa {SIX} 1.0.0.10.in-addr.arpa 8.8.8.8.in-addr.arpa www.example.com"
).split()
TYPES = ("A", "AAAA", "SRV", "TXT", "ANY", "CNAME", "MX", "PTR", "SOA", "NS")

NODATA_SOA = "NODATA carries the SOA (RFC 2308)"
ONLY_ASKED = "Consul answers addresses, or what it has, to questions for other types"
ALIAS_TYPE = "what stands behind an alias is asked by the type that the client asked for"
WHOLE_ALIAS = "a node that is an alias is one for every type"


def reason(name: str, qtype: str) -> str:
    """Why the answers differ, "" where they must not."""
    if name.endswith(".arpa") and qtype not in ("PTR", "ANY"):
        return ONLY_ASKED
    if name in ("search.service.consul", "alias.service.consul", "inner.service.consul", "inner2.service.consul"):
        return "" if qtype in ("A", "ANY", "SRV") else ALIAS_TYPE
    if name == "ext.node.consul":
        return "" if qtype in ("A", "ANY") else WHOLE_ALIAS
    if name.endswith(".node.consul") and qtype not in ("A", "ANY") and (name, qtype) != ("many.node.consul", "TXT"):
        return NODATA_SOA
    if name.endswith(".addr.consul") and qtype not in ("A", "ANY"):
        return ONLY_ASKED
    if qtype in ("TXT", "SOA", "NS", "PTR") and name.endswith((".service.consul", ".connect.consul")):
        return ONLY_ASKED
    if name == "ns.consul" and qtype not in ("SOA", "NS"):
        return "the name server that the SOA names has an address"
    if name == "consul" and qtype not in ("SOA", "NS"):
        return "there are names below the domain (RFC 8020)"
    return ""


class Recursor:
    """A resolver of `example.com`, in threads."""

    def __init__(self, host: str) -> None:
        self.port = free_port(host)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, self.port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, client = self._socket.recvfrom(4096)
            if not data:
                return
            question = dnslib.DNSRecord.parse(data)
            reply = question.reply(aa=0)
            name, qtype = str(question.q.qname).lower(), dnslib.QTYPE[question.q.qtype]
            if name == "alias.example.com.":
                reply.add_answer(*dnslib.RR.fromZone("alias.example.com. 0 CNAME www.example.com."))
                name = "www.example.com."
            if name == "www.example.com." and qtype == "A":
                reply.add_answer(*dnslib.RR.fromZone("www.example.com. 0 A 192.0.2.7"))
            elif name != "www.example.com.":
                reply.header.rcode = dnslib.RCODE.NXDOMAIN
            self._socket.sendto(reply.pack(), client)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.sendto(b"", self._socket.getsockname())
        self._thread.join(5)
        self._socket.close()


@pytest.fixture(scope="module")
def both(module_processes: Processes) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Where Consul's and ours listen for DNS; both know the same catalog."""
    host = new_host()
    recursor = Recursor(host)
    ours: Agent = module_processes.dev("o", f"-recursor={host}:{recursor.port}", host=host)
    ports = {name: free_port(host) for name in ("http", "dns", "server", "serf_lan", "serf_wan")}
    ports |= {"grpc": -1, "https": -1}
    theirs = Api(host, ports["http"])
    settings = {"ports": ports, "recursors": [f"{host}:{recursor.port}"], "node_name": "o"}
    module_processes.start([CONSUL, "agent", "-dev", f"-bind={host}", f"-client={host}", "-hcl", json.dumps(settings)])
    eventually("Consul leads", lambda: theirs.get("/v1/status/leader").json(), 20)
    for registration in CATALOG:
        for api in (theirs, ours.api):
            api.done("/v1/catalog/register", registration)
    eventually("DNS has all", lambda: ours.dig("many.node.consul", "TXT", tcp=True), 10)
    yield (host, ports["dns"]), (host, ours.ports.dns)
    recursor.close()


def ask(at: tuple[str, int], name: str, qtype: str) -> dict[str, Any]:
    question = dnslib.DNSRecord.question(name, qtype)
    question.header.cd = 1
    question.add_ar(dnslib.EDNS0(udp_len=4096))
    reply = dnslib.DNSRecord.parse(question.send(*at, tcp=False, timeout=5))
    header = reply.header
    return {
        "rcode": dnslib.RCODE[header.rcode],
        "flags": (header.aa, header.tc, header.rd, header.ra, header.cd if header.aa else 0),
        "answer": sorted(map(_row, reply.rr)),
        "authority": sorted(map(_row, reply.auth)),
        # Consul adds a node's metadata here, which makes answers oversize: left out for good.
        "additional": sorted(_row(rr) for rr in reply.ar if rr.rtype not in (41, 16)),
    }


def _row(rr: Any) -> str:
    data = f"{rr.rdata.mname} {rr.rdata.rname}" if rr.rtype == 6 else str(rr.rdata)
    return f"{str(rr.rname).lower()} {rr.ttl} {dnslib.QTYPE[rr.rtype]} {data}"


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_consuls_or_differs_for_a_reason(name: str, both: Any) -> None:
    consul, ours = both
    wrong = {}
    for qtype in TYPES:
        expected, found = ask(consul, name, qtype), ask(ours, name, qtype)
        if reason(name, qtype):
            assert found["rcode"] in ("NOERROR", "REFUSED", "NXDOMAIN"), (name, qtype, found)
        elif expected != found:
            wrong[qtype] = (expected, found)
    assert not wrong
