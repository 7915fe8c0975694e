"""Everything that is done to the cluster, one method for each kind: hurt, hold, heal, and see that the victim is back.

`Faults.run` deals the kinds from a shuffled bag at the asked rate, at most two at a time, never two on one server. The
order of kinds, victims and durations comes from the seed; when they meet the clients' requests does not. A victim that
does not come back in time is a violation, like any that the checks find.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import itertools
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from tests.support.processes import NotYet, eventually, send
from tests.torture import tails
from tests.torture.hosts import Cluster, Host
from tests.torture.network import between, one_way

AT_ONCE = 2
FILL_BYTES, FILL_S = 256 << 10, 25.0
RAFT = "/v1/operator/raft/"
OPERATE_S = 60.0

Kind = Callable[[], Awaitable[str]]


class Busy(Exception):
    """The servers that it needs are all in other faults."""


class Faults:
    def __init__(self, cluster: Cluster, rng: random.Random, note: Callable[[str], None]) -> None:
        self.cluster, self._rng, self._note = cluster, rng, note
        self.counts: Counter[str] = Counter()
        self._list_changes = False  # two at once could leave a majority of dead servers, for ever
        self.violations: list[str] = []
        #: kind → why it is not tried.
        self.missing: dict[str, str] = {}
        self.kinds: dict[str, Kind] = {
            "kill -9 of one": self._kill_one,
            "kill -9 of a core": self._kill_core,
            "kill -9 of an agent": self._kill_agent,
            "kill -9 of a majority": self._kill_majority,
            "kill -9 of all": self._kill_all,
            "stop for 5 s": self._stop,
            **{f"{kind} tail": self._spoil(kind) for kind in tails.KINDS},
        }
        network = {
            "partition": self._partition,
            "one-way partition": self._one_way,
            "flapping partition": self._flapping,
            "link down": self._link_down,
        }
        disk = {"slow disk": self._slow_disk, "failing disk": self._failing_disk}
        self._add(network, "" if cluster.network is not None else "no network namespaces")
        self._add({"full disk": self._full_disk}, "" if cluster.network is not None else "no filesystem of its own")
        self._add(disk, "" if cluster.servers[0].disk is not None else "no C compiler")
        members = {
            "leadership transfer": self._transfer,
            "replaced server": self._replace,
            "removed and added server": self._remove_and_add,
        }
        self._add(members, "" if self._prepare_operator() else "no operator API")

    def _add(self, kinds: Mapping[str, Kind], reason: str) -> None:
        if reason:
            self.missing.update(dict.fromkeys(kinds, reason))
        else:
            self.kinds.update(kinds)

    def keep_only(self, kinds: Sequence[str]) -> None:
        """Those whose names contain one of these words."""
        self.kinds = {kind: run for kind, run in self.kinds.items() if any(word in kind for word in kinds)}

    async def run(self, until: float, per_minute: float) -> None:
        """Until that monotonic time. All victims are back when it returns."""
        bag: list[str] = []
        running: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while (now := time.monotonic()) < until:
            if now >= due and len(running) < AT_ONCE:
                if not bag:
                    bag = list(self.kinds)
                    self._rng.shuffle(bag)
                running.add(asyncio.create_task(self._one(bag.pop())))
                due = max(due + 60.0 / per_minute * self._rng.uniform(0.5, 1.5), now - 5.0)
            if running:
                _, running = await asyncio.wait(running, timeout=0.05)
            else:
                await asyncio.sleep(0.05)
        if running:
            await asyncio.wait(running)

    async def _one(self, kind: str) -> None:
        began = time.monotonic()
        try:
            done = await self.kinds[kind]()
        except Busy as e:
            if str(e):
                self._note(f"{kind}: not done: {str(e)[:200]}")
            return
        except (NotYet, AssertionError, OSError, http.client.HTTPException, RuntimeError) as e:
            self.violations.append(f"{kind}: {e}")
            self._note(f"{kind}: FAILED: {e}")
            return
        self.counts[kind] += 1
        self._note(f"{kind}: {done}, over after {time.monotonic() - began:.1f} s")

    # -- victims

    @contextlib.asynccontextmanager
    async def _victims(self, n: int, *, leader: float = 0.5) -> AsyncIterator[list[Host]]:
        """`n` servers for this fault alone, the leader first with that probability. Raises Busy."""
        free = [s for s in self.cluster.servers if not s.busy]
        if len(free) < n:
            raise Busy
        chosen = self._rng.sample(free, n)
        if n < len(self.cluster.servers) and self._rng.random() < leader:
            led = await asyncio.to_thread(self.cluster.some_leader, random.Random(self._rng.random()))
            if led is not None and not led.busy and led not in chosen:
                chosen[0] = led
        if any(host.busy for host in chosen):  # taken while we asked
            raise Busy
        for host in chosen:
            host.busy = True
        try:
            yield chosen
        finally:
            for host in chosen:
                host.busy = False

    async def _hold(self, at_least_s: float, at_most_s: float) -> float:
        held = self._rng.uniform(at_least_s, at_most_s)
        await asyncio.sleep(held)
        return held

    async def _restart(self, hosts: list[Host]) -> None:
        for host in self._rng.sample(hosts, len(hosts)):
            host.start()
            await self._hold(0.0, 0.7)
        for host in hosts:
            await asyncio.to_thread(host.wait_up)

    # -- processes

    async def _kill(self, n: int) -> str:
        async with self._victims(n) as hosts:
            await asyncio.gather(*(asyncio.to_thread(host.kill) for host in hosts))
            held = await self._hold(0.0, 4.0)
            await self._restart(hosts)
        return f"{_names(hosts)} for {held:.1f} s"

    async def _kill_one(self) -> str:
        return await self._kill(1)

    async def _kill_majority(self) -> str:
        return await self._kill(len(self.cluster.servers) // 2 + 1)

    async def _kill_all(self) -> str:
        return await self._kill(len(self.cluster.servers))

    async def _kill_core(self) -> str:
        async with self._victims(1, leader=0.7) as (host,):
            pid = await asyncio.to_thread(host.core_pid)
            assert pid, f"{host.name} has no core"
            send(pid, signal.SIGKILL)
            await self._hold(0.5, 1.0)
            await asyncio.to_thread(host.wait_up)
        return host.name

    async def _kill_agent(self) -> str:
        """The core ends with it."""
        async with self._victims(1) as (host,):
            assert host.process is not None
            tree = host.tree()
            send(tree[0], signal.SIGKILL)
            await asyncio.to_thread(host.process.wait, 5.0)
            await self._hold(0.5, 2.0)
            await asyncio.to_thread(host.kill)  # a proxy's or a core's last second
            await self._restart([host])
        return host.name

    async def _stop(self) -> str:
        async with self._victims(1, leader=0.7) as (host,):
            await asyncio.to_thread(host.stop)
            await asyncio.sleep(5.0)
            await asyncio.to_thread(host.go_on)
            await asyncio.to_thread(host.wait_up)
        return host.name

    # -- the network

    def _sides(self) -> tuple[list[str], list[str]]:
        """A minority of the servers and some clients on one side, the rest on the other."""
        servers, clients = self.cluster.servers, self.cluster.clients
        leader = self.cluster.some_leader(random.Random(self._rng.random())) if self._rng.random() < 0.6 else None
        few = self._rng.sample(servers, self._rng.randint(1, (len(servers) - 1) // 2))
        if leader is not None and leader not in few:
            few[0] = leader
        side = [host.name for host in few] + [c.name for c in clients if self._rng.random() < 0.3]
        return side, [name for name in self.cluster.hosts if name not in side]

    async def _partition(self) -> str:
        network = self.cluster.network
        assert network is not None
        few, many = await asyncio.to_thread(self._sides)
        pairs = between(few, many)
        await asyncio.to_thread(network.block, pairs)
        held = await self._hold(1.0, 8.0)
        await asyncio.to_thread(network.unblock, pairs)
        return f"{','.join(few)} from the others for {held:.1f} s"

    async def _one_way(self) -> str:
        network = self.cluster.network
        assert network is not None
        few, many = await asyncio.to_thread(self._sides)
        out = self._rng.random() < 0.5
        pairs = one_way(few, many) if out else one_way(many, few)
        await asyncio.to_thread(network.block, pairs)
        held = await self._hold(1.0, 8.0)
        await asyncio.to_thread(network.unblock, pairs)
        return f"{','.join(few)} {'cannot be heard' if out else 'hears nobody'} for {held:.1f} s"

    async def _flapping(self) -> str:
        network = self.cluster.network
        assert network is not None
        few, many = await asyncio.to_thread(self._sides)
        times = self._rng.randint(6, 14)
        for _ in range(times):
            pairs = self._rng.choice([between(few, many), one_way(few, many), one_way(many, few)])
            await asyncio.to_thread(network.block, pairs)
            await self._hold(0.05, 0.7)
            await asyncio.to_thread(network.unblock, pairs)
            await self._hold(0.05, 0.4)
        return f"{','.join(few)} {times} times"

    async def _link_down(self) -> str:
        network = self.cluster.network
        assert network is not None
        async with self._victims(1) as (host,):
            await asyncio.to_thread(network.unplug, host.name)
            held = await self._hold(1.0, 6.0)
            await asyncio.to_thread(network.plug, host.name)
            await asyncio.to_thread(host.wait_up)
        return f"{host.name} for {held:.1f} s"

    # -- the disk

    def _spoil(self, kind: str) -> Kind:
        async def spoil() -> str:
            """A power cut of one, or of all at once."""
            n = len(self.cluster.servers) if self._rng.random() < 0.3 else 1
            async with self._victims(n) as hosts:
                await asyncio.gather(*(asyncio.to_thread(host.kill) for host in hosts))
                done = [f"{h.name} {tails.spoil(h.data_dir / 'server' / 'raft', kind, self._rng)}" for h in hosts]
                await self._hold(0.0, 1.5)
                await self._restart(hosts)
            return ", ".join(done)

        return spoil

    async def _slow_disk(self) -> str:
        async with self._victims(1, leader=0.6) as (host,):
            assert host.disk is not None
            ms = self._rng.randint(50, 400)
            host.disk.slow(ms)
            held = await self._hold(3.0, 8.0)
            host.disk.normal()
        return f"{ms} ms a sync at {host.name} for {held:.1f} s"

    async def _failing_disk(self) -> str:
        """A sync that failed once: the core must stop and not try it again."""
        async with self._victims(1, leader=0.6) as (host,):
            assert host.disk is not None
            pid, logs = await asyncio.to_thread(host.core_pid), len(host.logs) - 1
            host.disk.slow(0, errno.EIO)
            try:
                await asyncio.to_thread(self._ended, host, pid, 15.0)
            finally:
                host.disk.normal()
            await asyncio.to_thread(host.wait_up)
            assert "Input/output error" in host.said(logs), f"{host.name} does not say why it stopped"
        return f"{host.name} stopped and came back"

    async def _full_disk(self) -> str:
        """The core stops with a message, the others go on, and it is back when there is space again."""
        host = self.cluster.servers[-1]
        if host.busy:
            raise Busy
        host.busy = True
        try:
            pid, logs = await asyncio.to_thread(host.core_pid), len(host.logs) - 1
            began = time.monotonic()
            await asyncio.to_thread(host.fill_disk)
            try:
                await asyncio.to_thread(self._write_until_ended, host, pid)
                ended = time.monotonic() - began
                await self._hold(1.0, 4.0)
            finally:
                await asyncio.to_thread(host.free_disk)
            await asyncio.to_thread(host.wait_up)
            assert "No space left" in host.said(logs), f"{host.name} does not say why it stopped"
        finally:
            host.busy = False
        return f"{host.name} stopped after {ended:.1f} s and came back"

    def _write_until_ended(self, host: Host, pid: int) -> None:
        """What was zeroed ahead of the journal has to be used up first."""
        until, n = time.monotonic() + FILL_S, 0
        others = [other for other in self.cluster.hosts.values() if other is not host]
        while _is_core(host, pid):
            if time.monotonic() > until:
                raise NotYet(f"{host.name} still runs on a full disk after {FILL_S:g} s of writes")
            n += 1
            with contextlib.suppress(OSError, http.client.HTTPException):
                body = random.randbytes(FILL_BYTES)
                random.choice(others).ask("PUT", f"/v1/kv/fill/{n % 8}", body, timeout_s=2.0)

    def _ended(self, host: Host, pid: int, within_s: float) -> None:
        until = time.monotonic() + within_s
        while _is_core(host, pid):
            if time.monotonic() > until:
                raise NotYet(f"the core of {host.name} still runs")
            time.sleep(0.02)

    # -- the members

    def _prepare_operator(self) -> bool:
        """Whether there is an operator API; then servers are promoted as soon as they have caught up."""
        server = self.cluster.servers[0]
        if server.ask("GET", RAFT + "configuration").status != 200:
            return False
        config = server.get("/v1/operator/autopilot/configuration")
        config["ServerStabilizationTime"] = "1s"
        return server.ask("PUT", "/v1/operator/autopilot/configuration", json.dumps(config).encode()).status == 200

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._list_changes:
            raise Busy
        self._list_changes = True
        try:
            yield
        finally:
            self._list_changes = False

    async def _transfer(self) -> str:
        """It counts where it was done: others that are under way may leave nobody to lead."""
        host = self._rng.choice(self.cluster.servers)
        try:
            answer = await asyncio.to_thread(host.ask, "POST", RAFT + "transfer-leader", b"", timeout_s=10.0)
        except (OSError, http.client.HTTPException) as e:
            raise Busy(repr(e)) from None
        if answer.status != 200:
            raise Busy(answer.text)
        return f"to {json.loads(answer.body)['Leader']['Node']}, asked at {host.name}"

    async def _replace(self) -> str:
        """A server's disk is lost: remove it, start it with an empty one, let it in, wait until it votes."""
        async with self._alone(), self._victims(1, leader=0.3) as (host,):
            await asyncio.to_thread(host.kill)
            node_id = (host.data_dir / "node-id").read_text().strip()
            removed = await asyncio.to_thread(self._operate, host, "DELETE", f"peer?id={node_id}", "was not found")
            await asyncio.to_thread(host.wipe)
            host.start()
            added = await asyncio.to_thread(self._operate, host, "POST", f"peer?name={host.name}")
            voted = await asyncio.to_thread(self._wait_voter, host)
        return f"{host.name}: removed in {removed:.1f} s, let in in {added:.1f} s, votes in {voted:.1f} s"

    async def _remove_and_add(self) -> str:
        async with self._alone(), self._victims(1, leader=0.3) as (host,):
            node_id = (host.data_dir / "node-id").read_text().strip()
            removed = await asyncio.to_thread(self._operate, host, "DELETE", f"peer?id={node_id}", "was not found")
            await self._hold(0.0, 2.0)
            added = await asyncio.to_thread(self._operate, host, "POST", f"peer?name={host.name}")
            voted = await asyncio.to_thread(self._wait_voter, host)
        return f"{host.name}: removed in {removed:.1f} s, let in again in {added:.1f} s, votes in {voted:.1f} s"

    def _operate(self, but: Host, method: str, what: str, also_done: str = "\0") -> float:
        """Ask other servers until it is done: those that are in other faults may not be able to. Seconds it took."""
        others = itertools.cycle([host for host in self.cluster.servers if host is not but])
        began = time.monotonic()

        def done() -> bool:
            answer = next(others).ask(method, RAFT + what, b"" if method == "POST" else None, timeout_s=15.0)
            assert answer.status == 200 or also_done in answer.text, f"{answer.status} {answer.text[:200]}"
            return True

        eventually(f"{method} {what}", done, OPERATE_S)
        return time.monotonic() - began

    def _wait_voter(self, host: Host) -> float:
        began = time.monotonic()
        others = itertools.cycle([other for other in self.cluster.servers if other is not host])

        def votes() -> bool:
            servers = next(others).get(RAFT + "configuration", timeout_s=3.0)["Servers"]
            return any(row["Node"] == host.name and row["Voter"] for row in servers)

        eventually(f"{host.name} votes again", votes, OPERATE_S)
        took = time.monotonic() - began
        host.wait_up()
        return took


def _is_core(host: Host, pid: int) -> bool:
    return bool(pid) and host.core_pid() == pid


def _names(hosts: list[Host]) -> str:
    return ",".join(host.name for host in hosts)
