"""Anti-entropy: makes the catalog's picture of this node agree with the agent's.

`plan` is pure: what is here, what the catalog says, and out come commands. `Sync` runs it at once after a change here,
when the servers come back, and fully every minute. A watch tells it within a moment when this node's rows in the
catalog change: a service that somebody deregisters there comes back. A caller that changed something here waits with
`settled` until a round that began after the change is through. Rounds follow each other, and each takes all that has
come meanwhile. The node itself is registered along with its services. `serfHealth` belongs to the leader and the
service `consul` to the servers: neither is ever touched here.
"""

from __future__ import annotations

import asyncio
import random as _random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rostra.agent.bounds import check_fields, in_commands, service_fields
from rostra.agent.definition_fields import frozen
from rostra.agent.servers_port import Key, Row, Servers
from rostra.runtime import log as _log
from rostra.runtime.service import Tasks
from rostra.server.state.catalog import SERF_HEALTH, Deregister, NodeServices, Register
from rostra.server.state.health import NodeChecks
from rostra.server.state.rows import CheckRow, NodeRow, ServiceRow, read_row
from rostra.wire.caller import Caller
from rostra.wire.errors import Denied, RostraError

if TYPE_CHECKING:
    from rostra.agent.local import LocalAgent
    from rostra.agent.results import Results

FULL_EVERY_S = 60.0
RETRY_S = 15.0
BEHIND_TELL_S = 10.0  # while there is no leader, it is tried again every second
#: How long a change waits for the catalog, and all changes together once it cannot be reached.
SETTLE_WITHIN_S = 2.0
#: For so long after a write the watches may still show what was before it.
WATCH_LAG_S = 0.5
SERVERS_SERVICE = "consul"
_AT_ONCE = 16  # writes on their way at the same time
_INDEXES = 2  # rows end with create_index and modify_index

log = _log.get("agent.sync")


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What the agent says about its node."""

    name: str
    id: str
    address: str
    datacenter: str
    tagged_addresses: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Picture:
    """The services and checks of one node, as somebody sees them. `node` is None where it is not registered."""

    node: NodeRow | None
    services: Mapping[str, ServiceRow]
    checks: Mapping[str, CheckRow]

    @classmethod
    def of(cls, node_rows: Mapping[Key, Row], check_rows: Mapping[Key, Row]) -> Picture:
        """From the answers of `catalog.node` and `health.node`."""
        node = node_rows.get(("",))
        services = (read_row(ServiceRow, row) for key, row in node_rows.items() if key[0] == "s")
        checks = (read_row(CheckRow, row) for row in check_rows.values())
        return cls(
            read_row(NodeRow, node) if node is not None else None,
            {s.id: s for s in services},
            {c.id: c for c in checks},
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and whose token it needs: that of a service or check, or with "" the agent's own."""

    command: Register | Deregister
    token_of: str = ""
    what: str = ""
    stage: int = 1  # those of one stage are written together; a later one builds on it


def plan(
    identity: NodeIdentity,
    services: Mapping[str, ServiceRow],
    checks: Mapping[str, CheckRow],
    catalog: Picture,
    *,
    is_server: bool = False,
    deferred: frozenset[str] = frozenset(),
) -> list[Step]:
    """The commands that make `catalog` agree. A check in `deferred` is not sent for its output alone."""
    services, checks = _of_each_id(services, checks)
    node_is_known = catalog.node is not None and _same_node(identity, catalog.node)
    due: dict[str, list[CheckRow]] = {}  # by service
    for check_id, row in checks.items():
        if not _same_check(row, catalog.checks.get(check_id), ignore_output=check_id in deferred):
            due.setdefault(row.service_id, []).append(row)
    steps: list[Step] = []
    if not node_is_known:
        steps.append(Step(_register(identity, False), what="node", stage=0))
    for service_id, service in services.items():
        commands = in_commands(due.get(service_id, ()))
        if not _same_service(service, catalog.services.get(service_id)):
            first = _register(identity, True, service, next(commands, ()))
            steps.append(Step(first, service_id, f"service {service_id}"))
        for some in commands:
            steps.append(Step(_register(identity, True, None, some), service_id, f"checks of {service_id}", 2))
    for some in in_commands(due.get("", ())):
        steps.append(Step(_register(identity, True, None, some), "", "checks of the node"))
    return [*steps, *_removals(identity, services, checks, catalog, is_server)]


def _of_each_id(
    services: Mapping[str, ServiceRow], checks: Mapping[str, CheckRow]
) -> tuple[Mapping[str, ServiceRow], Mapping[str, CheckRow]]:
    """Of ids that differ by case only the one that came last, as in the catalog: both would be written for ever."""
    last, last_check = ({i.lower(): i for i in ids} for ids in (services, checks))
    if len(last) < len(services):
        services = {i: services[i] for i in last.values()}
    if len(last_check) < len(checks):
        checks = {i: checks[i] for i in last_check.values()}
    respelled = {
        i: row._replace(service_id=last[row.service_id.lower()])
        for i, row in checks.items()
        if row.service_id not in services and row.service_id.lower() in last
    }
    return services, {**checks, **respelled} if respelled else checks


def tags_to_adopt(services: Mapping[str, ServiceRow], catalog: Picture) -> dict[str, tuple[str, ...]]:
    """Tags that others gave to services which allow it (EnableTagOverride): the catalog's are the truth for those."""
    return {
        service_id: catalog.services[service_id].tags
        for service_id, service in services.items()
        if service.enable_tag_override
        and service_id in catalog.services
        and tuple(catalog.services[service_id].tags) != service.tags
    }


def _removals(
    identity: NodeIdentity,
    services: Mapping[str, ServiceRow],
    checks: Mapping[str, CheckRow],
    catalog: Picture,
    is_server: bool,
) -> Iterable[Step]:
    # A service that is here in another spelling is registered in it, and the catalog takes that over.
    ids, check_ids = {i.lower() for i in services}, {i.lower() for i in checks}
    gone = [i for i in catalog.services if i.lower() not in ids and not (is_server and i == SERVERS_SERVICE)]
    for service_id in gone:
        yield Step(Deregister(identity.name, service_id=service_id), service_id, f"service {service_id}")
    for check_id, check in catalog.checks.items():
        is_ours = check_id != SERF_HEALTH and not (is_server and check.service_id == SERVERS_SERVICE)
        if is_ours and check_id.lower() not in check_ids and check.service_id not in gone:
            yield Step(Deregister(identity.name, check_id=check_id), check.service_id, f"check {check_id}")


def _register(
    identity: NodeIdentity, node_is_known: bool, service: ServiceRow | None = None, checks: tuple[CheckRow, ...] = ()
) -> Register:
    return Register(
        node=identity.name,
        address=identity.address,
        node_id=identity.id,
        datacenter=identity.datacenter,
        tagged_addresses=dict(identity.tagged_addresses),
        node_meta=dict(identity.meta),
        skip_node_update=node_is_known,
        service=service_fields(service) if service is not None else None,
        checks=tuple(check_fields(check) for check in checks),
    )


def _same_node(identity: NodeIdentity, row: NodeRow) -> bool:
    return (
        row.id == identity.id
        and row.address == identity.address
        and dict(row.tagged_addresses) == dict(identity.tagged_addresses)
        and dict(row.meta) == dict(identity.meta)
    )


def _same_service(ours: ServiceRow, theirs: ServiceRow | None) -> bool:
    if theirs is None:
        return False
    return ours[:-_INDEXES] == theirs[:-_INDEXES] or bool(frozen(ours[:-_INDEXES]) == frozen(theirs[:-_INDEXES]))


def _same_check(ours: CheckRow, theirs: CheckRow | None, *, ignore_output: bool) -> bool:
    if theirs is None:
        return False
    if ignore_output:
        theirs = theirs._replace(output=ours.output)
    return ours[:-_INDEXES] == theirs[:-_INDEXES]


class _Written:
    """Rows that were written of late, laid over those of the watches, which may be older. None: it was removed."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], tuple[float, Any]] = {}

    def note(self, command: Register | Deregister, ours: Picture, catalog: Picture) -> None:
        """`ours` is what the command was made of."""
        until = time.monotonic() + WATCH_LAG_S
        if isinstance(command, Register):
            if not command.skip_node_update:
                node = NodeRow(
                    command.node,
                    command.node_id,
                    command.address,
                    command.datacenter,
                    command.tagged_addresses,
                    command.node_meta,
                )
                self._rows["node", ""] = (until, node)
            if command.service is not None:
                service_id = command.service["id"]
                self._rows["service", service_id] = (until, ours.services[service_id])
            for check in command.checks:
                self._rows["check", check["id"]] = (until, ours.checks[check["id"]])
        elif command.service_id:
            self._rows["service", command.service_id] = (until, None)
            for check_id, check_row in catalog.checks.items():
                if check_row.service_id == command.service_id:
                    self._rows["check", check_id] = (until, None)
        elif command.check_id:
            self._rows["check", command.check_id] = (until, None)

    def over(self, seen: Picture) -> Picture:
        """`seen`, or what is known better."""
        now = time.monotonic()
        for key in [key for key, (until, _) in self._rows.items() if until <= now]:
            del self._rows[key]
        if not self._rows:
            return seen
        node, services, checks = seen.node, dict(seen.services), dict(seen.checks)
        tables: dict[str, dict[str, Any]] = {"service": services, "check": checks}
        for (what, name), (_, row) in self._rows.items():
            if what == "node":
                node = row
            elif row is None:
                tables[what].pop(name, None)
            else:
                tables[what][name] = row
        return Picture(node, services, checks)

    def due_in_s(self) -> float | None:
        """When the watches will be believed about all of it."""
        if not self._rows:
            return None
        return max(0.0, min(until for until, _ in self._rows.values()) - time.monotonic())


class Sync:
    """Runs `plan` whenever it may have something to say, and writes what it says."""

    def __init__(
        self,
        local: LocalAgent,
        servers: Servers,
        results: Results,
        identity: NodeIdentity,
        *,
        is_server: bool = False,
        token: str = "",
        full_every_s: float = FULL_EVERY_S,
        retry_s: float = RETRY_S,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self._local = local
        self._servers = servers
        self._results = results
        self._identity = identity
        self._is_server = is_server
        self._token = token
        self._full_every_s = full_every_s
        self._retry_s = retry_s
        self._random = random
        self._wake = asyncio.Event()
        self._full_due = True
        self._changes = 0  # of what is here, so far
        self._through = -1  # the changes that the last round that was done began after
        self._refusals: dict[str, str] = {}  # of that round: service id ("" the node's own) -> what the servers said
        self._waiting: dict[asyncio.Future[None], int] = {}  # -> the change that has to be through
        self._failing_since: float | None = None
        self._failure = ""
        self._written = _Written()
        self._tasks = Tasks("agent.sync")
        self._removers: list[Callable[[], None]] = [local.on_change(self.trigger)]
        self._unfollow: list[Callable[[], None]] = []
        self._refused: dict[str, str] = {}  # step -> the refusal that was logged
        self._behind = _log.RateLimited(log, BEHIND_TELL_S)

    async def start(self) -> None:
        self._tasks.keep("sync", self._run)
        self._tasks.keep("full sync", self._full_timer)

    async def stop(self) -> None:
        for remove in (*self._removers, *self._unfollow):
            remove()
        self._removers.clear()
        await self._tasks.stop()

    def trigger(self) -> None:
        """Compare soon. Many calls in one turn of the loop are one comparison."""
        self._changes += 1
        self._wake.set()

    async def settled(self, *service_ids: str, within_s: float = SETTLE_WITHIN_S) -> str:
        """Wait until the catalog has what is here now. "", or why it has not got these ("" is the node itself).

        Once the catalog could not be reached for `within_s` nobody waits for it, until a round is through again.
        """
        if self._through < self._changes:
            began = time.monotonic()
            if self._failing_since is not None:
                within_s += self._failing_since - began
            if within_s <= 0 or not await self._wait_through(self._changes, within_s):
                if self._failing_since is None:
                    self._failing_since = began
                return self._failure or "the servers did not answer in time"
        return next((self._refusals[i] for i in service_ids if i in self._refusals), "")

    async def _wait_through(self, change: int, within_s: float) -> bool:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = change
        try:
            async with asyncio.timeout(within_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(waiter, None)
        return True

    async def _run(self) -> None:
        # Watches hold rows of this one node only; they also tell when a reconnection brought another picture.
        services = self._results.live(NodeServices(self._identity.name), token=self._token)
        checks = self._results.live(NodeChecks(self._identity.name), token=self._token)
        for remove in self._unfollow:
            remove()
        self._unfollow = [services.on_change(self._wake.set), checks.on_change(self._wake.set)]
        self._full_due = True
        while True:
            try:
                if await services.ready(60.0) and await checks.ready(60.0):
                    self._wake.clear()
                    is_full, self._full_due = self._full_due, False
                    if is_full:
                        catalog = await self._read()
                    else:
                        catalog = self._written.over(Picture.of(services.rows, checks.rows))
                    is_done = await self._compare(catalog)
                    if is_done:
                        pause_s, then_full = self._written.due_in_s(), False
                    else:
                        pause_s, then_full = self._retry_pause_s(), True
                    await self._sleep(pause_s, then_full=then_full)
            except RostraError as error:
                self._fail(error.message)
                self._behind.warn("the catalog could not be brought up to date, trying again", error=error.message)
                await self._sleep(min(1.0, self._retry_pause_s()))

    def _fail(self, why: str) -> None:
        self._full_due = True
        self._failure = why
        if self._failing_since is None:
            self._failing_since = time.monotonic()

    def _settle(self, change: int, refusals: dict[str, str]) -> None:
        """A round is through that began after `change`."""
        self._through, self._refusals = change, refusals
        self._failing_since, self._failure = None, ""
        for waiter, awaited in self._waiting.items():
            if awaited <= change and not waiter.done():
                waiter.set_result(None)

    async def _read(self) -> Picture:
        services = await self._results.fetch(NodeServices(self._identity.name), token=self._token)
        checks = await self._results.fetch(NodeChecks(self._identity.name), token=self._token)
        return Picture.of(services.rows, checks.rows)

    async def _compare(self, catalog: Picture) -> bool:
        """Write the differences. False when something was refused: others must not wait for that one."""
        local = self._local
        for service_id, tags in tags_to_adopt(_rows(local.services), catalog).items():
            local.adopt_tags(service_id, tags)
        change = self._changes
        ours = Picture(catalog.node, _rows(local.services), _rows(local.checks))
        steps = plan(
            self._identity,
            ours.services,
            ours.checks,
            catalog,
            is_server=self._is_server,
            deferred=local.deferred_outputs(),
        )
        refusals: dict[str, str] = {}
        refused: set[str] = set()

        async def write(step: Step) -> None:
            refusal = await self._write(step)
            if refusal:
                refusals[step.token_of] = refusal
                refused.add(step.what)
            else:
                self._written.note(step.command, ours, catalog)

        for stage in sorted({step.stage for step in steps}):
            of_stage = [step for step in steps if step.stage == stage]
            for start in range(0, len(of_stage), _AT_ONCE):
                # All of them end before the next round begins: a write that is late must not undo what came after it.
                done = await asyncio.gather(*map(write, of_stage[start : start + _AT_ONCE]), return_exceptions=True)
                for error in done:
                    if error is not None:
                        raise error
        for what in self._refused.keys() - refused:
            del self._refused[what]  # it is wanted no longer
        self._settle(change, refusals)
        return not refusals

    async def _write(self, step: Step) -> str:
        """What the servers refused it with, or "". A lost leader is raised: then nothing else would pass either."""
        try:
            await self._servers.write(step.command, caller=Caller(self._token_for(step.token_of)))
        except RostraError as error:
            if error.code in ("no_leader", "timeout"):
                raise
            if self._refused.get(step.what) != error.message:
                self._refused[step.what] = error.message
                write = log.warn if isinstance(error, Denied) else log.err
                write("the servers refuse a registration", what=step.what, error=error.message)
            return error.message or error.code
        except Exception as error:  # a row that cannot even be sent must not keep the others from the catalog
            log.err("a registration cannot be written", what=step.what, exc_info=error)
            return "it cannot be written, see the agent's log"
        log.debug("wrote to the catalog", what=step.what)
        if self._refused.pop(step.what, None) is not None:
            log.info("the servers accept a registration that they refused before", what=step.what)
        return ""

    def _token_for(self, service_id: str) -> str:
        service = self._local.services.get(service_id)
        return (service.token if service is not None else "") or self._token

    def _retry_pause_s(self) -> float:
        return self._retry_s * (1.0 + self._random())

    async def _sleep(self, seconds: float | None, *, then_full: bool = True) -> None:
        """Until somebody triggers, or `seconds` are over."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            self._full_due |= then_full

    async def _full_timer(self) -> None:
        """Every minute; and whenever the session with the servers was lost and is back."""
        loop = asyncio.get_running_loop()
        due, was_connected = loop.time() + self._full_every_s * (1.0 + self._random()), self._servers.connected
        while True:
            await asyncio.sleep(min(1.0, self._full_every_s))
            is_connected = self._servers.connected
            if loop.time() >= due or (is_connected and not was_connected):
                due = loop.time() + self._full_every_s * (1.0 + self._random())
                self._full_due = True
                self._wake.set()
            was_connected = is_connected


def _rows(local: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.row for key, value in local.items()}
