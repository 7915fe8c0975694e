"""Hostile DNS packets: mutated queries, names that nobody has, and answers that no recursor gave.

Seeds come from the clock and are printed; `ROSTRA_SEED=` repeats a run.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import dnslib
import pytest

from rostra.dns.alias import Ask
from rostra.dns.message import encode_host
from rostra.dns.recurse import Recursor
from tests.support.dns_floods import AAAA, ANY, SRV, TXT, A, encode_name, framed, query
from tests.support.processes import Agent, Processes, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NAMES = [
    "web.service.consul",
    "_web._tcp.service.consul",
    "packets.node.consul",
    "consul",
    "1.0.0.10.in-addr.arpa",
    "x",
]
TYPES = [A, TXT, AAAA, SRV, ANY, 2, 5, 6, 12, 15, 252]


@pytest.fixture(scope="module")
def agent(module_processes: Processes) -> Agent:
    agent = module_processes.dev("packets")
    service = {"Service": "web", "Address": "10.0.0.1", "Port": 80}
    agent.api.done("/v1/catalog/register", {"Node": "far", "Address": "10.9.9.9", "Service": service})
    eventually("DNS has it", lambda: agent.dig("web.service.consul") == ["10.0.0.1"], 10)
    return agent


def _seed() -> int:
    seed = int(os.environ.get("ROSTRA_SEED") or time.time_ns() % 1_000_000_007)
    print(f"ROSTRA_SEED={seed}")
    return seed


def mutated(chance: random.Random) -> bytes:
    """A query with some of its bytes changed, cut, doubled or exchanged for those of another one."""
    packet = bytearray(
        query(chance.choice(NAMES), chance.choice(TYPES), edns=chance.choice((0, 0, 512, 1232, 4096, 65535)))
    )
    if chance.random() < 0.3:
        size = chance.randrange(20)
        option = chance.choice((8, 10, 3)).to_bytes(2, "big") + size.to_bytes(2, "big") + chance.randbytes(size)
        packet += b"\0\0\x29\x10\0\0\0\0\0" + len(option).to_bytes(2, "big") + option
        packet[11] = chance.choice((1, 2, 9))
    for _ in range(chance.choice((0, 1, 1, 2, 4, 16))):
        at = chance.randrange(len(packet))
        match chance.randrange(5):
            case 0:
                packet[at] = chance.randrange(256)
            case 1:
                packet[at] ^= 1 << chance.randrange(8)
            case 2:
                del packet[at : at + chance.randrange(1, 8)]
            case 3:
                packet[at:at] = chance.randbytes(chance.randrange(1, 64))
            case 4:
                packet[at : at + 2] = b"\xc0" + bytes([chance.randrange(64)])
        if not packet:
            return b""
    return bytes(packet)


def assert_whole(reply: bytes) -> None:
    """Its counts are those of what follows, to the last byte. (dnslib refuses labels of other bytes than text.)"""
    questions, *records = (int.from_bytes(reply[at : at + 2], "big") for at in (4, 6, 8, 10))
    at = 12

    def skip_name() -> int:
        here = at
        while reply[here]:
            if reply[here] >= 0xC0:
                assert (reply[here] & 0x3F) << 8 | reply[here + 1] < here
                return here + 2
            assert reply[here] < 64
            here += 1 + reply[here]
        return here + 1

    for _ in range(questions):
        at = skip_name() + 4
    for _ in range(sum(records)):
        at = skip_name()
        at += 10 + int.from_bytes(reply[at + 8 : at + 10], "big")
    assert at == len(reply)


def _probe(udp: socket.socket, probe: bytes) -> None:
    """The right answer to a right question, and before it whatever else there is: each reply is whole."""
    for _ in range(5):  # datagrams may be lost
        udp.send(probe)
        try:
            while True:
                reply = udp.recv(65535)
                assert reply[2] & 0x80
                assert len(reply) <= 4096
                assert_whole(reply)
                if reply[:2] == probe[:2] and reply[-15:-11] == b"\x0a\0\0\1":
                    break
            udp.setblocking(False)
            while udp.recv(65535):
                pass
        except BlockingIOError:
            udp.settimeout(3)
            return
        except TimeoutError:
            continue
    raise AssertionError("the agent does not answer")


def _attack(agent: Agent, count: int) -> None:
    """All replies can be read; and after each hundred the agent still answers."""
    chance = random.Random(_seed())
    probe = query("web.service.consul", qid=0xBEEF, edns=4096)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(3)
        udp.connect((agent.host, agent.ports.dns))
        for n in range(count):
            packet = mutated(chance)
            udp.send(packet)
            if n % 100 == 99:
                _probe(udp, probe)
            if n % 500 == 499:
                with socket.create_connection((agent.host, agent.ports.dns), timeout=10) as tcp:
                    tcp.sendall(framed(packet) + chance.randbytes(50))
    assert "failed" not in agent.process.log
    assert "Traceback" not in agent.process.log
    assert agent.dig("web.service.consul", tcp=True) == ["10.0.0.1"]


def test_no_mutated_packet_stops_the_agent_or_gets_a_reply_that_cannot_be_read(agent: Agent) -> None:
    _attack(agent, 4000)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_mutated_packet_of_500_000_stops_the_agent(agent: Agent) -> None:
    _attack(agent, 500_000)


def _ask_names(agent: Agent, count: int) -> None:
    def asked_of_servers() -> float:
        found = {g["Name"]: g["Value"] for g in agent.api.get("/v1/agent/metrics").json()["Gauges"]}
        return float(found["consul.server.counts.reads"] + found["consul.server.counts.watches_opened"])

    chance = random.Random(_seed())
    agent.dig("9.9.9.9.in-addr.arpa", "PTR")  # the watch of addresses, once
    forms: list[Callable[[str], str]] = [
        lambda label: f"{label}.service.consul",
        lambda label: f"{label}.web.service.consul",
        lambda label: f"{label}.node.consul",
        lambda label: f"{label}.connect.consul",
        lambda label: f"_{label}._tcp.service.consul",
        lambda label: ".".join(str(int(label[n : n + 2], 16)) for n in range(0, 8, 2)) + ".in-addr.arpa",
    ]
    before = asked_of_servers()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(10)
        udp.connect((agent.host, agent.ports.dns))
        for _ in range(count // 50):
            for _ in range(50):
                udp.send(query(chance.choice(forms)(f"{chance.getrandbits(64):016x}"), chance.choice((A, SRV, 12))))
            for _ in range(50):
                assert udp.recv(4096)[3] & 15 in (3, 5)
    assert asked_of_servers() - before < count / 300  # the agent itself asks them something now and then


def test_random_names_cost_the_servers_nothing(agent: Agent) -> None:
    _ask_names(agent, 3000)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_100_000_random_names_cost_the_servers_nothing(agent: Agent) -> None:
    _ask_names(agent, 100_000)


# -- answers that no recursor gave ----------------------------------------------------------------------------------


class _Liar(asyncio.DatagramProtocol):
    """A recursor whose truth comes last: first come answers as somebody who cannot see the question would send them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []  # (id, port)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        question = dnslib.DNSRecord.parse(data)
        qid = question.header.id
        self.seen.append((qid, addr[1]))
        lie = _reply(question, "203.0.113.66")
        stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        stranger.sendto(lie, addr)  # right in every way, but for who sends it
        stranger.close()
        self.transport.sendto(((qid + 1) & 0xFFFF).to_bytes(2, "big") + lie[2:], addr)
        other = dnslib.DNSRecord.question("other.example.com")
        other.header.id = qid
        self.transport.sendto(_reply(other, "203.0.113.66"), addr)
        no_question = lie[:4] + b"\0\0" + lie[6:12] + lie[12 + len(encode_name("www.example.com")) + 4 :]
        self.transport.sendto(no_question, addr)
        self.transport.sendto(data, addr)  # the question itself
        self.transport.sendto(lie[:7], addr)
        self.transport.sendto(_reply(question, "192.0.2.1"), addr)


def _reply(question: Any, address: str) -> bytes:
    reply = question.reply()
    reply.add_answer(*dnslib.RR.fromZone(f"{question.q.qname} 60 A {address}"))
    return bytes(reply.pack())


async def _spoof(rounds: int) -> None:
    loop = asyncio.get_running_loop()
    transport, liar = await loop.create_datagram_endpoint(_Liar, local_addr=("127.0.0.1", 0))
    recursor = Recursor([f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"], timeout_s=5)
    name = encode_host("www.example.com")
    for n in range(rounds):
        if n % 2:
            found = await recursor.look_up(Ask(name, A))
            assert [f.rdata for f in found] == [socket.inet_aton("192.0.2.1")]
        else:
            answer = await recursor.ask(query("www.example.com", qid=7), tcp=False)
            assert answer is not None
            assert answer[:2] == b"\0\7"
            assert str(dnslib.DNSRecord.parse(answer).rr[0].rdata) == "192.0.2.1"
    transport.close()
    for values, span in ((qid for qid, _ in liar.seen), 65536), ((port for _, port in liar.seen), 20000):
        many = list(values)
        assert len(set(many)) > 0.8 * len(many)
        assert max(many) - min(many) > span / 2
        steps = {b - a for a, b in itertools.pairwise(many)}
        assert len(steps) > 0.8 * len(many)  # no counter


async def test_only_the_recursors_own_answer_to_the_question_counts_and_ids_and_ports_cannot_be_guessed() -> None:
    await _spoof(200)


@pytest.mark.long
async def test_2000_ids_and_ports_cannot_be_guessed() -> None:
    await _spoof(2000)
