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
    read_answers,
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


# -- what a recursor answered -----------------------------------------------------------------------------------------


def test_names_in_a_recursors_records_are_read_whole_whatever_they_point_to() -> None:
    reply = dnslib.DNSRecord.question("Www.example.com", "ANY").reply()
    zone = [
        "www.example.com. 5 A 192.0.2.1",
        "www.example.com. 5 AAAA 2001:db8::1",
        "www.example.com. 5 MX 10 mail.example.com.",
        'www.example.com. 5 TXT "a text"',
        "alias.example.com. 5 CNAME www.example.com.",
        "_x._tcp.example.com. 5 SRV 1 2 3 www.example.com.",
        "example.com. 5 SOA ns.example.com. host.example.com. 1 2 3 4 5",
    ]
    for line in zone:
        reply.add_answer(*dnslib.RR.fromZone(line))
    packed = bytes(reply.pack())
    found = read_answers(packed)
    assert len(found) == 7
    again = dnslib.DNSRecord(dnslib.DNSHeader(qr=1, aa=1))
    again.header.a = 7
    buffer = bytes(again.pack()) + b"".join(encode_record(f.owner, f.rtype, f.ttl_s, f.rdata) for f in found)
    read_again = dnslib.DNSRecord.parse(buffer[:6] + b"\0\7" + buffer[8:])
    assert sorted(map(str, read_again.rr)) == sorted(map(str, dnslib.DNSRecord.parse(packed).rr))


@given(st.binary(max_size=400))
def test_no_answer_of_a_recursor_raises(junk: bytes) -> None:
    for packet in (b"\0" * 12 + junk, b"\0\0\x81\x80\0\1\0\x09\0\0\0\0" + WEB + junk, junk.ljust(12, b"\0")):
        for found in read_answers(packet):
            assert len(found.owner) <= 255


def test_pointers_that_run_in_circles_end() -> None:
    head = b"\0\0\x81\x80\0\0\0\1\0\0\0\0"
    for circle in (b"\xc0\x0c", b"\xc0\x0e\xc0\x0c", b"\1a\xc0\x0c", b"\xff\xff"):
        assert read_answers(head + circle + b"\0\1\0\1\0\0\0\0\0\4\1\2\3\4") == []


# -- EDNS client subnet (RFC 7871) ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "echo"),
    [
        ("0001 18 00 010203", "0001 18 00 010203"),
        ("0001 18 18 010203", "0001 18 00 010203"),
        ("0001 20 00 01020304", "0001 20 00 01020304"),
        ("0002 38 00 20010db8000000", "0002 38 00 20010db8000000"),
        ("0001 00 00", "0001 00 00"),
        ("", None),
        ("0001 18", None),
        ("0001 18 00 0102", None),
        ("0001 18 00 01020304", None),
        ("0001 21 00 0102030405", None),
        ("0003 08 00 01", None),
    ],
)
def test_a_clients_subnet_comes_back_with_scope_0_or_is_malformed(option: str, echo: str | None) -> None:
    data = bytes.fromhex(option)
    options = b"\0\x0a\0\2xy" + b"\0\x08" + len(data).to_bytes(2, "big") + data
    packet = header(ar=1) + WEB + b"\0\0\x29\x10\0\0\0\0\0" + len(options).to_bytes(2, "big") + options
    query = parse_query(packet)
    if echo is None:
        assert isinstance(query, bytes)
        assert query[3] & 15 == 1
        return
    assert isinstance(query, Query)
    reply = dnslib.DNSRecord.parse(packet[:2] + encode_reply(query, 0, 0, assemble([], (), (), 0, 400)))
    assert [(o.code, o.data.hex()) for o in reply.ar[0].rdata] == [(8, echo.replace(" ", ""))]


def test_the_checking_disabled_bit_is_copied() -> None:
    packet = header() + WEB
    packet = packet[:3] + bytes([packet[3] | 0x10]) + packet[4:]
    query = parse_query(packet)
    assert isinstance(query, Query)
    assert encode_reply(query, 0, 0, assemble([], (), (), 0, 400))[1] & 0x10
    assert not encode_reply(parse_query(header() + WEB), 0, 0, assemble([], (), (), 0, 400))[1] & 0x10  # type: ignore[arg-type]
