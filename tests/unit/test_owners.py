"""Nothing runs in the background whose end nobody sees: tasks and threads are made by `runtime.service`, or are listed.

Read from the source. Who adds a line here says who sees the end, and what happens then.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREES = ("acl", "agent", "cli", "connect_proxy", "dns", "runtime", "server", "wire")
MAKERS = {"create_task", "ensure_future", "Thread"}

#: (module, function): who sees the end.
SEEN = {
    ("runtime.service", "start"): "the owner",
    ("runtime.lifeline", "watch_lifeline"): "its last act is to end the process",
    ("connect_proxy.run", "_die_with"): "its last act is to end the process",
    ("connect_proxy.source", "start"): "the thread's hook ends the process",
    ("connect_proxy.adhoc", "start"): "the thread's hook ends the process",
    ("connect_proxy.admin", "serve_admin"): "the thread's hook ends the process",
    ("agent.run", "_serve"): "waited for by the same function",
    ("agent.results", "render"): "waited for by all who asked for the body",
    ("agent.results", "fetch_with_barrier"): "waited for by all who asked the question",
    ("agent.http.health", "_state_on_nodes"): "waited for by the same function",
    ("agent.local", "done"): "waited for by the caller",
    ("agent.local_files", "_commit"): "gives each who waits its outcome, whatever fails",
    ("agent.http.hot", "_ask"): "hands its connections to the ordinary way, whatever fails",
    ("server.own_certificate", "_certify"): "waited for by the same function",
    ("server.node", "_while_leader"): "waited for by the same function",
    ("server.raft.snapshotting", "_start"): "its end is the log's: a failure ends the process",
}


def makers(path: Path) -> Iterator[tuple[str, str, int]]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str, int]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Call):
                name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                if name in MAKERS:
                    yield module, function, child.lineno
            yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text()), "")


FOUND = [found for tree in TREES for path in sorted((ROOT / tree).rglob("*.py")) for found in makers(path)]


def test_every_task_and_thread_has_somebody_who_sees_its_end():
    unseen = [f"{module}:{line} in {function}" for module, function, line in FOUND if (module, function) not in SEEN]
    assert unseen == []


def test_the_list_of_those_that_are_seen_names_nothing_that_is_gone():
    assert SEEN.keys() - {(module, function) for module, function, _ in FOUND} == set()
