"""gzip for clients that accept it, where it is worth while: bodies of some size, each compressed once.

Many clients get the same body (it is rendered once per change), so its compressed form is kept beside it, bounded by
bytes. Large bodies are compressed beside the loop. Hot reads store what is sent here, so they cost nothing more.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import OrderedDict

from rostra.agent.http.routing import Response

#: Smaller ones fit in a few packets anyway.
BYTES_MIN = 4096
#: Compressing larger ones would hold the loop.
INLINE_BYTES = 16 << 10
KEPT_BYTES_MAX = 8 << 20


class Compression:
    def __init__(self, *, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._kept: OrderedDict[int, tuple[bytes, bytes]] = OrderedDict()  # by the body's id: it is alive as long
        self.kept_bytes = 0

    async def apply(self, response: Response, accepted: str) -> None:
        """Compress the response's body if that is wanted and worth it; `accepted` is `Accept-Encoding`."""
        body = response.body
        if len(body) < BYTES_MIN or "Content-Encoding" in response.headers:
            return
        response.headers = {**response.headers, "Vary": "Accept-Encoding"}
        if not accepts_gzip(accepted):
            return
        kept = self._kept.get(id(body))
        if kept is None:
            small = _gzip(body) if len(body) <= INLINE_BYTES else await asyncio.to_thread(_gzip, body)
            self._keep(body, small)
        else:
            small = kept[1]
            self._kept.move_to_end(id(body))
        response.body = small
        response.headers["Content-Encoding"] = "gzip"

    def _keep(self, body: bytes, small: bytes) -> None:
        size = len(body) + len(small)
        if size > self._kept_bytes_max // 2 or id(body) in self._kept:
            return
        self._kept[id(body)] = body, small
        self.kept_bytes += size
        while self.kept_bytes > self._kept_bytes_max:
            _, (old, old_small) = self._kept.popitem(last=False)
            self.kept_bytes -= len(old) + len(old_small)


def accepts_gzip(accepted: str) -> bool:
    """Whether gzip is named and not refused (`q=0`)."""
    for part in accepted.split(","):
        name, _, q = part.partition(";")
        if name.strip().lower() == "gzip":
            value = q.strip().removeprefix("q=").strip()
            return not value or value.strip("0.") != ""
    return False


def _gzip(body: bytes) -> bytes:
    worker = zlib.compressobj(level=1, wbits=31)
    return worker.compress(body) + worker.flush()
