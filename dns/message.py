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
TYPE_MX, TYPE_AAAA, TYPE_SRV, TYPE_OPT, TYPE_IXFR, TYPE_AXFR, TYPE_ANY = 15, 28, 33, 41, 251, 252, 255
CLASS_IN, CLASS_ANY = 1, 255
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16

FLAG_QR, FLAG_AA, FLAG_TC, FLAG_RD, FLAG_RA, FLAG_CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0010
UDP_PLAIN_BYTES_MAX = 512
TCP_BYTES_MAX = 65535
NAME_BYTES_MAX = 255
#: What we tell clients that they may send us, and what resolvers should ask for to avoid fragments.
EDNS_ADVERTISED_BYTES = 1232
OPT_BYTES = 11
OPTION_CLIENT_SUBNET = 8

_HEADER = Struct(">HHHHH")  # flags and counts; the id is not read, only copied
_TYPE_CLASS = Struct(">HH")
_RECORD = Struct(">HHIH")
_SRV = Struct(">HHHIHHHH")
_POINTER_TO_QUESTION = b"\xc0\x0c"
_POINTER_MAX = 0x3FFF
_RECORDS_MAX = 8  # in a query: one OPT, perhaps a TSIG
#: In a recursor's answer: what is more than this is no address of a service.
ANSWERS_MAX = 256


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
    subnet: bytes = b""  # the OPT option that goes back: the client's subnet, answered for everybody (RFC 7871)

    @property
    def opcode(self) -> int:
        return (self.flags >> 11) & 15

    @property
    def labels(self) -> tuple[str, ...]:
        return labels_of(self.name)


def labels_of(name: bytes) -> tuple[str, ...]:
    """The labels of a name in wire form."""
    out, at = [], 0
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
    subnet = b""
    for _ in range(records):
        owner_end = _skip_name(packet, at)
        if owner_end is None or owner_end + 10 > len(packet):
            return _bare(packet, flags, FORMERR)
        rtype, rclass, ttl, size = _RECORD.unpack_from(packet, owner_end)
        if rtype == TYPE_OPT:
            if edns_bytes is not None or owner_end != at + 1:
                return _bare(packet, flags, FORMERR)
            edns_bytes, version, do, has_options = rclass, (ttl >> 16) & 255, bool(ttl & 0x8000), size > 0
            echo = _echo_subnet(packet[owner_end + 10 : owner_end + 10 + size]) if has_options else b""
            if echo is None:
                return _bare(packet, flags, FORMERR)
            subnet = echo
        at = owner_end + 10 + size
        if at > len(packet):
            return _bare(packet, flags, FORMERR)
    is_plain = name == lower and not has_options and records == 1 and at == len(packet)
    return Query(question, lower, qtype, qclass, flags, edns_bytes, version, do, is_plain, subnet)


def _echo_subnet(options: bytes) -> bytes | None:
    """What is answered to a client's subnet: the same with scope 0, for our answers do not depend on it.

    Empty where there is none; None where the options cannot be read (RFC 7871 §7.2.1, §7.1.1).
    """
    at, found = 0, b""
    while at < len(options):
        if at + 4 > len(options):
            return None
        code, size = _TYPE_CLASS.unpack_from(options, at)
        at += 4
        if at + size > len(options):
            return None
        if code == OPTION_CLIENT_SUBNET:
            if size < 4 or found:
                return None
            family, source = int.from_bytes(options[at : at + 2], "big"), options[at + 2]
            if source > {1: 32, 2: 128}.get(family, -1) or size != 4 + (source + 7) // 8:
                return None
            found = options[at - 4 : at + 3] + b"\0" + options[at + 4 : at + size]
        at += size
    return found


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
    return packet[:2] + _HEADER.pack(FLAG_QR | (flags & (0x7800 | FLAG_RD | FLAG_CD)) | rcode, 0, 0, 0, 0)


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


def owned_by(owner: bytes, record: Record) -> Record:
    """A record of the question's name as one of another name; what points into it is not valid any more."""
    return Record(owner + record.wire[2:], record.weight)


class Sections(NamedTuple):
    """Counts and bytes behind the question; `truncated` means that answers had to be left out."""

    counts: tuple[int, int, int]  # answer, authority, additional without OPT
    tail: bytes
    truncated: bool


def owner_is_question(rtype: int, ttl_s: int, rdata: bytes) -> bytes:
    return encode_record(_POINTER_TO_QUESTION, rtype, ttl_s, rdata)


def assemble(
    records: Sequence[Record],
    authority: Sequence[bytes],
    additional: Sequence[bytes],
    offset: int,
    room: int,
    lead: Sequence[bytes] = (),
    extras: Sequence[bytes] = (),
) -> Sections:
    """As many `records` as `room` bytes take, and their glue.

    `offset` is where the Answer section starts. `lead` stands before the records, in this order; `extras` are further
    Additional records that may be left out. When all answers fit but not all glue, glue is left out and nothing is
    truncated (RFC 2181 §9): clients ask for it separately. When answers do not fit, those that do bring their glue,
    because some clients never come back over TCP.
    """
    lead_bytes = sum(map(len, lead)) if lead else 0
    fixed = sum(map(len, authority)) + sum(map(len, additional)) + lead_bytes
    size = sum([len(r.wire) for r in records])
    whole = fixed + size <= room
    while lead and fixed > room:
        fixed -= len(lead[-1])
        lead_bytes -= len(lead[-1])
        lead, records = lead[:-1], ()
    if not whole and records:
        records = _fitting(records, room - fixed)
        size = sum([len(r.wire) for r in records])
    out = [*lead, *[r.wire for r in records]]
    out += authority
    out += additional
    left, at, more, seen = room - fixed - size, offset + lead_bytes, len(additional), set()
    for record in records:
        if record.glue and record.target not in seen:
            name_at = at + record.target_at
            owner = pointer(name_at) if name_at <= _POINTER_MAX else record.target
            left -= len(owner) + len(record.glue)
            if left < 0:
                break
            seen.add(record.target)
            out.append(owner + record.glue)
            more += 1
        at += len(record.wire)
    for extra in extras:
        left -= len(extra)
        if left < 0:
            break
        out.append(extra)
        more += 1
    return Sections((len(lead) + len(records), len(authority), more), b"".join(out), not whole)


def _fitting(records: Sequence[Record], room: int) -> Sequence[Record]:
    """The first records that fit together with their glue; or the first one alone."""
    left = room
    for count, record in enumerate(records):
        left -= len(record.wire) + (2 + len(record.glue) if record.glue else 0)
        if left < 0:
            return records[: count or int(len(record.wire) <= room)]
    return records


def encode_reply(query: Query, rcode: int, flags: int, sections: Sections) -> bytes:
    """Everything behind the id. `flags` are AA, TC and RA as they apply; RD and CD are copied from the query."""
    opt = b""
    answers, authorities, additionals = sections.counts
    if query.edns_bytes is not None:
        additionals += 1
        opt = b"\0" + _RECORD.pack(
            TYPE_OPT, EDNS_ADVERTISED_BYTES, (rcode >> 4) << 24 | (0x8000 if query.edns_do else 0), len(query.subnet)
        )
        opt += query.subnet
    header = _HEADER.pack(
        FLAG_QR | flags | (query.flags & (FLAG_RD | FLAG_CD)) | (rcode & 15), 1, answers, authorities, additionals
    )
    return header + query.question + sections.tail + opt


NOTHING = Sections((0, 0, 0), b"", False)


# -- what a recursor answered -----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A record of an Answer section: names in it are whole, those that are compared are lower case."""

    owner: bytes
    rtype: int
    ttl_s: int
    rdata: bytes


def encode_query(name: bytes, qtype: int) -> bytes:
    """A question of ours for a recursor, without the id."""
    opt = b"\0" + _RECORD.pack(TYPE_OPT, EDNS_ADVERTISED_BYTES, 0, 0)
    return _HEADER.pack(FLAG_RD, 1, 0, 0, 1) + name + _TYPE_CLASS.pack(qtype, CLASS_IN) + opt


def is_truncated(packet: bytes) -> bool:
    return bool(packet[2] & FLAG_TC >> 8)


def read_answers(packet: bytes) -> list[Found]:
    """The Answer section; what cannot be read, and what follows it, is left out."""
    found: list[Found] = []
    _, questions, answers, _, _ = _HEADER.unpack_from(packet, 2)
    at: int | None = 12
    for _ in range(questions):
        at = _skip_name(packet, at) if at is not None else None
        at = at + 4 if at is not None else None
    for _ in range(min(answers, ANSWERS_MAX)):
        named = _read_name(packet, at) if at is not None else None
        if named is None or named[1] + 10 > len(packet):
            break
        owner, at = named
        rtype, rclass, ttl_s, size = _RECORD.unpack_from(packet, at)
        at += 10
        if at + size > len(packet):
            break
        rdata = _whole_rdata(packet, rtype, at, size)
        if rclass == CLASS_IN and rdata is not None:
            found.append(Found(owner.lower(), rtype, min(ttl_s, 0x7FFFFFFF), rdata))
        at += size
    return found


#: Bytes before the names in the data of types whose names may be compressed, and how many names there are.
_NAMES_IN = {TYPE_CNAME: (0, 1), TYPE_NS: (0, 1), TYPE_PTR: (0, 1), TYPE_MX: (2, 1), TYPE_SRV: (6, 1), TYPE_SOA: (0, 2)}


def _whole_rdata(packet: bytes, rtype: int, at: int, size: int) -> bytes | None:
    if rtype in (TYPE_A, TYPE_AAAA):
        return packet[at : at + size] if size == (4 if rtype == TYPE_A else 16) else None
    if rtype not in _NAMES_IN:
        return packet[at : at + size]
    end, (before, names) = at + size, _NAMES_IN[rtype]
    out = packet[at : at + before]
    at += before
    for _ in range(names):
        named = _read_name(packet, at)
        if named is None or named[1] > end:
            return None
        out += named[0]
        at = named[1]
    return out + packet[at:end]


def _read_name(packet: bytes, at: int) -> tuple[bytes, int] | None:
    """The name at `at` without pointers, and where what follows it begins. None where it is none."""
    out, end, lowest = bytearray(), 0, at
    while at < len(packet):
        size = packet[at]
        if size >= 0xC0:
            if at + 1 >= len(packet):
                return None
            end = end or at + 2
            at = (size & 0x3F) << 8 | packet[at + 1]
            if at >= lowest:
                return None  # a pointer points back, always further: no loops
            lowest = at
            continue
        if size > 63 or at + 1 + size > len(packet) or len(out) + 1 + size > NAME_BYTES_MAX:
            return None
        out += packet[at : at + 1 + size]
        at += 1 + size
        if not size:
            return bytes(out), end or at
    return None
