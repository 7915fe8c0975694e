"""Every GET that shows rows of the state goes through `answer`: consistency, blocking, caching, headers, once.

A blocking query (`?index=N`) parks on the shared watch of its question and answers when the index passed N *and* its
own rendered view differs from the one at N. A change that its filter hides does not wake it. At the end of its wait it
answers with what is there. An N that lies ahead of the present index waits.
"""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass
from typing import Any

from rostra.agent.context import Agent
from rostra.agent.http.routing import JSON_TYPE, Request, Response
from rostra.agent.results import Entry, Live, Rendered, Rendering, RowSet
from rostra.agent.servers_port import Barrier, Mode
from rostra.wire.durations import SECOND, parse_duration
from rostra.wire.errors import BadRequest

#: The stored answers of larger bodies would crowd out the others, and their cost is in the writing anyway.
HOT_BODY_BYTES_MAX = 256 << 10

_DIGITS = re.compile(r"[0-9]{1,20}")
_EFFECTIVE = {"default": "leader", "consistent": "consistent", "stale": "stale"}


@dataclass(frozen=True, slots=True)
class ReadOptions:
    mode: Mode
    index: int  # 0: do not block
    wait_s: float
    cached: bool


@dataclass(frozen=True, slots=True, eq=False)
class Hot:
    """Why the same bytes may be answered again: what was read, and in which mode."""

    entry: Entry
    mode: Mode


_PLAIN = ReadOptions("default", 0, 0.0, False)


def read_options(request: Request, agent: Agent) -> ReadOptions:
    """The parameters that all reads share. Raises BadRequest with the texts that clients know."""
    query = request.query
    if not query:
        return _PLAIN
    stale, consistent, cached = query.has("stale"), query.has("consistent"), query.has("cached")
    if stale and consistent:
        raise BadRequest("Cannot specify ?stale with ?consistent, conflicting semantics.")
    if cached and consistent:
        raise BadRequest("Cannot specify ?cached with ?consistent, conflicting semantics.")
    if query.get("filter"):
        raise BadRequest("?filter is not supported yet: filter the answer, or use ?tag, ?node-meta, ?passing")
    index, wait_s = query.get("index"), how_long(request, agent)
    if index and (not _DIGITS.fullmatch(index) or int(index) >= 2**64):
        raise BadRequest("Invalid index")
    mode: Mode = "stale" if stale else "consistent" if consistent else "default"
    return ReadOptions(mode, int(index or 0), wait_s, cached)


def how_long(request: Request, agent: Agent) -> float:
    """Seconds that a question waits for a change, as its `?wait` and the agent's settings say. Raises BadRequest."""
    wait, config = request.query.get("wait"), agent.config
    if not wait:
        return config.default_query_time_s
    try:
        wait_s = parse_duration(wait) / SECOND
    except ValueError:
        raise BadRequest("Invalid wait time") from None
    return min(wait_s, config.max_query_time_s) if wait_s > 0 else config.default_query_time_s


async def answer(
    request: Request,
    agent: Agent,
    query: Any,
    view: Rendering,
    *,
    options: ReadOptions | None = None,
    cacheable: bool = False,
    always_cached: bool = False,
    missing_is_404: bool = False,
    content_type: str = JSON_TYPE,
    headers: dict[str, str] | None = None,
) -> Response:
    """The view of `query`'s rows as the request asks for it.

    `cacheable`: `?cached` is honoured; `always_cached`: as if it were given. `missing_is_404`: no rows is an empty 404.
    """
    options = options or read_options(request, agent)
    cached = always_cached or (cacheable and options.cached)
    hit: bool | None = None
    age_s = 0.0
    hot: Hot | None = None
    source: RowSet
    if options.index:
        rendered, index, barrier = await _block(request, agent, query, view, options)
        hit = True if cached else None
    else:
        live = agent.results.live(query, token=request.token) if cached else None
        if live is not None and live.is_ready and live.error is None:
            hit, age_s, source, barrier = True, live.age_s, live, agent.results.last_barrier
        else:
            hit = False if cached else None
            entry, barrier = await agent.results.fetch_with_barrier(query, mode=options.mode, token=request.token)
            source = entry
            if hit is None and not request.query.has("near"):
                hot = Hot(entry, options.mode)
        ready = source.rendered(view)
        rendered, index = (ready, source.index) if ready is not None else await source.render(view)
    out = {
        "X-Consul-Effective-Consistency": _EFFECTIVE[options.mode],
        "X-Consul-Index": str(index or 1),
        "X-Consul-KnownLeader": "true" if barrier.known_leader else "false",
        "X-Consul-LastContact": str(barrier.last_contact_ms),
    }
    if hit is not None:
        out["X-Cache"] = "HIT" if hit else "MISS"
        if hit:
            out["Age"] = str(int(age_s))
    if hot is not None and len(rendered.body) > HOT_BODY_BYTES_MAX:
        hot = None
    if missing_is_404 and not rendered.count:
        return Response(404, b"", out, hot)
    out["Content-Type"] = content_type
    if headers:
        out |= headers
    return Response(200, rendered.body, out, hot)


async def _block(
    request: Request, agent: Agent, query: Any, view: Rendering, options: ReadOptions
) -> tuple[Rendered, int, Barrier]:
    results, seen = agent.results, options.index
    loop = asyncio.get_running_loop()
    jitter_s = random.random() * options.wait_s / 16  # noqa: S311 - spreads clients, guards nothing
    deadline = loop.time() + options.wait_s + jitter_s
    baseline: Rendered | None = None  # the view at index `seen`, once known
    live = results.live_if_ready(query, token=request.token)
    if live is None or live.index > seen:
        entry, barrier = await results.fetch_with_barrier(query, mode=options.mode, token=request.token)
        if entry.index > seen:
            return *await _shared(entry, live).render(view), barrier
        if entry.index == seen:
            baseline, _ = await entry.render(view)
        live = results.live(query, token=request.token)
    epoch = live.epoch
    while await live.ready(deadline - loop.time()):
        version = live.version
        if live.index > seen or live.epoch != epoch:
            rendered, index = await live.render(view)
            if live.epoch != epoch or (index > seen and (baseline is None or not rendered.same_as(baseline))):
                return rendered, index, results.last_barrier
        elif live.index == seen and baseline is None:
            rendered, index = await live.render(view)
            if index == seen:
                baseline = rendered
            continue
        if not await live.wait_change(version, deadline - loop.time()):
            break
    entry, barrier = await results.fetch_with_barrier(query, mode=options.mode, token=request.token)
    return *await _shared(entry, live).render(view), barrier


def _shared(entry: Entry, live: Live | None) -> RowSet:
    """Equal index, equal rows: then the watch's fragments, which are encoded already, serve as well."""
    return live if live is not None and live.is_ready and live.index == entry.index else entry
