"""Where an alias leads: the CNAMEs in between and the records at the end, from our own zone and from recursors. Pure.

A service or node whose address is a host name answers with a CNAME. A stub resolver wants the address behind it in the
same answer. A recursor's answer is used as far as it belongs to the alias: the names on the way, nothing else.
Bounded: so many names on the way, each name once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rostra.dns.message import (
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    TYPE_CNAME,
    Found,
    Record,
    encode_record,
    owned_by,
    owner_is_question,
    pointer,
)

NAMES_MAX = 8
#: Addresses of one name in Additional: others have names, too.
GLUE_MAX = 16


class Ask(NamedTuple):
    """A name and a type: the key of what recursors are asked and have answered."""

    name: bytes
    qtype: int


#: Answers of recursors by question; one that did not answer has none.
Known = Mapping[Ask, Sequence[Found]]


class Step(NamedTuple):
    """One CNAME; its owner is the question, or the target of the one before."""

    ttl_s: int
    target: bytes


class Trail(NamedTuple):
    """`records` are of the last step's target, though their owner still says "the question"."""

    steps: list[Step]
    records: Sequence[Record]


def follow(
    question: bytes,
    first: Step,
    qtype: int,
    own: Callable[[bytes, int], Trail | Any | None],
    known: Known | None,
    *,
    may_ask: bool,
) -> Trail | Ask | Any:
    """The whole trail; or what to ask a recursor for; or what `own` waits for.

    `own(name, qtype)` gives a Trail for a name of our zones, None for another; anything else is passed on.
    `may_ask` False: what is not known yet stays unknown.
    """
    if qtype == TYPE_ANY:
        qtype = TYPE_A  # as Consul: whoever asks for anything gets an address
    steps, seen = [first], {question}
    while True:
        name = steps[-1].target.lower()
        if name in seen or len(seen) >= NAMES_MAX:
            return Trail(steps, ())  # a loop, or as good as one
        seen.add(name)
        trail = own(name, qtype)
        if trail is None:
            ask = Ask(name, qtype)
            if known is None or ask not in known:
                return ask if may_ask else Trail(steps, ())
            trail = _within(known[ask], ask, seen)
        if not isinstance(trail, Trail):
            return trail
        steps += trail.steps
        if trail.records or not trail.steps:
            return Trail(steps, trail.records)


def _within(found: Sequence[Found], ask: Ask, seen: set[bytes]) -> Trail:
    """What an answer says about the name that was asked for, along its own CNAMEs."""
    aliases = {f.owner: Step(f.ttl_s, f.rdata) for f in found if f.rtype == TYPE_CNAME}
    name, steps = ask.name, list[Step]()
    while (step := aliases.get(name)) is not None and len(seen) < NAMES_MAX:
        steps.append(step)
        name = step.target.lower()
        if name in seen:
            return Trail(steps, ())
        seen.add(name)
    records = [
        Record(owner_is_question(f.rtype, f.ttl_s, f.rdata)) for f in found if (f.owner, f.rtype) == (name, ask.qtype)
    ]
    if steps and not records:
        seen.discard(name)  # whoever goes on from here looks at that name first
    return Trail(steps, records)


def place(trail: Trail, offset: int) -> tuple[list[bytes], list[Record]]:
    """The CNAMEs, and the records as those of the last name, in an Answer section that begins at `offset`."""
    owner, lead = pointer(12), list[bytes]()
    for step in trail.steps:
        wire = encode_record(owner, TYPE_CNAME, step.ttl_s, step.target)
        lead.append(wire)
        owner = pointer(offset + len(wire) - len(step.target))
        offset += len(wire)
    return lead, [owned_by(owner, record) for record in trail.records]


def spell_out(trail: Trail, target: bytes) -> list[bytes]:
    """A trail that begins at `target`, as records that can stand anywhere."""
    out, owner = list[bytes](), target
    for step in trail.steps[1:]:
        out.append(encode_record(owner, TYPE_CNAME, step.ttl_s, step.target))
        owner = step.target
    out += [owned_by(owner, r).wire for r in trail.records[:GLUE_MAX] if r.wire[2:4] in _ADDRESS_TYPES]
    return out


_ADDRESS_TYPES = (TYPE_A.to_bytes(2, "big"), TYPE_AAAA.to_bytes(2, "big"))
