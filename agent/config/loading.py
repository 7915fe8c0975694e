"""Flags, JSON and HCL files → one frozen `Config`, or every problem at once.

Keys that nobody knows are errors. Definitions are handed on as plain maps (`Definition`). null is "not set", and "" in
lists and maps of strings. `agent/hcl.py` is imported only where there is a file to read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rostra.agent.config.found import BAD, ConfigErrors, Found, describe
from rostra.agent.config.rules import settle
from rostra.agent.config.settings import DEFAULTS, SETTINGS, UNUSED, UNUSED_FLAGS, UNUSED_SWITCHES, Config, Definition
from rostra.agent.schema import CHECK, SERVICE, Form, Many, MapOf, Table, Type
from rostra.agent.values import DEFINED, SWITCH, TEXT, Kind, update

if TYPE_CHECKING:
    from rostra.agent import hcl  # imported where a file is read: an agent that is told all by flags needs no parser


def load(argv: Sequence[str]) -> Config:
    """The configuration that these arguments (without program and noun) and the files they name make up.

    Raises ConfigErrors with all problems. Later files win over earlier ones, flags over files, -hcl over flags; lists
    are joined, those of the flags first.
    """
    loading = Loading()
    flags = loading.read_flags(argv)
    for name, text in flags.plain:
        loading.take_flag(name, text, lists=True)
    for path, wanted in loading.config_paths(flags.sources, flags.format):
        loading.read_file(path, wanted)
    for name, text in flags.plain:
        loading.take_flag(name, text, lists=False)
    for i, text in enumerate(flags.fragments):
        loading.read_text(f"-hcl[{i}]" if len(flags.fragments) > 1 else "-hcl", text, "hcl")
    return loading.finish(argv)


def validate(paths: Sequence[str], format: str = "") -> Config:
    """What `load` makes of these files and directories alone (`rostra validate`)."""
    return load([*([f"-config-format={format}"] if format else []), *(f"-config-file={path}" for path in paths)])


def read_definitions(path: str) -> list[Definition]:
    """The service definitions of one file, for `rostra services register`. Raises ConfigErrors."""
    loading = Loading()
    loading.read_file(path, "")
    if loading.problems:
        raise ConfigErrors(loading.problems)
    return loading.services


def usage() -> str:
    """The help text of all flags."""
    lines = []
    extra = [
        ("config-file", "<path>", "JSON or HCL file to read. Repeatable."),
        ("config-dir", "<path>", "Directory whose *.json and *.hcl are read in the order of their names. Repeatable."),
        ("config-format", "<hcl|json>", "Format of all configuration files, whatever their names end in."),
        ("hcl", "<text>", "Configuration as HCL text. Repeatable."),
    ]
    known = [(s.flag, "" if s.kind.is_switch else "=<value>", s.help) for s in SETTINGS.values() if s.flag]
    for flag, value, help in sorted(known + [(f, f"={v}", h) for f, v, h in extra]):
        lines.append(f"  -{flag}{value}\n     {help}\n")
    return "\n".join(lines)


class _Flags(NamedTuple):
    plain: list[tuple[str, str]]
    sources: list[tuple[str, str]]  # ("config-file" | "config-dir", path)
    fragments: list[str]
    format: str


class Loading(Found):
    """Reads flags and files into what is found."""

    # -- flags

    def read_flags(self, argv: Sequence[str]) -> _Flags:
        flags = _Flags([], [], [], "")
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if not word.startswith("-") or word in ("-", "--"):
                extra = rest if word == "--" else [word, *rest]
                if extra:
                    self.problem("", "", f"unexpected extra arguments: {' '.join(extra)}")
                break
            name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
            known = _FLAGS.get(name)
            if known is None:
                self.is_incomplete = True
                self.problem("", "", f"flag provided but not defined: -{name}{_did_you_mean(name, _FLAGS, '-')}")
                if not equals and rest and not rest[0].startswith("-"):
                    rest.pop(0)  # most likely its value: one mistake is one line
                continue
            if not equals and not known.is_switch:
                if not rest:
                    self.is_incomplete = True
                    self.problem("", "", f"flag needs an argument: -{name}")
                    break
                text = rest.pop(0)
            flags = self._sort_flag(flags, name, text if equals or not known.is_switch else "true")
        return flags

    def _sort_flag(self, flags: _Flags, name: str, text: str) -> _Flags:
        if name in ("config-file", "config-dir"):
            flags.sources.append((name, text))
        elif name == "hcl":
            flags.fragments.append(text)
        elif name == "config-format":
            if text not in ("hcl", "json"):
                self.problem("-config-format", "", f'must be "hcl" or "json", not "{text}"')
            else:
                return flags._replace(format=text)
        else:
            flags.plain.append((name, text))
        return flags

    def take_flag(self, name: str, text: str, *, lists: bool) -> None:
        """Lists are taken before the files, single values after them."""
        kind = _FLAGS[name]
        if lists != (kind.combine is not None):
            return
        field_name = _FIELD_OF_FLAG.get(name)
        if field_name is None:
            self.unused[f"-{name}"] = None
        value = self.convert(kind.parse, kind, text, f"-{name}", "")
        if value is not BAD and field_name is not None:
            self.put(field_name, value, f"-{name}", "")

    # -- files

    def config_paths(self, sources: list[tuple[str, str]], format: str) -> Iterator[tuple[str, str]]:
        for flag, path in sources:
            if not os.path.isdir(path):
                if flag == "config-dir":
                    self.is_incomplete = True
                    self.problem("", "", f"cannot read the configuration directory {path}: it is not a directory")
                else:
                    yield path, format
                continue
            try:
                names = sorted(os.listdir(path))
            except OSError as e:
                self.problem("", "", f"cannot read the configuration directory {path}: {e.strerror}")
                continue
            for name in names:
                if name.endswith((".json", ".hcl")) and os.path.isfile(os.path.join(path, name)):
                    yield os.path.join(path, name), format

    def read_file(self, path: str, format: str) -> None:
        if not format:
            format = os.path.splitext(path)[1].lstrip(".")
            if format not in ("hcl", "json"):
                self.is_incomplete = True
                self.problem(
                    path, "", "the name of a configuration file ends in .json or .hcl (or give -config-format)"
                )
                return
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except OSError as e:
            self.is_incomplete = True
            self.problem("", "", f"cannot read the configuration file {path}: {e.strerror}")
            return
        except UnicodeDecodeError as e:
            self.is_incomplete = True
            self.problem(path, "", f"not UTF-8 text: byte {e.start} is {e.object[e.start]:#04x}")
            return
        self.files.append(path)
        if text:  # an empty file sets nothing, in JSON too
            self.read_text(path, text, format)

    def read_text(self, name: str, text: str, format: str) -> None:
        from rostra.agent import hcl

        try:
            document = hcl.parse_json(text, name) if format == "json" else hcl.parse_hcl(text, name)
        except hcl.SyntaxProblem as e:
            self.is_incomplete = True
            self.problem(f"{e.file}:{e.line}:{e.column}", "", e.message)
            return
        for container, key in document.repeated:
            self.warnings.append(f"{document.where(container, key)}: {key}: given more than once; the last one counts")
        self.take_settings(document, document.value, _tree(), "")

    def known(
        self, document: hcl.Document, value: dict[str, Any], names: Mapping[str, Any], prefix: str
    ) -> Iterator[tuple[str, str, Any, str]]:
        """Of each key that is known: its name, as it is written, its value, and where. The others are problems."""
        for raw, item in value.items():
            name = _find(raw, names)
            if name is None and "*" in names:
                self.unused[prefix + raw] = None
            elif name is None:
                message = f"unknown configuration key{_did_you_mean(raw, names)}"
                self.problem(document.where(value, raw), prefix + raw, message)
            elif item is not None:
                yield name, raw, item, document.where(value, raw)

    def take_settings(self, document: hcl.Document, value: dict[str, Any], tree: dict[str, Any], prefix: str) -> None:
        for name, raw, item, where in self.known(document, value, tree, prefix):
            node, key = tree[name], prefix + name
            if node == _UNUSED_LEAF or node == {"*": _UNUSED_LEAF}:
                self.unused[key] = None
            elif isinstance(node, _Definitions):
                self.take_definitions(document, value, raw, item, node)
            elif isinstance(node, dict):
                for block in self.blocks(item, where, key):
                    self.take_settings(document, block, node, f"{key}.")
            else:
                self.take_value(node, item, where, key)

    def blocks(self, item: Any, where: str, key: str) -> list[dict[str, Any]]:
        blocks = [b for b in item if b is not None] if isinstance(item, list) else [item]
        if all(isinstance(block, dict) for block in blocks):
            return blocks
        self.problem(where, key, f"must be a block, not {describe(item)}")
        return []

    def take_value(self, field_name: str, item: Any, where: str, key: str) -> None:
        value = self.written(SETTINGS[field_name].kind, item, where, key)
        if value is not BAD:
            self.put(field_name, value, where, key)

    def written(self, kind: Kind, item: Any, where: str, key: str) -> Any:
        if kind.combine is update and isinstance(item, list) and item and all(isinstance(v, dict) for v in item):
            item = {k: v for block in item for k, v in block.items()}
        return self.convert(kind.read, kind, item, where, key)

    # -- definitions

    def take_definitions(
        self, document: hcl.Document, container: dict[str, Any], raw: str, item: Any, node: _Definitions
    ) -> None:
        many = isinstance(item, list)
        for i, one in enumerate(item if many else [item]):
            if one is None:
                continue
            where = document.where(item, i) if many else document.where(container, raw)
            key = f"{node.key}[{i}]" if many else node.key
            if not isinstance(one, dict):
                self.problem(where, key, f"must be a block, not {describe(one)}")
                continue
            before = len(self.problems)
            value = self.shaped(document, one, node.table, key)
            if not str(value.get("name", "")).strip() and len(self.problems) == before:
                what = "check" if node.table is CHECK else "service"
                named = what == "check" and (value.get("id") or value.get("check_id"))
                if not named:
                    self.problem(where, key, f"a {what} definition needs a name")
            if len(self.problems) == before:
                (self.checks if node.table is CHECK else self.services).append(Definition(value, where))

    def shaped(self, document: hcl.Document, value: dict[str, Any], table: Table, key: str) -> dict[str, Any]:
        """The object with canonical keys and checked values."""
        found: dict[str, Any] = {}
        for name, raw, item, where in self.known(document, value, table.in_files, f"{key}."):
            form = table.in_files[name].form
            result = self.shaped_value(document, value, raw, item, form, f"{key}.{name}", where)
            if result is not BAD:
                found[name] = result
        return found

    def shaped_value(
        self, document: hcl.Document, container: Any, raw: Any, item: Any, form: Form, key: str, where: str
    ) -> Any:
        if isinstance(form, Type):
            return self.written(DEFINED[form], item, where, key)
        if isinstance(form, Many):
            items = item if isinstance(item, list) else [item]
            return [
                self.shaped_value(
                    document, item, i, one, form.table, f"{key}[{i}]",
                    document.where(item, i) if isinstance(item, list) else where,
                )
                for i, one in enumerate(items)
                if one is not None
            ]  # fmt: skip
        blocks = self.blocks(item, where, key)
        if isinstance(form, MapOf):
            return {
                name: self.shaped_value(document, block, name, one or {}, form.table, f"{key}.{name}", where)
                for block in blocks
                for name, one in block.items()
            }
        if len(blocks) > 1:
            self.problem(where, key, f"given {len(blocks)} times; only one is possible")
            return BAD
        return self.shaped(document, blocks[0] if blocks else {}, form, key)

    # -- the whole

    def finish(self, argv: Sequence[str]) -> Config:
        values = self.values
        if values.get("dev"):
            values.setdefault("server", True)
            if values["server"]:
                values.setdefault("bootstrap", True)
            values.setdefault("bind_addr", "127.0.0.1")
        for name, default in DEFAULTS.items():
            values.setdefault(name, default)
        settle(self)
        if self.problems:
            raise ConfigErrors(self.problems)
        if self.unused:
            self.warnings.append(
                f"accepted because Consul knows them, without effect here: {', '.join(sorted(self.unused))}"
            )
        return Config(
            **values,
            services=tuple(self.services),
            checks=tuple(self.checks),
            config_files=tuple(self.files),
            warnings=tuple(self.warnings),
            argv=tuple(argv),
        )


class _Definitions(NamedTuple):
    key: str
    table: Table


_UNUSED_LEAF = "*unused*"
_FIELD_OF_FLAG = {s.flag: name for name, s in SETTINGS.items() if s.flag} | {"read-replica": "non_voting_server"}
_FLAGS: dict[str, Kind] = {
    **{flag: SETTINGS[name].kind for flag, name in _FIELD_OF_FLAG.items()},
    **dict.fromkeys(("config-file", "config-dir", "config-format", "hcl"), TEXT),
    **dict.fromkeys(UNUSED_FLAGS, TEXT),
    **dict.fromkeys(UNUSED_SWITCHES, SWITCH),
}


_cached_tree: dict[str, Any] = {}


def _tree() -> dict[str, Any]:
    """All known keys: nested dicts down to a field's name, `_UNUSED_LEAF` or `_Definitions`."""
    if not _cached_tree:
        for path in UNUSED:
            _plant(path, _UNUSED_LEAF)
        for name, s in SETTINGS.items():
            for path in s.keys:
                _plant(path, name)
        for key, table in (("service", SERVICE), ("check", CHECK)):
            _plant(key, _Definitions(key, table))
            _plant(f"{key}s", _Definitions(f"{key}s", table))
    return _cached_tree


def _plant(path: str, leaf: Any) -> None:
    *blocks, last = path.split(".")
    here = _cached_tree
    for block in blocks:
        here = here.setdefault(block, {})
    here[last] = leaf


def _find(raw: str, known: Mapping[str, Any]) -> str | None:
    """The known key that is meant: case does not count, and CamelCase is snake_case."""
    if raw in known:
        return raw
    folded = raw.replace("_", "").lower()
    return next((name for name in known if name.replace("_", "") == folded), None)


def _did_you_mean(word: str, known: Mapping[str, Any], prefix: str = "") -> str:
    import difflib

    close = difflib.get_close_matches(word.lower(), [k for k in known if k != "*"], n=1, cutoff=0.7)
    return f'; did you mean "{prefix}{close[0]}"?' if close else ""
