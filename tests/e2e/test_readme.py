"""What README.md tells people to type, typed; and the demo, played once.

A fenced `sh` block is run when an HTML comment that begins with `tested` stands right above it. Blocks run in their
order, each by `sh -e`, in one directory and with `rostra` on the PATH. `make demo` and `make test` are left out: this
is a part of the latter, and the demo has a test of its own here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPO, ROSTRA, Processes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(110)]

_BLOCK = re.compile(r"^<!--\s*tested\b[^>]*-->\s*\n```(?:sh|bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LEFT_OUT = re.compile(r"^\s*(\$ )?(make (demo|test)|git clone|cd rostra)\b.*$", re.MULTILINE)


def blocks(text: str) -> list[str]:
    """The shell text of the tested blocks; where lines begin with `$ `, the others are what is answered."""
    found = []
    for block in _BLOCK.findall(text):
        block = _LEFT_OUT.sub("", block)
        if re.search(r"^\$ ", block, re.MULTILINE):
            block = "\n".join(line[2:] for line in block.splitlines() if line.startswith("$ "))
        if block.strip():
            found.append(block)
    return found


def test_tested_blocks_are_found_and_answers_are_not_run() -> None:
    text = (
        "<!-- tested -->\n```sh\nmake demo\necho one\n```\n\n```sh\nnever\n```\n"
        "<!-- tested: with its answer -->\n```console\n$ echo two\ntwo\n```\n"
    )
    assert [block.split() for block in blocks(text)] == [["echo", "one"], ["echo", "two"]]


def test_the_readmes_commands_work(processes: Processes) -> None:
    readme = REPO / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    found = blocks(readme.read_text())
    if not found:
        pytest.skip("no block of README.md is marked as tested")
    work = processes.directory / "readme"
    work.mkdir()
    path = os.pathsep.join([str(Path(ROSTRA[0]).parent), os.environ["PATH"]])
    # One shell for all, so that an agent that one block starts in the background serves the next ones.
    script = "set -e\n" + "\n".join(f"echo '== block {n}'\n{block}" for n, block in enumerate(found, start=1))
    shell = processes.start(["sh", "-c", script], env={"PATH": path}, cwd=work)
    try:
        status = shell.wait(60)
    except subprocess.TimeoutExpired:
        status = -1
    logs = "".join(f"--- {path.name}\n{path.read_text()[-1500:]}\n" for path in sorted(work.glob("*.log")))
    assert status == 0, f"{shell.log}\n{logs}"


def test_the_demo_plays_to_its_end_and_leaves_no_process(processes: Processes) -> None:
    if shutil.which("dig") is None:
        pytest.skip("the demo needs dig")
    demo = processes.start([sys.executable, "-P", REPO / "deploy/local/demo.py"], env={"ROSTRA_BIN": ROSTRA[0]})
    try:
        status = demo.wait(100)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the demo did not end: {demo.log[-3000:]}")
    if "Does another demo run?" in demo.log:
        pytest.skip("its fixed addresses are taken by another demo")
    assert status == 0, demo.log[-3000:]
    assert "The demo is complete" in demo.log
    assert "Traceback" not in demo.log
    assert processes.left() == []
    assert list((processes.directory / "tmp").iterdir()) == []
