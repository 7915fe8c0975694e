"""HCL1 and JSON text → plain dicts and lists that remember where each key stood.

One scanner serves both: `parse_hcl` and `parse_json` give a `Document`, whose `where(container, key)` is the
`file:line:column` that an error message needs. Called by `agent/config/loading.py`, at no other time; it knows no
configuration key. HCL1 as Consul reads it. A block that occurs once is a dict, one that is repeated is a list of dicts.
A label is one more level: `service "web" { … }` is {"service": {"web": {…}}}. `${…}` is kept as written.
"""

from __future__ import annotations

import re
from typing import Any

_NESTING_MAX = 100

_HCL_TOKEN = re.compile(
    r"""(?P<name>[^\W\d][\w.-]*)
      | (?P<number>-?(?:0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.]))
      | (?P<string>"(?:[^"\\\n$]|\\[^\n]|\$(?!\{))*")
      | (?P<heredoc><<-?[^\W\d]\w*[ \t]*\r?\n)
      | (?P<mark>[{}\[\]=,])""",
    re.VERBOSE,
)
_HCL_SPACE = re.compile(r"(?:[ \t\r\n\ufeff]+|#[^\n]*|//[^\n]*|/\*.*?\*/)*", re.DOTALL)

_JSON_TOKEN = re.compile(
    r"""(?P<name>true|false|null)\b
      | (?P<number>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<string>"(?:[^"\\\x00-\x1f]|\\[^\n])*")
      | (?P<mark>[{}\[\]:,])""",
    re.VERBOSE | re.ASCII,
)
_JSON_SPACE = re.compile(r"[ \t\r\n\ufeff]*")

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{3}|.)", re.DOTALL)
_SIMPLE_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", '"': '"', "\\": "\\"}
_CONSTANTS = {"true": True, "false": False}
_END = "end of file"


class SyntaxProblem(ValueError):
    """Text that is not HCL or JSON; `str(e)` is `file:line:column: what was expected`."""

    def __init__(self, file: str, line: int, column: int, message: str) -> None:
        super().__init__(f"{file}:{line}:{column}: {message}")
        self.file, self.line, self.column, self.message = file, line, column, message


class Document:
    """A parsed file: `value` is plain data, `where()` tells where a piece of it was written."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.value: dict[str, Any] = {}
        self.repeated: list[tuple[dict[str, Any], str]] = []  # scalars given twice in one block; the last one counts
        self._text = text
        self._offsets: dict[tuple[int, str | int], int] = {}  # (id of the container, key); `value` keeps them alive

    def where(self, container: Any = None, key: str | int = "") -> str:
        """`file:line:column` of that key (or list index) of that dict (or list) within `value`."""
        offset = self._offsets.get((id(container), key))
        if offset is None:
            return self.file
        line, column = self._line_column(offset)
        return f"{self.file}:{line}:{column}"

    def _line_column(self, offset: int) -> tuple[int, int]:
        return self._text.count("\n", 0, offset) + 1, offset - self._text.rfind("\n", 0, offset)


def parse_hcl(text: str, file: str = "") -> Document:
    """The document written in `text`; text that starts with `{` is JSON, as in Consul. Raises SyntaxProblem."""
    if text.lstrip(" \t\r\n\ufeff").startswith("{"):
        return parse_json(text, file)
    scanner = _Hcl(file, text)
    scanner.document.value = scanner.items(closing="", depth=0)
    return scanner.document


def parse_json(text: str, file: str = "") -> Document:
    """The JSON object written in `text`. Raises SyntaxProblem."""
    scanner = _Json(file, text)
    kind, word, at = scanner.next()
    if word != "{":
        raise scanner.fail(at, f"expected an object that starts with '{{', found {_show(kind, word)}")
    scanner.document.value = scanner.object(depth=1)
    kind, word, at = scanner.next()
    if kind:
        raise scanner.fail(at, f"nothing may follow the object, found {_show(kind, word)}")
    return scanner.document


class _Scanner:
    """Tokens are (kind, text, offset); kind "" is the end of the file."""

    token_pattern: re.Pattern[str]
    space_pattern: re.Pattern[str]

    def __init__(self, file: str, text: str) -> None:
        self.document = Document(file, text)
        self.text = text
        self.offsets = self.document._offsets
        self.position = 0

    def next(self) -> tuple[str, str, int]:
        space = self.space_pattern.match(self.text, self.position)
        at = space.end() if space else self.position
        found = self.token_pattern.match(self.text, at)
        if found is None:
            self.position = at
            return self.unusual(at)
        self.position = found.end()
        return found.lastgroup or "", found.group(), at

    def unusual(self, at: int) -> tuple[str, str, int]:
        """Called where no token matches: the end, or an error worth a word of its own."""
        rest = self.text[at : at + 2]
        if not rest:
            return "", _END, at
        if rest == "/*":
            raise self.fail(at, "comment not closed: '*/' is missing")
        if rest[0] == '"':
            raise self.fail(at, "string not closed: '\"' is missing at the end of the line")
        raise self.fail(at, f"unexpected character {rest[0]!r}")

    def fail(self, at: int, message: str) -> SyntaxProblem:
        line, column = self.document._line_column(at)
        return SyntaxProblem(self.document.file, line, column, message)

    def deeper(self, depth: int, at: int) -> int:
        if depth >= _NESTING_MAX:
            raise self.fail(at, f"nested more than {_NESTING_MAX} levels deep")
        return depth + 1

    def unquote(self, word: str, at: int) -> str:
        body = word[1:-1]
        if "\\" not in body:
            return body

        def character(found: re.Match[str]) -> str:
            code = found.group(1)
            if code in _SIMPLE_ESCAPES:
                return _SIMPLE_ESCAPES[code]
            if code[0] in "uUx" and len(code) > 1 and int(code[1:], 16) <= 0x10FFFF:
                return chr(int(code[1:], 16))
            if len(code) == 3:
                return chr(int(code, 8))
            return self.odd_escape(code, at + 1 + found.start())

        text = _ESCAPE.sub(character, body)
        if any("\ud800" <= c <= "\udfff" for c in text):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON writes 😀 as two \u
        return text

    def odd_escape(self, code: str, at: int) -> str:
        raise self.fail(at, f"unknown escape '\\{code}' in a string")


class _Json(_Scanner):
    token_pattern = _JSON_TOKEN
    space_pattern = _JSON_SPACE

    def odd_escape(self, code: str, at: int) -> str:
        return "/" if code == "/" else super().odd_escape(code, at)

    def object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        kind, word, at = self.next()
        if word == "}" and kind == "mark":
            return found
        while True:
            if kind != "string":
                raise self.fail(at, f'expected a key in "quotes", found {_show(kind, word)}')
            key = self.unquote(word, at)
            colon_kind, colon, colon_at = self.next()
            if colon_kind != "mark" or colon != ":":
                raise self.fail(colon_at, f"expected ':' after the key {key!r}, found {_show(colon_kind, colon)}")
            if key in found:
                self.document.repeated.append((found, key))
            self.offsets[id(found), key] = at
            found[key] = self.value(depth)
            kind, word, at = self.next()
            if kind == "mark" and word == "}":
                return found
            if kind != "mark" or word != ",":
                raise self.fail(at, f"expected ',' or '}}' after the value of {key!r}, found {_show(kind, word)}")
            comma_at = at
            kind, word, at = self.next()
            if kind == "mark" and word == "}":
                raise self.fail(comma_at, "a comma after the last entry is not JSON")

    def array(self, depth: int) -> list[Any]:
        found: list[Any] = []
        before = self.position
        kind, word, _at = self.next()
        if kind == "mark" and word == "]":
            return found
        self.position = before
        while True:
            space = self.space_pattern.match(self.text, self.position)
            self.offsets[id(found), len(found)] = space.end() if space else self.position
            found.append(self.value(depth))
            kind, word, at = self.next()
            if kind == "mark" and word == "]":
                return found
            if kind != "mark" or word != ",":
                raise self.fail(at, f"expected ',' or ']' in the list, found {_show(kind, word)}")

    def value(self, depth: int) -> Any:
        kind, word, at = self.next()
        if kind == "string":
            return self.unquote(word, at)
        if kind == "number":
            return float(word) if any(c in word for c in ".eE") else int(word)
        if kind == "name":
            return _CONSTANTS.get(word)
        if word == "{":
            return self.object(self.deeper(depth, at))
        if word == "[":
            return self.array(self.deeper(depth, at))
        raise self.fail(at, f"expected a value, found {_show(kind, word)}")


class _Hcl(_Scanner):
    token_pattern = _HCL_TOKEN
    space_pattern = _HCL_SPACE

    def unusual(self, at: int) -> tuple[str, str, int]:
        if self.text.startswith('"', at):
            return "string", self.interpolated(at), at
        if self.text.startswith("<<", at):
            raise self.fail(at, "a heredoc begins with <<NAME or <<-NAME at the end of its line")
        return super().unusual(at)

    def interpolated(self, start: int) -> str:
        """A string token with `${…}` in it, in which quotes and newlines do not end the string."""
        depth, at = 0, start + 1
        while at < len(self.text):
            c = self.text[at]
            if c == "\\":
                at += 1
            elif self.text.startswith("${", at):
                depth, at = depth + 1, at + 1
            elif c == "}" and depth:
                depth -= 1
            elif c == '"' and not depth:
                self.position = at + 1
                return self.text[start : at + 1]
            elif c == "\n" and not depth:
                break
            at += 1
        raise self.fail(start, "string not closed: '\"' is missing at the end of the line")

    def items(self, closing: str, depth: int, opened_at: int = 0) -> dict[str, Any]:
        """The entries of a block up to its `}`, or of the file up to its end."""
        found: dict[str, Any] = {}
        while True:
            kind, word, at = self.next()
            if kind == "mark" and word == ",":
                continue
            if not kind and closing:
                line, _column = self.document._line_column(opened_at)
                raise self.fail(at, f"expected '}}' to close the block opened in line {line}, found {_END}")
            if not kind or (kind == "mark" and word == closing):
                return found
            if kind not in ("name", "string"):
                raise self.fail(at, f"expected a key, found {_show(kind, word)}")
            self.entry(found, kind, word, at, depth)

    def entry(self, found: dict[str, Any], kind: str, word: str, at: int, depth: int) -> None:
        keys = [(word if kind == "name" else self.unquote(word, at), at)]
        while True:
            kind, word, here = self.next()
            if kind in ("name", "string"):
                keys.append((word if kind == "name" else self.unquote(word, here), here))
                continue
            break
        name = keys[0][0]
        if kind == "mark" and word == "{":
            value: Any = self.items("}", self.deeper(depth + len(keys), here), here)
            for label, label_at in reversed(keys[1:]):
                labelled = {label: value}
                self.offsets[id(labelled), label] = label_at
                value = labelled
        elif kind == "mark" and word == "=":
            if len(keys) > 1:
                raise self.fail(here, f"expected '{{' after the labels of {name!r}, found '='")
            value = self.value(depth, name)
        else:
            raise self.fail(here, f"expected '=' or '{{' after {keys[-1][0]!r}, found {_show(kind, word)}")
        self.put(found, name, value, at)

    def put(self, found: dict[str, Any], name: str, value: Any, at: int) -> None:
        """Repeated blocks (and lists of blocks) collect; of repeated scalars the last one counts."""
        old = found.get(name)
        if name in found and _is_blocks(old) and _is_blocks(value):
            blocks: list[Any] = old if isinstance(old, list) else [old]
            if blocks is not old:
                self.offsets[id(blocks), 0] = self.offsets[id(found), name]
                found[name] = blocks
            for i, block in enumerate([value] if isinstance(value, dict) else value):
                self.offsets[id(blocks), len(blocks)] = at if isinstance(value, dict) else self.offsets[id(value), i]
                blocks.append(block)
            return
        if name in found:
            self.document.repeated.append((found, name))
        self.offsets[id(found), name] = at
        found[name] = value

    def value(self, depth: int, name: str) -> Any:
        start = self.position
        kind, word, at = self.next()
        if kind == "string":
            return self.unquote(word, at)
        if kind == "number":
            return self.number(word)
        if kind == "heredoc":
            return self.heredoc(word, at)
        if kind == "name":
            if word in _CONSTANTS:
                return _CONSTANTS[word]
            if "\n" in self.text[start:at]:
                raise self.fail(at, f"expected a value for {name!r}, found {_show(kind, word)}")
            raise self.fail(at, f'the value of {name!r} needs quotes: "{word}"')
        if word == "{":
            return self.items("}", self.deeper(depth, at), at)
        if word == "[":
            return self.list(self.deeper(depth, at), name, at)
        raise self.fail(at, f"expected a value for {name!r}, found {_show(kind, word)}")

    def list(self, depth: int, name: str, opened_at: int) -> list[Any]:
        found: list[Any] = []
        while True:
            before = self.position
            kind, word, at = self.next()
            if kind == "mark" and word == "]":
                return found
            if not kind:
                line, _column = self.document._line_column(opened_at)
                raise self.fail(at, f"expected ']' to close the list opened in line {line}, found {_END}")
            self.position = before
            self.offsets[id(found), len(found)] = at
            found.append(self.value(depth, name))
            kind, word, at = self.next()
            if kind == "mark" and word == "]":
                return found
            if kind != "mark" or word != ",":
                raise self.fail(at, f"expected ',' or ']' in the list {name!r}, found {_show(kind, word)}")

    def number(self, word: str) -> int | float:
        digits = word.lstrip("-")
        sign = -1 if word.startswith("-") else 1
        if digits[:2] in ("0x", "0X"):
            return sign * int(digits, 16)
        if any(c in digits for c in ".eE"):
            return sign * float(digits)
        if len(digits) > 1 and digits.startswith("0") and not set(digits) - set("01234567"):
            return sign * int(digits, 8)
        return sign * int(digits)

    def heredoc(self, word: str, at: int) -> str:
        """The lines up to the one that holds the marker alone; `<<-` takes the marker's indentation off each line."""
        indented = word.startswith("<<-")
        marker = word.lstrip("<-").strip()
        end = re.compile(rf"^([ \t]*){re.escape(marker)}[ \t]*\r?$", re.MULTILINE).search(self.text, self.position)
        if end is None:
            raise self.fail(at, f"heredoc not closed: no line holds {marker} alone")
        body = self.text[self.position : end.start()]
        self.position = end.end()
        prefix = end.group(1)
        lines = body.split("\n")[:-1]
        if indented and prefix and all(line.startswith(prefix) for line in lines):
            return "".join(line[len(prefix) :] + "\n" for line in lines)
        return body


def _is_blocks(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _show(kind: str, word: str) -> str:
    if not kind:
        return word
    word = word if len(word) <= 40 else word[:37] + "..."
    return word if kind == "string" else f"'{word.strip()}'"
