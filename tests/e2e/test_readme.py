"""What README.md tells people to type, typed, and what it says they will see, compared; and the demo, played once.

A fenced `sh` block is run when an HTML comment that begins with `tested` stands right above it; a `text` block right
below it is its answer, in which numbers and the width of columns may differ. Where a reader sleeps for a second, the
test waits until the command behind `tested: until` succeeds. All run in one shell, in their order, in an empty
directory and with `rostra` on the PATH.
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

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

_BLOCK = re.compile(
    r"^<!-- tested(?:: until ([^>]*))? -->\s*\n```(?:sh|bash|shell)\n(.*?)^```\n(?:\s*^```text\n(.*?)^```)?",
    re.MULTILINE | re.DOTALL,
)
_SLEEP = re.compile(r"^sleep \d+$", re.MULTILINE)
#: This is a part of `make test`, and the demo has a test of its own here.
_LEFT_OUT = re.compile(r"^\s*(make (demo|test)|git clone|cd rostra)\b.*$", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(commands, the answer that is promised or "") of each tested block."""
    found = []
    for until, commands, answer in _BLOCK.findall(text):
        if until:
            wait = f"until ( {until} ) > /dev/null 2>&1; do sleep 0.1; done"
            commands = wait.join(_SLEEP.split(commands))
        assert not _SLEEP.search(commands), f"what is slept for? Say `<!-- tested: until COMMAND -->`:\n{commands}"
        found.append((_LEFT_OUT.sub("", commands), answer))
    return found


def shape(text: str) -> str:
    """The text without what differs from run to run."""
    return " ".join(re.sub(r"\d+", "N", text).split())


def test_only_tested_blocks_are_found_with_their_answers() -> None:
    text = (
        "<!-- tested -->\n```sh\nmake demo\necho one\n```\n\n```sh\nnever\n```\n\n```text\nnot its answer\n```\n"
        "<!-- tested: until true -->\n```sh\nsleep 1\necho two\n```\n\n```text\ntwo\n```\n"
    )
    assert [(" ".join(commands.split()), answer) for commands, answer in blocks(text)] == [
        ("echo one", ""),
        ("until ( true ) > /dev/null 2>&1; do sleep 0.1; done echo two", "two\n"),
    ]


def test_the_readmes_commands_answer_as_it_says(processes: Processes) -> None:
    readme = REPO / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    # A reader uses the defaults; here they must not meet another run's, nor what this machine runs.
    mine = f"127.{192 + os.getpid() // 256 % 63}.{os.getpid() % 256}."
    text = re.sub(r"\b127\.0\.[07]\.", mine, readme.read_text())
    found = blocks(text.replace("rostra agent -dev", f"rostra agent -dev -bind={mine}1 -client={mine}1"))
    assert found, "no block of README.md is marked as tested"
    work = processes.directory / "readme"
    work.mkdir()
    path = os.pathsep.join([str(Path(ROSTRA[0]).parent), os.environ["PATH"]])
    # One shell for all, so that an agent that one block starts in the background serves the next ones.
    script = "set -e\n" + "".join(f"echo '== block {n}'\n{commands}\n" for n, (commands, _) in enumerate(found))
    shell = processes.start(["sh", "-c", script], env={"PATH": path, "CONSUL_HTTP_ADDR": f"{mine}1:8500"}, cwd=work)
    try:
        status = shell.wait(60)
    except subprocess.TimeoutExpired:
        status = -1
    logs = "".join(f"--- {path.name}\n{path.read_text()[-1500:]}\n" for path in sorted(work.glob("*.log")))
    assert status == 0, f"{shell.log}\n{logs}"
    said = re.split(r"^== block \d+\n", shell.log, flags=re.MULTILINE)[1:]
    for (commands, answer), seen in zip(found, said, strict=True):
        if answer:
            assert shape(seen) == shape(answer), f"{commands}\nREADME.md says\n{answer}\nbut it was\n{seen}"
    assert processes.left() == []


def test_the_units_and_the_configuration_of_the_operators_page_are_whole(processes: Processes) -> None:
    page = (REPO / "docs" / "operations.md").read_text()
    work = processes.directory / "host"
    work.mkdir()
    (hcl,) = re.findall(r"^```hcl\n(server .*?)^```", page, re.MULTILINE | re.DOTALL)
    (work / "rostra.hcl").write_text(hcl.replace("…", "U5nMDtFY3HYnsmEwLDyg1p7ZMDPM3bRSS9BKpFwqdbU="))
    done = processes.rostra("validate", str(work))
    assert (done.status, done.out) == (0, "Configuration is valid!\n"), done
    units = re.findall(r"^```ini\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(units) == 2
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name, unit in zip(("rostra", "rostra-server"), units):
        assert f"ExecStart=/opt/rostra/bin/rostra {'agent' if name == 'rostra' else 'server'} " in unit
        (work / f"{name}.service").write_text(unit.replace("/opt/rostra/bin/rostra", "/bin/true"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "./rostra.service", "./rostra-server.service"],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


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
    logs = "".join(f"--- {p.name}\n{p.read_text()[-1000:]}\n" for p in (processes.directory / "tmp").glob("*/logs/*"))
    assert status == 0, f"{demo.log[-3000:]}\n{logs}"
    assert "The demo is complete" in demo.log
    assert "Traceback" not in demo.log
    assert processes.left() == []
    assert list((processes.directory / "tmp").iterdir()) == []
