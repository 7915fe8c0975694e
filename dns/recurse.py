"""Other people's names, asked of the configured recursors in order. Small on purpose: no cache.

A client's query is passed on as it is; what our own answers lack (`alias.py`) is asked in one of ours. Each goes out
under a fresh random id from a fresh random port. An answer counts only if it comes from that recursor with that id and
that question (RFC 5452). Bounded in flight; answers keep the client's own id.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from rostra.dns.alias import Ask
from rostra.dns.message import Found, Query, encode_query, is_truncated, parse_query, read_answers

IN_FLIGHT_MAX = 256
TIMEOUT_S = 2.0


def parse_recursor(text: str) -> tuple[str, int]:
    """`8.8.8.8`, `8.8.8.8:5353`, `fd00::1`, `[fd00::1]:53` → (host, port). Raises ValueError."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        return host, int(rest[1:]) if rest else 53
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return host, int(port)
    return text, 53


class Recursor:
    """`ask` gives the recursor's answer, or None where none of them answered in time."""

    def __init__(self, recursors: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> None:
        self._recursors = [parse_recursor(r) for r in recursors]
        self._timeout_s = timeout_s
        self._in_flight = 0

    @property
    def has_room(self) -> bool:
        return self._in_flight < IN_FLIGHT_MAX

    def close(self) -> None:
        self._recursors = []

    async def ask(self, packet: bytes, *, tcp: bool) -> bytes | None:
        self._in_flight += 1
        try:
            for address in self._recursors:
                question = secrets.token_bytes(2) + packet[2:]
                try:
                    async with asyncio.timeout(self._timeout_s):
                        answer = await (_ask_tcp if tcp else _ask_udp)(address, question)
                except (OSError, TimeoutError, asyncio.IncompleteReadError):
                    continue
                return packet[:2] + answer[2:]
            return None
        finally:
            self._in_flight -= 1

    async def look_up(self, ask: Ask) -> list[Found]:
        """The records of an answer to a question of ours; none where nobody gave one."""
        if not self.has_room:
            return []
        packet = b"\0\0" + encode_query(ask.name, ask.qtype)
        answer = await self.ask(packet, tcp=False)
        if answer is not None and is_truncated(answer):
            answer = await self.ask(packet, tcp=True)
        return read_answers(answer) if answer is not None else []


def is_answer_to(question: bytes, answer: bytes) -> bool:
    query = parse_query(question)
    if not isinstance(query, Query) or len(answer) < 12 or answer[:2] != question[:2] or not answer[2] & 0x80:
        return False
    name, rest = query.name, query.question[len(query.name) :]
    asked = answer[12 : 12 + len(query.question)]
    # An answer that repeats no question is of no use against spoofing (RFC 5452 §9.1).
    return answer[4:6] == b"\0\1" and asked[: len(name)].lower() == name and asked[len(name) :] == rest


class _Exchange(asyncio.DatagramProtocol):
    def __init__(self, question: bytes) -> None:
        self._question = question
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if not self.answer.done() and is_answer_to(self._question, data):
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _ask_udp(address: tuple[str, int], question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_datagram_endpoint(lambda: _Exchange(question), remote_addr=address)
    try:
        transport.sendto(question)
        return await exchange.answer
    finally:
        exchange.answer.cancel()
        transport.close()


async def _ask_tcp(address: tuple[str, int], question: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(len(question).to_bytes(2, "big") + question)
        answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        if not is_answer_to(question, answer):
            raise OSError("the recursor answered another question")
        return answer
    finally:
        writer.close()
