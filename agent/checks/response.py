"""An answer to an HTTP check, taken apart as its bytes come: the status line decides, the rest is only shown.

Sans-IO: bytes go in by `feed`, and each `step` does one small piece of work. So its driver can stop between two of
them, also where the other side sends endless heads, bodies or chunks of one byte. Heads are bounded, of a body the last
bytes are kept and no more than a bound is read. Lenient where Go's client is: line feeds alone, no reason, any HTTP
version number; a body that is cut short, late or damaged changes nothing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

#: Of a head, interim answers included; and of a body as it comes over the wire and as it was before compression.
HEAD_BYTES_MAX = 256 << 10
BODY_BYTES_MAX = 1 << 20
_INTERIM_MAX = 5
#: Of a body taken in one step, and what one step unpacks at most.
_STEP_BYTES = 16 << 10
_VERSION = re.compile(rb"HTTP/(\d{1,7})\.(\d{1,7})")
_BROKEN = "net/http: HTTP/1.x transport connection broken: "


class Malformed(Exception):
    """The other side does not speak HTTP/1."""


class Response:
    """`has_body`: whether the request allows one. `unpacks`: a compressed body is unpacked, for we asked for it."""

    def __init__(self, keep: int, *, has_body: bool = True, unpacks: bool = True) -> None:
        self.status, self.status_text = 0, ""
        #: The head is complete: the status is known.
        self.decided = False
        #: Nothing more is wanted.
        self.ended = False
        self.fields: dict[str, str] = {}
        self.tail = bytearray()
        self._keep, self._has_body, self._unpacks = keep, has_body, unpacks
        self._data = bytearray()
        self._searched = 0  # so far there is no line feed in `_data`
        self._next: Callable[[], bool] = self._status_line
        self._head_left, self._left = HEAD_BYTES_MAX, 0  # `_left`: of the body's part that is being read
        self._body_left = self._shown_left = BODY_BYTES_MAX
        self._interim, self._name, self._is_1_0 = 0, "", False
        self._inflate: zlib._Decompress | None = None

    def feed(self, data: bytes) -> None:
        self._data += data

    def step(self) -> bool:
        """One piece of work. False: more bytes are needed, or none any more. Raises Malformed while not `decided`."""
        return not self.ended and self._next()

    def end_of_stream(self) -> None:
        """No more bytes come, and `step` has taken what there was."""
        if not self.decided:
            raise Malformed(_BROKEN + "unexpected EOF" if self.status or self._data else "EOF")
        self.ended = True

    # -- the head -------------------------------------------------------------------------------------------------

    def _line(self) -> bytes | None:
        """The next line without its end; None while it is not complete."""
        at = self._data.find(b"\n", self._searched)
        if (len(self._data) if at < 0 else at + 1) > self._head_left:
            raise Malformed(f"net/http: server response headers exceeded {HEAD_BYTES_MAX} bytes; aborted")
        if at < 0:
            self._searched = len(self._data)
            return None
        line = bytes(self._data[:at])
        del self._data[: at + 1]
        self._searched = 0
        self._head_left -= at + 1
        return line.removesuffix(b"\r")

    def _status_line(self) -> bool:
        line = self._line()
        if line is None:
            return False
        shown = line[:100].decode("latin-1")
        proto, space, rest = line.partition(b" ")
        code, _, _ = rest.lstrip(b" ").partition(b" ")
        if not space:
            raise Malformed(f'{_BROKEN}malformed HTTP response "{shown}"')
        if len(code) != 3 or not code.isdigit():
            raise Malformed(f'{_BROKEN}malformed HTTP status code "{code[:100].decode("latin-1")}"')
        version = _VERSION.fullmatch(proto)
        if version is None:
            raise Malformed(f'{_BROKEN}malformed HTTP version "{proto[:100].decode("latin-1")}"')
        self._is_1_0 = int(version[1]) < 1 or (int(version[1]) == 1 and version[2] == b"0")
        self.status = int(code)
        self.status_text = rest.lstrip(b" ").decode("latin-1")  # with its reason
        self._name = ""
        self.fields.clear()
        self._next = self._field
        return True

    def _field(self) -> bool:
        line = self._line()
        if line is None:
            return False
        if not line:
            self._end_head()
        elif line[:1] in (b" ", b"\t"):
            if not self._name:
                raise Malformed(f"{_BROKEN}malformed MIME header initial line: {line[:100].decode('latin-1')}")
            if self._name in self.fields:
                self.fields[self._name] += " " + line.strip().decode("latin-1")
        else:
            name, colon, value = line.partition(b":")
            if not colon:
                raise Malformed(f'{_BROKEN}malformed MIME header: missing colon: "{line[:100].decode("latin-1")}"')
            self._name = name.strip().decode("latin-1").lower()
            if self._name in _READ:
                self._take(self._name, value.strip().decode("latin-1"))
        return True

    def _take(self, name: str, value: str) -> None:
        had = self.fields.setdefault(name, value)
        if had != value and name == "content-length":
            raise Malformed(
                f"{_BROKEN}http: message cannot contain multiple Content-Length headers; got"
                f' ["{had[:40]}" "{value[:40]}"]'
            )

    def _end_head(self) -> None:
        if 100 <= self.status < 200 and self.status != 101:
            self._interim += 1
            if self._interim > _INTERIM_MAX:
                raise Malformed("net/http: too many 1xx informational responses")
            self.status = 0
            self._next = self._status_line
            return
        encoding, length = self.fields.get("transfer-encoding"), self.fields.get("content-length")
        if self._is_1_0:
            encoding = None
        if encoding is not None and encoding.lower() != "chunked":
            raise Malformed(f'{_BROKEN}unsupported transfer encoding: "{encoding[:100]}"')
        if encoding is None and length is not None and not (length.isascii() and length.isdigit() and len(length) < 19):
            raise Malformed(f'{_BROKEN}bad Content-Length "{length[:100]}"')
        self.decided = True
        if self.fields.get("content-encoding", "").lower() == "gzip" and self._unpacks:
            self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
        if not self._has_body or self.status in (101, 204, 304):
            self.ended = True
        elif encoding is not None:
            self._next = self._chunk_size
        else:
            self._left = int(length) if length is not None else BODY_BYTES_MAX
            self.ended = self._left == 0
            self._next = self._rest

    # -- the body -------------------------------------------------------------------------------------------------

    def _rest(self) -> bool:
        if not self._piece():
            return False
        self.ended = self.ended or not self._left
        return True

    def _piece(self) -> bool:
        """Some bytes of `_left`."""
        piece = bytes(self._data[: min(_STEP_BYTES, self._left)])
        if not piece:
            return False
        del self._data[: len(piece)]
        self._left -= len(piece)
        self._pay(len(piece))
        if self._inflate is None:
            self._show(piece)
        else:
            self._unpack(self._inflate, piece)
        return True

    def _unpack(self, inflate: zlib._Decompress, piece: bytes) -> None:
        try:
            while piece and not self.ended:
                self._show(inflate.decompress(piece, _STEP_BYTES))
                piece = inflate.unconsumed_tail
            self.ended = self.ended or inflate.eof
        except zlib.error:
            self.ended = True

    def _show(self, plain: bytes) -> None:
        self._shown_left -= len(plain)
        self.tail += plain
        del self.tail[: -self._keep]
        self.ended = self.ended or self._shown_left <= 0

    def _pay(self, size: int) -> None:
        self._body_left -= size
        self.ended = self.ended or self._body_left <= 0

    def _chunk_line(self) -> bytes | None:
        """As `_line`; a line that is too long for one of a chunk ends the body."""
        at = self._data.find(b"\n", 0, 4096)
        if at < 0:
            self.ended = len(self._data) >= 4096
            return None
        line = bytes(self._data[:at]).removesuffix(b"\r")
        del self._data[: at + 1]
        self._pay(at + 1)
        return line

    def _chunk_size(self) -> bool:
        line = self._chunk_line()
        if line is None:
            return False
        digits = line.partition(b";")[0].strip()
        if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
            self.ended = True
            return True
        self._left = int(digits, 16)
        self.ended = self.ended or not self._left
        self._next = self._chunk
        return True

    def _chunk(self) -> bool:
        if self._left:
            return self._piece()
        line = self._chunk_line()
        if line is None:
            return False
        self.ended = self.ended or bool(line)
        self._next = self._chunk_size
        return True


#: The fields that are read of a head; all else is passed over.
_READ = frozenset(("content-length", "transfer-encoding", "content-encoding", "location"))
