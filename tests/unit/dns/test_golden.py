"""Our answers beside those of Consul 1.8.7 to the same questions over the same catalog; every difference is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dnslib
import pytest

GOLDEN = json.loads(Path(__file__).with_name("consul_answers.json").read_text())

EMPTY_NAME = "the name has others below it: NODATA, or resolvers that minimise names would stop here (RFC 8020)"
#: (name, type) → why we answer otherwise. What we answer instead is asserted in test_resolver.py.
DIFFERENT = {
    ("web.service.consul.", "TXT"): "Consul answers addresses to a question for TXT",
    ("web.service.consul.", "SOA"): "Consul answers the apex's SOA under another name; we say NODATA",
    ("consul.", "A"): EMPTY_NAME,
    ("service.consul.", "A"): EMPTY_NAME,
    ("node.consul.", "A"): EMPTY_NAME,
    ("dc1.consul.", "A"): EMPTY_NAME,
    ("web.service.dc1.dc.consul.", "A"): "later versions know <dc>.dc",
    ("n1.node.consul.", "SRV"): "NODATA carries the SOA (RFC 2308)",
    ("n1.node.consul.", "AAAA"): "NODATA carries the SOA (RFC 2308)",
    ("n7.node.consul.", "A"): "NODATA carries the SOA (RFC 2308)",
    ("n6.node.consul.", "CNAME"): "the CNAME that A gives is there when asked for by type too",
    ("0a000001.addr.dc1.consul.", "AAAA"): "Consul answers A to a question for AAAA",
    ("fd000000000000000000000000000004.addr.dc1.consul.", "A"): "Consul answers AAAA to a question for A",
    ("0a0000.addr.dc1.consul.", "A"): "not an address: NXDOMAIN",
    ("99.0.0.10.in-addr.arpa.", "PTR"): "not ours and nobody to ask: REFUSED, not SERVFAIL",
    ("foo.in-addr.arpa.", "PTR"): "not ours and nobody to ask: REFUSED, not SERVFAIL",
    ("consul.", "AXFR"): "REFUSED, not NOTIMP",
}


def row(rr: Any) -> list[Any]:
    data = str(rr.rdata) if rr.rtype != 6 else f"{rr.rdata.mname} {rr.rdata.rname}"
    return [str(rr.rname).lower(), dnslib.QTYPE[rr.rtype], rr.ttl, data]


@pytest.fixture
def oracle_catalog(catalog: Any) -> Any:
    for c in GOLDEN["catalog"]:
        catalog.add_node(c["node"], c["address"], **c["meta"])
        catalog.add(
            c["service"],
            c["node"],
            c["address"],
            address=c["service_address"],
            port=c["port"],
            tags=c["tags"],
            status=c["status"],
            weight_passing=c["weights"][0],
            weight_warning=c["weights"][1],
        )
    catalog.add_node("o", "127.0.0.36")
    catalog.add("consul", "o", "127.0.0.36", port=8300)
    return catalog


@pytest.mark.parametrize("golden", GOLDEN["answers"], ids=lambda g: " ".join(g["question"]))
def test_an_answer_is_consuls_or_differs_for_a_reason(golden: Any, oracle_catalog: Any, asking: Any) -> None:
    name, qtype = golden["question"]
    ours = asking(oracle_catalog).ask(name, qtype, edns=4096, rd=0)
    found = {
        "question": [name, qtype],
        "rcode": dnslib.RCODE[ours.header.rcode],
        "aa": ours.header.aa,
        "answer": sorted(row(rr) for rr in ours.rr),
        "authority": sorted(row(rr) for rr in ours.auth),
        # Consul adds a node's metadata here, which makes answers oversize: left out for good.
        "additional": sorted(row(rr) for rr in ours.ar if rr.rtype != 41),
    }
    expected = golden | {"additional": [r for r in golden["additional"] if r[1] != "TXT"]}
    if (name, qtype) in DIFFERENT:
        assert found != expected, "no longer different: take it off the list"
    else:
        assert found == expected
