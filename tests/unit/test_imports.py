"""Imports point one way. Determinism of the state, the start-up budget and every replaceable part depend on it.

Read from the source, so that an import inside of a function counts like any other (except where it is said otherwise).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TREES = ("acl", "agent", "cli", "connect_proxy", "dns", "runtime", "server", "wire")

#: What a part may import of this package; the first prefix that fits a module decides. A part may always import itself.
ALLOWED = {
    "wire": (),
    "runtime": ("wire",),
    "acl": (),
    "server.state": ("acl", "wire.errors", "wire.frames", "wire.codec"),
    "server": ("acl", "runtime", "wire"),
    "agent": ("acl", "connect_proxy", "dns", "runtime", "server.state", "wire"),
    "connect_proxy": ("acl", "runtime", "wire"),
    "dns": ("acl", "runtime", "wire"),
    "cli": ("wire.errors",),
}
#: What composes a program may reach for it when it is run: `rostra server` reads the agent's configuration.
COMPOSITION = {"agent.run": ("server.run", "server.settings"), "cli": ("agent", "server", "connect_proxy")}
#: Libraries, and the parts that may import them; any other may be imported anywhere outside of the pure parts.
LIBRARIES = {
    "aiohttp": ("agent",),
    "dnslib": ("dns",),
    "pysyncobj": ("server.raft",),
    "sortedcontainers": ("server.state",),
    "uvloop": ("runtime", "agent", "server", "connect_proxy"),
}
#: Parts that must give the same result on every server and at every time, and what of the standard library they use.
PURE = {
    "acl": {"collections", "dataclasses", "re", "typing", "urllib"},
    "server.state": {
        "bisect",
        "collections",
        "dataclasses",
        "functools",
        "hashlib",
        "itertools",
        "re",
        "sys",
        "typing",
        "zlib",
    },
}
PURE_LIBRARIES = {"acl": set(), "server.state": {"msgpack", "sortedcontainers"}}


class Import(NamedTuple):
    importer: str  # "server.state.kv"
    imported: str  # "rostra.acl.authorizer", "asyncio"
    where: str
    is_lazy: bool


def imports_of(path: Path) -> Iterator[Import]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            # "from rostra.server import state" imports rostra.server.state.
            origin = node.module or ""
            names = [f"{origin}.{a.name}" if origin.startswith("rostra") else origin for a in node.names]
        else:
            continue
        for name in names:
            yield Import(module, name, f"{path.relative_to(ROOT)}:{node.lineno}", id(node) in lazy)


IMPORTS = [
    found
    for tree in TREES
    for path in sorted((ROOT / tree).rglob("*.py"))
    if not any(part.startswith(".") or part == "static" for part in path.parts[len(ROOT.parts) :])
    for found in imports_of(path)
]


def lies_in(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def part_of(module: str) -> str:
    return "server.state" if lies_in(module, "server.state") else module.split(".")[0]


def own(found: Import) -> str | None:
    """What is imported of this package, without its name; None for anything else."""
    return found.imported.removeprefix("rostra.") if found.imported.startswith("rostra.") else None


def is_composition(importer: str, target: str) -> bool:
    return any(
        lies_in(importer, root) and any(lies_in(target, part) for part in parts) for root, parts in COMPOSITION.items()
    )


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    wrong = []
    for found in IMPORTS:
        target = own(found)
        if part_of(found.importer) != part or target is None:
            continue
        if found.is_lazy and is_composition(found.importer, target):
            continue
        if part_of(target) == "server.state" and part == "server":
            continue
        if not is_module(target.split(".")[0]):  # a name of the package itself: rostra.__version__
            continue
        if part_of(target) != part and not any(lies_in(target, allowed) for allowed in ALLOWED[part]):
            wrong.append(f"{found.where} imports {found.imported}")
    assert wrong == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_where_it_belongs(library):
    wrong = [
        f"{found.where} imports {found.imported}"
        for found in IMPORTS
        if lies_in(found.imported, library) and not any(lies_in(found.importer, part) for part in LIBRARIES[library])
    ]
    assert wrong == []


@pytest.mark.parametrize("part", PURE)
def test_pure_parts_import_no_clock_no_chance_and_no_io(part):
    allowed = PURE[part] | PURE_LIBRARIES[part] | {"__future__", "rostra"}
    wrong = [
        f"{found.where} imports {found.imported}"
        for found in IMPORTS
        if part_of(found.importer) == part and found.imported.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_pure_parts_call_nothing_that_differs_between_processes():
    wrong = []
    for tree in ("acl", "server/state"):
        for path in sorted((ROOT / tree).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                    continue
                # The built-in hash of a string, and the identity of an object, are others in each process.
                if node.func.id in ("hash", "id", "open", "input", "print", "exec", "eval"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {node.func.id}")
    assert wrong == []


def test_the_command_line_starts_with_the_standard_library_only():
    wrong = [
        f"{found.where} imports {found.imported}"
        for found in IMPORTS
        if part_of(found.importer) == "cli"
        and not found.is_lazy
        and found.imported.split(".")[0] not in {*sys.stdlib_module_names, "rostra"}
    ]
    assert wrong == []


def test_every_part_was_looked_at():
    looked_at = {part_of(found.importer) for found in IMPORTS}
    assert {"wire", "acl", "server.state"} <= looked_at
    assert len(IMPORTS) > 100


#: Waits for the relay's policies to have methods of their own.
KNOWN_CIRCLES = {frozenset({"connect_proxy.relay", "connect_proxy.serve"})}


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {found.importer for found in IMPORTS}
    imported: dict[str, set[str]] = {module: set() for module in modules}
    for found in IMPORTS:
        name = own(found) or ""
        for target in (name, name.rpartition(".")[0]):  # a module, or a name in one
            if target in modules and target != found.importer:
                imported[found.importer].add(target)

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        new = list(imported[start])
        while new:
            module = new.pop()
            if module not in seen:
                seen.add(module)
                new += imported[module]
        return seen

    reached = {module: reach(module) for module in modules}
    circles = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in modules
        if module in reached[module]
    }
    assert circles <= KNOWN_CIRCLES
