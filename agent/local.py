"""What this node should have registered: its services and checks, and the running of those checks.

The agent is the authority for its node: `agent/sync.py` makes the catalog agree with `services` and `checks`. Changes
come from HTTP (`agent/http/agent.py`), from configuration files and from the checks themselves. Changes by callers are
made whole, also where the caller goes away, and one at a time for each service and check; they are on disk before they
are visible, and are announced through `on_change`. A check keeps its status over re-registration and restarts; a change
of output alone is announced at most once per `check_update_interval_s`.
"""

from __future__ import annotations

import asyncio
import random as _random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from rostra.agent.bounds import refuse_too_large
from rostra.agent.checks import kinds
from rostra.agent.checks.alias import alias_result, follow
from rostra.agent.checks.check import (
    CRITICAL,
    NODE_MAINTENANCE,
    PASSING,
    SERVICE_MAINTENANCE,
    Result,
    Thresholds,
    aggregate,
    cap_reported,
    expired_output,
    is_maintenance,
)
from rostra.agent.checks.periodic import run_periodically
from rostra.agent.checks.spec import OUTPUT_BYTES_MAX, CheckSpec
from rostra.agent.checks.ttl import Deadline
from rostra.agent.definition import (
    SIDECAR_SUFFIX,
    Scripts,
    ScriptsDisabled,
    ServiceDefinition,
    expand_sidecar_checks,
    join_host_port,
    parse_check,
    parse_service,
    with_ip_addresses,
)
from rostra.agent.definition_fields import frozen
from rostra.agent.local_files import Files
from rostra.agent.sidecar_ports import SidecarPorts, port_is_busy_here
from rostra.runtime import log as _log
from rostra.runtime.service import AGAIN_MAX_S, Tasks
from rostra.server.state.rows import CheckRow, ServiceRow
from rostra.wire.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from rostra.agent.results import Results

log = _log.get("agent.local")

CHECK_UPDATE_INTERVAL_S = 300.0
REAP_EVERY_S = 30.0
STATUS_TELL_S = 10.0
#: How long a sidecar that passed may take to listen again after a restart of the agent.
SIDECAR_SETTLES_S = 5.0
STOP_S = 1.0

_NO_REASON = "Maintenance mode is enabled for this {}, but no reason was provided. This is a default message."


@dataclass(slots=True, eq=False)
class LocalService:
    row: ServiceRow
    token: str = ""
    sidecar_of: str = ""  # id of the service whose definition asked for this proxy
    from_file: bool = False  # a configuration file has it, so it is not kept on disk


@dataclass(slots=True, eq=False)
class LocalCheck:
    """`spec` is None for maintenance, which nothing runs."""

    row: CheckRow
    spec: CheckSpec | None = None
    token: str = ""
    from_file: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)
    critical_since: float | None = None  # monotonic
    ttl: Deadline | None = None
    task: asyncio.Task[None] | None = None
    stop: Callable[[], None] = lambda: None
    quiet_until: float = 0.0  # an output-only change before this time waits
    output_timer: asyncio.TimerHandle | None = None


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _whole(change: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """A method of LocalAgent that is done to its end, also where the caller is cancelled: nothing is left half done."""

    @wraps(change)
    async def done(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        local: Any = args[0]
        task = asyncio.get_running_loop().create_task(change(*args, **kwargs), name=change.__name__)
        local._ongoing.add(task)
        task.add_done_callback(local._ended)
        return await asyncio.shield(task)

    return done


class LocalAgent:
    """Constructed without IO; `start` loads what an earlier run kept."""

    def __init__(
        self,
        *,
        node: str,
        data_dir: Path | None = None,
        bind_address: str = "127.0.0.1",
        scripts: Scripts | None = None,
        results: Results | None = None,
        sidecar_ports: tuple[int, int] = (21000, 21255),
        check_update_interval_s: float = CHECK_UPDATE_INTERVAL_S,
        output_bytes_max: int = OUTPUT_BYTES_MAX,
        discard_output: bool = False,
        random: Callable[[], float] = _random.random,
        port_is_busy: Callable[[str, int], bool] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.node = node
        self.services: dict[str, LocalService] = {}
        self.checks: dict[str, LocalCheck] = {}
        self._bind_address = bind_address
        self._scripts = scripts or Scripts()
        self._results = results
        self._check_update_interval_s = check_update_interval_s
        self._output_bytes_max = output_bytes_max
        self._discard_output = discard_output
        self._random = random
        self._wall = wall
        self._files = Files(data_dir)
        self._ports = SidecarPorts(self._files, sidecar_ports, port_is_busy or port_is_busy_here)
        self._statuses = _log.RateLimited(log, STATUS_TELL_S)
        self._tasks = Tasks("agent.checks")
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._ongoing: set[asyncio.Task[Any]] = set()
        self._started = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._states: dict[str, dict[str, Any]] = {}  # check id -> what was kept of it

    async def start(self) -> None:
        """Restore what was registered before; services of configuration files are registered after this."""
        for kept in await self._files.load("checks/state"):
            self._states[kept.get("id", "")] = kept
        await self._ports.load()
        for kept in await self._files.load("services"):
            self._restore("service", kept, self._restore_service)
        for kept in await self._files.load("checks"):
            self._restore("check", kept, self._restore_check)
        self._tasks.keep("reap critical services", self._reap)
        self._refresh_aliases(None)
        self._started.set()

    async def stop(self) -> None:
        for check in self.checks.values():
            self._stop_check(check)
        await self._tasks.stop()
        if self._ongoing:
            await asyncio.wait(self._ongoing, timeout=STOP_S)
        for task in list(self._ongoing):
            task.cancel()
        await self._files.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._ongoing.discard(task)
        if not task.cancelled():
            task.exception()  # told to the caller, who may have gone

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """`callback()` after each change that the catalog or a listener should hear of. Returns the remover."""
        self._listeners.append(callback)

        def remove() -> None:
            if callback in self._listeners:
                self._listeners.remove(callback)

        return remove

    # -- services -------------------------------------------------------------------------------------------------

    @_whole
    async def register_service(
        self,
        definition: Mapping[str, Any],
        *,
        replace_existing_checks: bool = False,
        token: str = "",
        from_file: bool = False,
    ) -> str:
        """Add or replace a service with its checks and its sidecar; its id. Raises BadRequest, Denied, Conflict."""
        wanted = parse_service(definition, node=self.node)
        for part in (wanted, wanted.sidecar):
            for spec in part.checks if part is not None else ():
                self._scripts.allow(spec, from_file)
        named = [_service(wanted.row.id), _service(wanted.row.id + SIDECAR_SUFFIX)]
        async with self._change(*named, *(["sidecar ports"] if wanted.sidecar is not None else [])):
            parts = [(wanted, "")]
            if wanted.sidecar is not None:
                sidecar = self._complete_sidecar(wanted.sidecar)
                await self._ports.keep(sidecar.row.id, sidecar.row.port, still=self.services)
                parts.append((sidecar, wanted.row.id))
            await self._put(parts, token, from_file, replace_existing_checks)
        return wanted.row.id

    @_whole
    async def deregister_service(self, service_id: str) -> None:
        """Remove a service, its checks, and the sidecar that came with it. Raises NotFound."""
        async with self._change(_service(service_id), _service(service_id + SIDECAR_SUFFIX)):
            if service_id not in self.services:
                raise NotFound(
                    f'Unknown service ID "{service_id}". Ensure that the service ID is passed, not the name.'
                )
            gone = [service_id, *(i for i, s in self.services.items() if s.sidecar_of == service_id)]
            files: list[tuple[str, str]] = []
            for each in gone:
                for check in list(self.checks_of(each)):
                    files += self._drop_check(check)
                if not self.services.pop(each).from_file:
                    files.append(("services", each))
            self._refresh_aliases(set(gone))
            try:
                await self._files.remove(*files)
            finally:
                self._changed()

    @_whole
    async def service_maintenance(self, service_id: str, enable: bool, reason: str = "", *, token: str = "") -> None:
        """Put a service into maintenance, or take it out. Raises NotFound."""
        service = self.services.get(service_id)
        if service is None:
            raise NotFound(f'No service registered with ID "{service_id}"')
        row = CheckRow(
            node=self.node,
            id=SERVICE_MAINTENANCE + service_id,
            name="Service Maintenance Mode",
            status=CRITICAL,
            notes=reason or _NO_REASON.format("service"),
            service_id=service_id,
            service_name=service.row.name,
            service_tags=service.row.tags,
            type="maintenance",
        )
        await self._maintenance(row, enable, service.token or token)

    @_whole
    async def node_maintenance(self, enable: bool, reason: str = "", *, token: str = "") -> None:
        row = CheckRow(
            node=self.node,
            id=NODE_MAINTENANCE,
            name="Node Maintenance Mode",
            status=CRITICAL,
            notes=reason or _NO_REASON.format("node"),
            type="maintenance",
        )
        await self._maintenance(row, enable, token)

    def adopt_tags(self, service_id: str, tags: tuple[str, ...]) -> None:
        """Take over tags that somebody else wrote into the catalog, where the service allows it. No announcement."""
        service = self.services.get(service_id)
        if service is None or service.row.tags == tags:
            return
        service.row = service.row._replace(tags=tags)
        for check in self.checks_of(service_id):
            check.row = check.row._replace(service_tags=tags)

    def checks_of(self, service_id: str) -> Iterator[LocalCheck]:
        return (c for c in list(self.checks.values()) if c.row.service_id == service_id)

    def status_of(self, service_id: str) -> str:
        """passing, warning, critical or maintenance, from the service's checks and the node's."""
        return aggregate(c.row for c in self.checks.values() if c.row.service_id in ("", service_id))

    # -- checks ---------------------------------------------------------------------------------------------------

    @_whole
    async def register_check(self, definition: Mapping[str, Any], *, token: str = "", from_file: bool = False) -> str:
        """Add or replace one check; the id of its service, if any. Raises BadRequest, NotFound, ScriptsDisabled."""
        spec = parse_check(definition, from_file=from_file)
        self._scripts.allow(spec, from_file)
        async with self._change(_check(spec.id), _service(spec.service_id)):
            if spec.service_id and spec.service_id not in self.services:
                raise NotFound(f'ServiceID "{spec.service_id}" does not exist')
            spec = replace(spec, token=spec.token or token)
            owner = self.services.get(spec.service_id)
            others = [c.spec for c in self.checks_of(spec.service_id) if c.spec is not None and c.spec.id != spec.id]
            refuse_too_large(self.node, owner.row if owner is not None else None, [spec, *others])
            if not from_file:
                await self._files.save("checks", spec.id, {"spec": asdict(spec)})
            self._put_check(spec, from_file)
            self._refresh_aliases({spec.service_id, spec.alias_service} if spec.service_id else None)
            self._changed()
        return spec.service_id

    @_whole
    async def deregister_check(self, check_id: str) -> None:
        """Raises NotFound."""
        known = self.checks.get(check_id)
        owner_id = known.row.service_id if known is not None else ""
        async with self._change(_check(check_id), _service(owner_id)):
            check = self.checks.get(check_id)
            if check is None:
                raise NotFound(
                    f'Unknown check ID "{check_id}". Ensure that the check ID is passed, not the check name.'
                )
            files = self._drop_check(check)
            owner = self.services.get(check.row.service_id)
            self._refresh_aliases({check.row.service_id} if check.row.service_id else None)
            try:
                await self._files.remove(*files)
                if owner is not None and not owner.from_file:
                    await self._save_service(owner, self._specs_of(owner.row.id))
            finally:
                self._changed()

    async def set_ttl_status(self, check_id: str, status: str, output: str = "") -> None:
        """What the service says about itself; its time starts anew. Raises NotFound when it is no TTL check."""
        check = self.checks.get(check_id)
        if check is None or check.spec is None or check.ttl is None:
            raise NotFound(f'CheckID "{check_id}" does not have associated TTL')
        check.ttl.renew()
        self._observe(check, Result(status, cap_reported(output, check.spec.output_bytes_max)))
        self._keep_state(check)

    def deferred_outputs(self) -> frozenset[str]:
        """Checks whose output changed, but too soon after the last time to tell the catalog."""
        return frozenset(i for i, c in self.checks.items() if c.output_timer is not None)

    # -- changing -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _change(self, *names: str) -> AsyncIterator[None]:
        """One change of a thing at a time, and none before the earlier run's registrations are back.

        Changes of different things wait for the disk together. Only what is done without waiting is done at once.
        """
        await self._started.wait()
        async with AsyncExitStack() as held:
            for name in sorted(set(names)):  # all in one order, so that no two wait for each other
                lock = self._changing.get(name)
                if lock is None:
                    lock = self._changing[name] = asyncio.Lock()
                await held.enter_async_context(lock)
            yield

    async def _put(
        self,
        parts: list[tuple[ServiceDefinition, str]],
        token: str,
        from_file: bool,
        replace_existing_checks: bool,
    ) -> None:
        """Each with the service whose sidecar it is, or "". All become visible at once, when they are on disk."""
        services: list[tuple[LocalService, list[CheckSpec]]] = []
        dropped: list[LocalCheck] = []
        for wanted, sidecar_of in parts:
            service_id = wanted.row.id
            before = self.services.get(service_id)
            if not sidecar_of and before is not None:
                sidecar_of = before.sidecar_of
            given = {spec.id for spec in wanted.checks}
            others = [c for c in self.checks_of(service_id) if c.row.id not in given]
            if replace_existing_checks:
                dropped += [c for c in others if not is_maintenance(c.row.id)]
                others = []
            refuse_too_large(self.node, wanted.row, [*wanted.checks, *(c.spec for c in others if c.spec is not None)])
            kept = [c.spec for c in others if c.spec is not None and not c.from_file]
            service = LocalService(wanted.row, wanted.token or token, sidecar_of, from_file)
            services.append((service, [*wanted.checks, *kept]))
        saving = [
            self._files.remove(("services", service.row.id)) if from_file else self._save_service(service, specs)
            for service, specs in services
        ]
        await asyncio.gather(*saving)
        files = [file for check in dropped for file in self._drop_check(check)]
        for (service, _), (wanted, _) in zip(services, parts, strict=True):
            self._put_service(service, wanted.checks)
        self._refresh_aliases(_concerned(wanted for wanted, _ in parts))
        self._changed()
        if files:
            await self._files.remove(*files)

    def _put_service(self, service: LocalService, specs: Iterable[CheckSpec]) -> None:
        row = service.row = with_ip_addresses(service.row)
        self.services[row.id] = service
        for spec in specs:
            self._put_check(replace(spec, token=spec.token or service.token), service.from_file)
        for check in self.checks_of(row.id):
            check.row = check.row._replace(service_name=row.name, service_tags=row.tags)

    def _put_check(self, spec: CheckSpec, from_file: bool) -> None:
        """Run `spec` from now on. A check that was there keeps its status; one that did not change keeps running."""
        before = self.checks.get(spec.id)
        if before is not None and before.spec == spec and before.row.service_id == spec.service_id:
            before.from_file = from_file
            return
        owner = self.services.get(spec.service_id)
        row = CheckRow(
            node=self.node,
            id=spec.id,
            name=spec.name,
            status=spec.status,
            notes=spec.notes,
            service_id=spec.service_id,
            service_name=owner.row.name if owner else "",
            service_tags=owner.row.tags if owner else (),
            type=spec.type,
        )
        kept = self._states.pop(spec.id, None)
        if before is not None and before.spec is not None:
            self._stop_check(before)
            row = row._replace(status=before.row.status, output=before.row.output)
            kept = None
        elif kept is not None and kept.get("type") == spec.type and kept.get("service_id") == spec.service_id:
            row = row._replace(status=kept["status"], output=kept["output"])
        else:
            kept = None
        check = LocalCheck(row, spec, spec.token, from_file, Thresholds.of(spec))
        if row.status == CRITICAL:
            check.critical_since = time.monotonic()
        self.checks[spec.id] = check
        self._start_check(check, spec, kept)

    def _start_check(self, check: LocalCheck, spec: CheckSpec, kept: Mapping[str, Any] | None) -> None:
        kind = kinds.of(spec)
        if kind is kinds.TTL:
            left_s = None
            if kept is not None and kept.get("expires_at"):
                left_s = min(spec.ttl_s, max(0.0, kept["expires_at"] - self._wall()))
            check.ttl = Deadline(spec.ttl_s, lambda: self._expire(check), first_s=left_s)
            check.stop = check.ttl.stop
        elif kind.probe is None:
            if spec.alias_node and spec.alias_node != self.node and self._results is not None:
                check.stop = follow(spec, self._results, lambda result: self._observe(check, _capped(result, spec)))
        else:
            owner = self.services.get(spec.service_id)
            # Its process starts along with this agent: what it was before is true until it has had time to listen.
            settles = kept is not None and check.row.status != CRITICAL and owner is not None and bool(owner.sidecar_of)
            work = partial(
                run_periodically,
                spec,
                kind.probe,
                observe=partial(self._observe, check),
                is_critical=lambda: check.row.status == CRITICAL,
                settles_s=SIDECAR_SETTLES_S if settles else 0.0,
                random=self._random,
            )
            most_s = max(AGAIN_MAX_S, spec.interval_s)
            check.task = self._tasks.keep(f"check {spec.id}", work, first_s=spec.interval_s, most_s=most_s)

    def _stop_check(self, check: LocalCheck) -> None:
        check.stop()
        check.stop = lambda: None
        if check.task is not None:
            check.task.cancel()
        if check.output_timer is not None:
            check.output_timer.cancel()
            check.output_timer = None

    def _drop_check(self, check: LocalCheck) -> list[tuple[str, str]]:
        """Ends it. The files that are to be removed."""
        self._stop_check(check)
        self.checks.pop(check.row.id, None)
        return [("checks", check.row.id), ("checks/state", check.row.id)]

    async def _maintenance(self, row: CheckRow, enable: bool, token: str) -> None:
        async with self._change(_check(row.id), _service(row.service_id)):
            before = self.checks.get(row.id)
            if enable == (before is not None) or (row.service_id and row.service_id not in self.services):
                return
            if before is not None:
                files = self._drop_check(before)
            else:
                await self._files.save("checks", row.id, {"maintenance": row._asdict(), "token": token})
                self.checks[row.id] = LocalCheck(row, token=token)
                files = []
            self._refresh_aliases({row.service_id} if row.service_id else None)
            self._changed()
            await self._files.remove(*files)

    # -- sidecars -------------------------------------------------------------------------------------------------

    def _complete_sidecar(self, sidecar: ServiceDefinition) -> ServiceDefinition:
        """The sidecar with a port, and with the default checks where it brought none."""
        row = sidecar.row
        before = self.services.get(row.id)
        port = row.port or (before.row.port if before is not None else 0)
        if not port:
            taken = {s.row.port for s in self.services.values()}
            port = self._ports.choose(row.id, row.address or self._bind_address, taken)
        sidecar = replace(sidecar, row=row._replace(port=port))
        if not sidecar.default_sidecar_checks:
            return sidecar
        bound = listener_address(sidecar.row, self._bind_address)
        parent_id = (row.proxy or {}).get("destination_service_id", "")
        listener = join_host_port({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound, bound), port)
        return expand_sidecar_checks(sidecar, listener=listener, parent_id=parent_id)

    # -- results --------------------------------------------------------------------------------------------------

    def _observe(self, check: LocalCheck, result: Result) -> None:
        status = check.thresholds.observe(result.status)
        if status is not None:
            self._set(check, status, result.output)

    def _expire(self, check: LocalCheck) -> None:
        self._set(check, CRITICAL, expired_output(check.row.output))
        self._keep_state(check)

    def _set(self, check: LocalCheck, status: str, output: str) -> None:
        """The only place where a check changes. A new status is announced now, a new output alone perhaps later."""
        if self.checks.get(check.row.id) is not check:
            return  # a probe that was under way when its check went
        output = "" if self._discard_output else cap_reported(output, self._output_bytes_max)
        row, loop = check.row, asyncio.get_running_loop()
        if status == row.status and output == row.output:
            return
        check.row = row._replace(status=status, output=output)
        if status != row.status:
            self._tell_status(check, was=row.status)
            check.critical_since = time.monotonic() if status == CRITICAL else None
            if check.output_timer is not None:
                check.output_timer.cancel()
                check.output_timer = None
            check.quiet_until = loop.time() + self._check_update_interval_s
            self._keep_state(check)
            self._refresh_aliases({row.service_id} if row.service_id else None)
            self._changed()
        elif loop.time() >= check.quiet_until:
            check.quiet_until = loop.time() + self._check_update_interval_s
            self._changed()
        elif check.output_timer is None:
            check.output_timer = loop.call_at(check.quiet_until, self._announce_output, check)

    def _tell_status(self, check: LocalCheck, *, was: str) -> None:
        """One line for each change, without the output, which may hold anything; few for a check that flaps."""
        row = check.row
        level, service = "info" if row.status == PASSING else "warn", {"service": row.service_id}
        fields = {"check": row.id, **(service if row.service_id else {}), "status": row.status, "was": was}
        self._statuses.write(level, "check changed", f"{row.id} {row.status}", fields)

    def _announce_output(self, check: LocalCheck) -> None:
        check.output_timer = None
        check.quiet_until = asyncio.get_running_loop().time() + self._check_update_interval_s
        self._changed()

    def _refresh_aliases(self, targets: set[str] | None) -> None:
        """Recompute the aliases of these services, or of all when something of the node's own changed."""
        rows: dict[str, list[CheckRow]] = {}
        aliases: list[tuple[LocalCheck, CheckSpec]] = []
        for check in self.checks.values():
            rows.setdefault(check.row.service_id, []).append(check.row)
            spec = check.spec
            if spec is None or spec.type != kinds.ALIAS.name or (spec.alias_node and spec.alias_node != self.node):
                continue
            if targets is None or spec.alias_service in targets:
                aliases.append((check, spec))
        for check, spec in aliases:
            target = spec.alias_service
            watched = [*rows.get("", ()), *(rows.get(target, ()) if target else ())]
            others = [row for row in watched if row.id != spec.id]
            result = alias_result(self.node, target, others, service_exists=target in self.services)
            self._observe(check, _capped(result, spec))

    async def _reap(self) -> None:
        """Deregister services that have been critical for as long as their definition allows."""
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            await self.reap_critical()

    async def reap_critical(self) -> None:
        """One round of it."""
        now = time.monotonic()
        for check in list(self.checks.values()):
            spec, since = check.spec, check.critical_since
            if spec is None or not spec.deregister_after_s or since is None or not spec.service_id:
                continue
            if now - since >= spec.deregister_after_s and spec.service_id in self.services:
                log.info(
                    "deregistering a service that was critical for too long", service=spec.service_id, check=spec.id
                )
                with suppress(NotFound):  # somebody was faster
                    await self.deregister_service(spec.service_id)

    # -- files ----------------------------------------------------------------------------------------------------

    def _specs_of(self, service_id: str) -> list[CheckSpec]:
        return [c.spec for c in self.checks_of(service_id) if c.spec is not None and not c.from_file]

    async def _save_service(self, service: LocalService, specs: Iterable[CheckSpec]) -> None:
        await self._files.save(
            "services",
            service.row.id,
            {
                "service": service.row._asdict(),
                "token": service.token,
                "sidecar_of": service.sidecar_of,
                "checks": [asdict(spec) for spec in specs],
            },
        )

    def _keep_state(self, check: LocalCheck) -> None:
        spec = check.spec
        if spec is None or self.checks.get(check.row.id) is not check:
            return
        row = check.row
        kept: dict[str, Any] = {
            "id": row.id,
            "service_id": row.service_id,
            "type": row.type,
            "status": row.status,
            "output": row.output,
        }
        if check.ttl is not None and row.status != CRITICAL:
            kept["expires_at"] = self._wall() + check.ttl.ttl_s
        self._files.save_soon("checks/state", row.id, kept)

    def _restore(self, what: str, kept: dict[str, Any], restore: Callable[[dict[str, Any]], None]) -> None:
        try:
            restore(kept)
        except (KeyError, TypeError, ValueError, BadRequest, ScriptsDisabled) as error:
            log.err(f"cannot restore a {what}, its file is left as it is", error=f"{type(error).__name__}: {error}")

    def _restore_service(self, kept: dict[str, Any]) -> None:
        row = _known(ServiceRow, ServiceRow._fields, kept["service"])._replace(node=self.node)
        service = LocalService(row, kept.get("token", ""), kept.get("sidecar_of", ""))
        self._put_service(service, [s for s in map(_read_spec, kept.get("checks", ())) if self._may_restore(s)])

    def _restore_check(self, kept: dict[str, Any]) -> None:
        if "maintenance" in kept:
            row = _known(CheckRow, CheckRow._fields, kept["maintenance"])._replace(node=self.node)
            if not row.service_id or row.service_id in self.services:
                self.checks[row.id] = LocalCheck(row, token=kept.get("token", ""))
            return
        spec = _read_spec(kept["spec"])
        if self._may_restore(spec) and (not spec.service_id or spec.service_id in self.services):
            self._put_check(spec, from_file=False)

    def _may_restore(self, spec: CheckSpec) -> bool:
        if not kinds.of(spec).runs_programs or self._scripts.remote:
            return True
        log.warn("a script check of an earlier run is not started: scripts are disabled now", check=spec.id)
        return False

    def _changed(self) -> None:
        for callback in list(self._listeners):
            callback()


def listener_address(proxy: ServiceRow, bind_address: str) -> str:
    """Where the public listener of a proxy binds: its config says so, else its own address, else the agent's."""
    config = (proxy.proxy or {}).get("config") or {}
    return str(config.get("bind_address") or proxy.address or bind_address)


def _concerned(parts: Iterable[ServiceDefinition]) -> set[str]:
    """The services whose aliases need a new look: the registered ones, and those that their own checks copy."""
    return {i for part in parts for i in (part.row.id, *(spec.alias_service for spec in part.checks))}


def _service(service_id: str) -> str:
    """What `_change` calls a service."""
    return f"service {service_id}"


def _check(check_id: str) -> str:
    return f"check {check_id}"


def _capped(result: Result, spec: CheckSpec) -> Result:
    return Result(result.status, cap_reported(result.output, spec.output_bytes_max))


def _read_spec(kept: Mapping[str, Any]) -> CheckSpec:
    spec: CheckSpec = _known(CheckSpec, tuple(f.name for f in fields(CheckSpec)), kept)
    return spec


def _known(kind: Any, names: tuple[str, ...], kept: Mapping[str, Any]) -> Any:
    """A value from a file that a newer or older version may have written: unknown fields are passed over."""
    return kind(**{name: frozen(value) for name, value in kept.items() if name in names})
