"""The wire format (RFC 1035, 6891): a packet → Query, records → bytes. Pure; never raises on what a peer sent.

Answers are assembled from ready-made records. Their owner is a pointer to the question (offset 12), which is copied
from the packet, so one encoding serves every spelling of the name. Targets of SRV records are never compressed:
RFC 2782 forbids it and Go's resolver refuses it; their addresses in Additional point back into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

TYPE_A, TYPE_NS, TYPE_CNAME, TYPE_SOA, TYPE_PTR, TYPE_TXT = 1, 2, 5, 6, 12, 16
TYPE_AAAA, TYPE_SRV, TYPE_OPT, TYPE_IXFR, TYPE_AXFR, TYPE_ANY = 28, 33, 41, 251, 252, 255
CLASS_IN, CLASS_ANY = 1, 255
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16

FLAG_QR, FLAG_AA, FLAG_TC, FLAG_RD, FLAG_RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
UDP_PLAIN_BYTES_MAX = 512
TCP_BYTES_MAX = 65535
NAME_BYTES_MAX = 255
#: What we tell clients that they may send us, and what resolvers should ask for to avoid fragments.
EDNS_ADVERTISED_BYTES = 1232
OPT_BYTES = 11

_HEADER = Struct(">HHHHH")  # flags and counts; the id is not read, only copied
_TYPE_CLASS = Struct(">HH")
_RECORD = Struct(">HHIH")
_SRV = Struct(">HHHIHHHH")
_POINTER_TO_QUESTION = b"\xc0\x0c"
_POINTER_MAX = 0x3FFF
_RECORDS_MAX = 8  # in a query: one OPT, perhaps a TSIG


class Query(NamedTuple):
    """A well-formed question. `question` are its bytes as sent; `edns_bytes` is None without EDNS."""

    question: bytes
    name: bytes  # wire form, lower case, with the root's zero
    qtype: int
    qclass: int
    flags: int
    edns_bytes: int | None
    edns_version: int
    edns_do: bool
    is_plain: bool  # nothing in it varies between queries of one client: worth remembering byte by byte

    @property
    def opcode(self) -> int:
        return (self.flags >> 11) & 15

    @property
    def labels(self) -> tuple[str, ...]:
        name, out, at = self.name, [], 0
        while name[at]:
            out.append(name[at + 1 : at + 1 + name[at]].decode("latin-1"))
            at += 1 + name[at]
        return tuple(out)


def parse_query(packet: bytes) -> Query | bytes | None:
    """The question; or the answer to a packet that is none; or None where silence is right."""
    if len(packet) < 12:
        return None
    flags, questions, answers, authorities, additionals = _HEADER.unpack_from(packet, 2)
    if flags & FLAG_QR:
        return None  # answering answers makes loops
    opcode = (flags >> 11) & 15
    if opcode:
        return _bare(packet, flags, NOTIMP)
    records = answers + authorities + additionals
    end = _skip_question_name(packet)
    if questions != 1 or end is None or records > _RECORDS_MAX:
        return _bare(packet, flags, FORMERR)
    question_end = end + 4
    qtype, qclass = _TYPE_CLASS.unpack_from(packet, end)
    name = packet[12:end]
    lower = name.lower()  # length bytes are at most 63, below every letter
    question = packet[12:question_end]
    if not records:
        is_plain = name == lower and len(packet) == question_end
        return Query(question, lower, qtype, qclass, flags, None, 0, False, is_plain)

    at, edns_bytes, version, do, has_options = question_end, None, 0, False, False
    for _ in range(records):
        owner_end = _skip_name(packet, at)
        if owner_end is None or owner_end + 10 > len(packet):
            return _bare(packet, flags, FORMERR)
        rtype, rclass, ttl, size = _RECORD.unpack_from(packet, owner_end)
        if rtype == TYPE_OPT:
            if edns_bytes is not None or owner_end != at + 1:
                return _bare(packet, flags, FORMERR)
            edns_bytes, version, do, has_options = rclass, (ttl >> 16) & 255, bool(ttl & 0x8000), size > 0
        at = owner_end + 10 + size
        if at > len(packet):
            return _bare(packet, flags, FORMERR)
    is_plain = name == lower and not has_options and records == 1 and at == len(packet)
    return Query(question, lower, qtype, qclass, flags, edns_bytes, version, do, is_plain)


def _skip_question_name(packet: bytes) -> int | None:
    """The offset behind the question's name, where type and class follow; None if there is no such thing."""
    at, last = 12, min(len(packet) - 5, 12 + NAME_BYTES_MAX - 1)
    while at <= last:
        size = packet[at]
        if size == 0:
            return at + 1
        if size > 63:
            return None  # a pointer: nothing stands before the question that it could point to
        at += 1 + size
    return None


def _skip_name(packet: bytes, at: int) -> int | None:
    while at < len(packet):
        size = packet[at]
        if size == 0:
            return at + 1
        if size >= 0xC0:
            return at + 2
        if size > 63:
            return None
        at += 1 + size
    return None


def _bare(packet: bytes, flags: int, rcode: int) -> bytes:
    """An answer without any section, for a packet whose question cannot be repeated."""
    return packet[:2] + _HEADER.pack(FLAG_QR | (flags & 0x7900) | rcode, 0, 0, 0, 0)


# -- records ------------------------------------------------------------------------------------------------------


def encode_labels(labels: Sequence[str]) -> bytes:
    """Wire form without the root at its end. Raises ValueError where a label is too long, or empty."""
    out = b""
    for label in labels:
        raw = label.encode()
        if not 0 < len(raw) <= 63:
            raise ValueError(f"label {label!r} cannot stand in a DNS name")
        out += bytes((len(raw),)) + raw
    return out


def encode_name(labels: Sequence[str]) -> bytes:
    """Uncompressed wire form. Raises ValueError where a label or the whole is too long, or empty."""
    name = encode_labels(labels) + b"\0"
    if len(name) > NAME_BYTES_MAX:
        raise ValueError(f"name of more than {NAME_BYTES_MAX} bytes")
    return name


def encode_host(host: str) -> bytes:
    """A host name written with dots, as `encode_name` gives it."""
    return encode_name(host.rstrip(".").split("."))


def encode_record(owner: bytes, rtype: int, ttl_s: int, rdata: bytes) -> bytes:
    return owner + _RECORD.pack(rtype, CLASS_IN, ttl_s, len(rdata)) + rdata


def encode_srv_record(ttl_s: int, priority: int, weight: int, port: int, target: bytes) -> bytes:
    """An SRV record of the question's name."""
    return _SRV.pack(0xC00C, TYPE_SRV, CLASS_IN, ttl_s, 6 + len(target), priority, weight, port) + target


def encode_txt(text: str) -> bytes:
    """Character strings of at most 255 bytes each."""
    raw = text.encode()
    return b"".join(bytes([len(part)]) + part for part in (raw[at : at + 255] for at in range(0, len(raw) or 1, 255)))


def pointer(offset: int) -> bytes:
    return (0xC000 | offset).to_bytes(2, "big")


class Record(NamedTuple):
    """One record of the Answer section, ready to be sent.

    `glue` follows `target` (a name) in Additional; `target_at` is where in `wire` that name stands, so that the glue's
    owner can point to it.
    """

    wire: bytes
    weight: int = 1
    target: bytes = b""
    target_at: int = 0
    glue: bytes = b""  # type, class, TTL and address, without the owner


class Sections(NamedTuple):
    """Counts and bytes behind the question; `truncated` means that answers had to be left out."""

    counts: tuple[int, int, int]  # answer, authority, additional without OPT
    tail: bytes
    truncated: bool


def owner_is_question(rtype: int, ttl_s: int, rdata: bytes) -> bytes:
    return encode_record(_POINTER_TO_QUESTION, rtype, ttl_s, rdata)


def assemble(
    records: Sequence[Record], authority: Sequence[bytes], additional: Sequence[bytes], offset: int, room: int
) -> Sections:
    """As many `records` as `room` bytes take, and their glue.

    `offset` is where the Answer section starts. When all answers fit but not all glue, glue is left out and nothing is
    truncated (RFC 2181 §9): clients ask for it separately. When answers do not fit, those that do bring their glue,
    because some clients never come back over TCP.
    """
    fixed = sum(map(len, authority)) + sum(map(len, additional))
    size = sum([len(r.wire) for r in records])
    whole = fixed + size <= room
    if not whole:
        records = _fitting(records, room - fixed)
        size = sum([len(r.wire) for r in records])
    out = [r.wire for r in records]
    out += authority
    out += additional
    left, at, extras, seen = room - fixed - size, offset, len(additional), set()
    for record in records:
        if record.glue and record.target not in seen:
            name_at = at + record.target_at
            owner = pointer(name_at) if name_at <= _POINTER_MAX else record.target
            left -= len(owner) + len(record.glue)
            if left < 0:
                break
            seen.add(record.target)
            out.append(owner + record.glue)
            extras += 1
        at += len(record.wire)
    return Sections((len(records), len(authority), extras), b"".join(out), not whole)


def _fitting(records: Sequence[Record], room: int) -> Sequence[Record]:
    """The first records that fit together with their glue; or the first one alone."""
    left = room
    for count, record in enumerate(records):
        left -= len(record.wire) + (2 + len(record.glue) if record.glue else 0)
        if left < 0:
            return records[: count or int(len(record.wire) <= room)]
    return records


def encode_reply(query: Query, rcode: int, flags: int, sections: Sections) -> bytes:
    """Everything behind the id. `flags` are AA, TC and RA as they apply; RD is copied from the query."""
    opt = b""
    answers, authorities, additionals = sections.counts
    if query.edns_bytes is not None:
        additionals += 1
        opt = b"\0" + _RECORD.pack(
            TYPE_OPT, EDNS_ADVERTISED_BYTES, (rcode >> 4) << 24 | (0x8000 if query.edns_do else 0), 0
        )
    header = _HEADER.pack(
        FLAG_QR | flags | (query.flags & FLAG_RD) | (rcode & 15), 1, answers, authorities, additionals
    )
    return header + query.question + sections.tail + opt


NOTHING = Sections((0, 0, 0), b"", False)
