"""The wire format, checked against an independent library, and packets from people who do not mean well."""

from __future__ import annotations

import struct
from typing import Any

import dnslib
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rostra.dns.message import (
    FORMERR,
    NOTHING,
    NOTIMP,
    Query,
    Record,
    assemble,
    encode_host,
    encode_name,
    encode_record,
    encode_reply,
    encode_srv_record,
    encode_txt,
    parse_query,
)

WEB = b"\x03web\x07service\x06consul\0\0\x01\0\x01"


def header(flags: int = 0x0100, qd: int = 1, an: int = 0, ns: int = 0, ar: int = 0) -> bytes:
    return struct.pack(">HHHHHH", 7, flags, qd, an, ns, ar)


def test_a_question_keeps_its_spelling_and_is_compared_without_it() -> None:
    query = parse_query(header() + b"\x03WeB\x07service\x06CONSUL\0\0\x01\0\x01")
    assert isinstance(query, Query)
    assert query.labels == ("web", "service", "consul")
    assert query.question.startswith(b"\x03WeB")
    assert not query.is_plain


def test_edns_size_version_and_do_are_read() -> None:
    opt = b"\0\0\x29\x10\0\0\x01\x80\0\0\x04\0\x0a\0\0"
    query = parse_query(header(ar=1) + WEB + opt)
    assert isinstance(query, Query)
    assert (query.edns_bytes, query.edns_version, query.edns_do, query.is_plain) == (4096, 1, True, False)


@pytest.mark.parametrize(
    ("packet", "rcode"),
    [
        (header(qd=0), FORMERR),
        (header(qd=2) + WEB + WEB, FORMERR),
        (header() + b"\x03web", FORMERR),
        (header() + b"\xc0\x0c\0\x01\0\x01", FORMERR),
        (header() + b"\x40" + b"a" * 64 + b"\0\0\x01\0\x01", FORMERR),
        (header() + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\x01\0\x01", FORMERR),
        (header() + WEB[:-1], FORMERR),
        (header(ar=1) + WEB, FORMERR),
        (header(ar=1) + WEB + b"\0\0\x29\x10\0\0\0\0\0\0\x05", FORMERR),
        (header(ar=2) + WEB + b"\0\0\x29\x10\0\0\0\0\0\0\0" * 2, FORMERR),
        (header(an=9) + WEB, FORMERR),
        (header(flags=0x0800) + WEB, NOTIMP),
        (header(flags=0x2000) + WEB, NOTIMP),
        (header(flags=0x2800), NOTIMP),
    ],
)
def test_a_malformed_packet_is_told_so_and_nothing_more(packet: bytes, rcode: int) -> None:
    answer = parse_query(packet)
    assert isinstance(answer, bytes)
    assert len(answer) == 12
    assert answer[:2] == packet[:2]
    assert answer[3] & 15 == rcode
    assert answer[2] & 0x80


@pytest.mark.parametrize("packet", [b"", b"12345", header(flags=0x8000) + WEB, header(flags=0x8180)])
def test_fragments_and_answers_get_no_answer(packet: bytes) -> None:
    assert parse_query(packet) is None


@given(st.binary(max_size=600))
@example(header() + WEB)
@example(header(ar=1) + WEB + b"\xff" * 11)
def test_no_packet_raises(packet: bytes) -> None:
    found = parse_query(packet)
    if isinstance(found, Query):
        reply = packet[:2] + encode_reply(found, 0, 0, NOTHING)
        assert reply[12 : 12 + len(found.question)] == found.question
        assert found.labels is not None
    else:
        assert found is None or len(found) == 12


@given(st.lists(st.from_regex(r"[a-zA-Z0-9_-]{1,63}", fullmatch=True), min_size=1, max_size=3), st.integers(0, 65535))
def test_what_the_library_asks_is_what_we_read(labels: Any, qtype: int) -> None:
    record = dnslib.DNSRecord(q=dnslib.DNSQuestion(".".join(labels), qtype))
    query = parse_query(bytes(record.pack()))
    assert isinstance(query, Query)
    assert query.labels == tuple(label.lower() for label in labels)
    assert query.qtype == qtype


def srv(n: int) -> Record:
    target = encode_host(f"node-{n}.node.dc1.consul")
    wire = encode_srv_record(0, 1, 1, 8000 + n, target)
    return Record(wire, 1, target, len(wire) - len(target), encode_record(b"", 1, 0, bytes([10, 0, n >> 8, n & 255])))


def read(records: list[Record], room: int) -> Any:
    query = parse_query(header() + WEB)
    assert isinstance(query, Query)
    offset = 12 + len(query.question)
    sections = assemble(records, (), (), offset, room)
    assert len(sections.tail) <= room
    return dnslib.DNSRecord.parse(header()[:2] + encode_reply(query, 0, 0, sections)), sections


def test_glue_points_at_the_target_that_it_belongs_to() -> None:
    reply, sections = read([srv(n) for n in range(20)], 4000)
    assert not sections.truncated
    assert [str(rr.rname) for rr in reply.ar] == [str(rr.rdata.target) for rr in reply.rr]


def test_glue_beyond_the_reach_of_pointers_is_spelled_out() -> None:
    reply, sections = read([srv(n) for n in range(700)], 65000)
    assert not sections.truncated
    assert [str(rr.rname) for rr in reply.ar] == [str(rr.rdata.target) for rr in reply.rr]


def test_glue_gives_way_before_answers_do_and_that_is_no_truncation() -> None:
    records = [srv(n) for n in range(20)]
    answers_only = sum(len(r.wire) for r in records)
    reply, sections = read(records, answers_only + 40)
    assert (len(reply.rr), len(reply.ar), sections.truncated) == (20, 2, False)


def test_answers_that_do_not_fit_are_cut_with_their_glue() -> None:
    reply, sections = read([srv(n) for n in range(20)], 500)
    assert sections.truncated
    assert 0 < len(reply.rr) < 20
    assert len(reply.ar) == len(reply.rr)


@given(st.integers(0, 60), st.integers(0, 3000))
def test_a_reply_never_exceeds_its_room(count: int, room: int) -> None:
    _, sections = read([srv(n) for n in range(count)], room)
    assert sections.truncated == (sections.counts[0] < count)


def test_two_instances_on_one_node_share_their_glue() -> None:
    one, other = srv(1), srv(1)
    reply, _ = read([one, other], 4000)
    assert len(reply.ar) == 1


@pytest.mark.parametrize("labels", [("",), ("x" * 64,), ("x" * 63,) * 4, ("é" * 32,)])
def test_a_name_that_dns_cannot_carry_is_refused(labels: Any) -> None:
    with pytest.raises(ValueError):
        encode_name(labels)


def test_a_long_text_is_cut_into_strings_of_255_bytes() -> None:
    assert encode_txt("x" * 300) == b"\xff" + b"x" * 255 + b"\x2d" + b"x" * 45
    assert encode_txt("") == b"\0"
