"""Exactly once: whose writes were applied with what result, kept until the client says that it has the answer.

A client numbers its writes and sends with each the lowest number whose result it may still ask for. Results are dropped
by that, never by time; of the clients themselves, the one that wrote least recently is forgotten first. Part of the
replicated state: the same on every server, and in snapshots. `Store.apply` calls this for every entry.
"""

from __future__ import annotations

from typing import Any

#: Results that a client may leave unacknowledged; further writes are refused until it reports progress.
OUTSTANDING_MAX = 8192
#: Clients whose results are remembered.
CLIENTS_MAX = 16384

Result = tuple[Any, ...]


class Client:
    """One who writes. `results` holds those of `first` and later writes, in the order in which they were applied."""

    __slots__ = ("first", "results", "used")

    def __init__(self, first: int, used: int) -> None:
        self.first = first
        self.used = used  # the state's index at its last write
        self.results: dict[int, Result] = {}


class Clients:
    """All clients, the one that wrote last at the end."""

    def __init__(self) -> None:
        self.rows: dict[str, Client] = {}
        self._newest: Client | None = None

    def refusal(self, client: Client | None, sequence: int, first: int) -> Result | None:
        """Why a write that has no result here must not be applied; None: it is new."""
        known = client.first if client is not None else first
        if sequence < known:
            return ("err", "conflict", "a write was repeated after its result had been acknowledged")
        if sequence - max(known, first) >= OUTSTANDING_MAX:
            return (
                "err",
                "bad_request",
                f"more than {OUTSTANDING_MAX} writes of one client have no acknowledged result",
            )
        return None

    def remember(
        self, client_id: str, client: Client | None, sequence: int, first: int, result: Result, index: int
    ) -> None:
        """Keep a result for as long as the client may ask for it, and drop those that it has."""
        if client is None:
            client = self.rows[client_id] = self._newest = Client(first, index)
            if len(self.rows) > CLIENTS_MAX:
                del self.rows[next(iter(self.rows))]
        else:
            results = client.results
            if client.first < first:
                if first - client.first > len(results):
                    client.results = {at: kept for at, kept in results.items() if at >= first}
                else:
                    for at in range(client.first, first):
                        results.pop(at, None)
                client.first = first
            if client is not self._newest:  # the order of the dict is the order of last use
                del self.rows[client_id]
                self.rows[client_id] = self._newest = client
            client.used = index
        client.results[sequence] = result

    def load(self, client_id: str, first: int, used: int, results: Any) -> None:
        """While loading: a client with some of its results; those of a client may come in parts."""
        client = self.rows.get(client_id)
        if client is None:
            client = self.rows[client_id] = self._newest = Client(first, used)
        client.results.update(results)
