"""The program: flags, signals, the lifeline, what it imports and what it weighs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from rostra.connect_proxy.run import UsageError, parse_options
from rostra.connect_proxy.snapshot import Address

SRC = str(Path(__file__).parents[3] / "src")


@pytest.fixture
def start(mesh, tmp_path, eventually):
    """Starts `python -m rostra.connect_proxy` on a snapshot; (process, wait for a log line)."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*flags: str, snapshot=None, ready=" proxy: ready", pass_fds=(), preexec_fn=None):
        snapshot = snapshot or mesh.snapshot("web", public=Address("127.0.0.1", 0))
        path = tmp_path / f"{len(started)}.json"
        path.write_bytes(snapshot.to_json())
        log = tmp_path / f"{len(started)}.log"
        env = {**os.environ, "PYTHONPATH": SRC}
        argv = [sys.executable, "-P", "-m", "rostra.connect_proxy", f"-snapshot={path}", *flags]
        with log.open("wb") as out:
            process = subprocess.Popen(argv, stderr=out, stdout=out, env=env, pass_fds=pass_fds, preexec_fn=preexec_fn)
        started.append(process)
        process.log = log  # type: ignore[attr-defined]
        if ready:
            eventually(lambda: ready in log.read_text() or process.poll() is not None, 15)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(start, number):
    process = start("-log-level=debug")
    process.send_signal(number)
    assert process.wait(30) == 0
    assert "stopped: proxy-id=web-sidecar-proxy" in process.log.read_text()


def test_it_dies_with_its_parent_and_ignores_sigint_as_a_child(start):
    ours, theirs = socket.socketpair()
    process = start("-lifeline-fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),))
    theirs.close()
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    ours.close()
    assert process.wait(5) == 0


def test_a_changed_file_is_a_new_snapshot_and_a_bad_one_is_ignored(start, mesh, tmp_path, eventually):
    process = start()
    (tmp_path / "0.json").write_text("{}")
    eventually(lambda: "snapshot file ignored" in process.log.read_text())
    (tmp_path / "0.json").write_bytes(mesh.snapshot("web").to_json())
    eventually(lambda: "listener closed" in process.log.read_text())


def test_it_says_what_is_wrong_with_a_snapshot_file_and_fails(start, tmp_path):
    process = start("-snapshot", str(tmp_path / "none.json"), ready="")
    assert process.wait(10) == 1
    assert "none.json" in process.log.read_text()


def test_few_file_descriptors_are_told(start):
    import resource

    process = start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)))
    assert process.log.read_text().count("few file descriptors: limit=128") == 1


def test_the_admin_address_answers_stats_and_ready(start, eventually):
    process = start("-admin-addr=127.0.0.1:0")
    line = next(x for x in process.log.read_text().splitlines() if "admin listening" in x)
    base = "http://" + line.rpartition("address=")[2]
    assert urllib.request.urlopen(base + "/ready", timeout=5).status == 200
    stats = json.load(urllib.request.urlopen(base + "/stats", timeout=5))
    assert stats["service"] == "web"
    assert stats["inbound_open"] == 0


def test_the_admin_address_must_be_loopback(start):
    process = start("-admin-addr=0.0.0.0:0", ready="")
    assert process.wait(10) == 1
    assert "only loopback" in process.log.read_text()


def test_it_is_small_and_starts_without_the_heavy_libraries(start, eventually):
    process = start()
    resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096
    assert resident < 30 << 20
    loaded = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", "-m", "rostra.connect_proxy", "-h"],
        env={**os.environ, "PYTHONPATH": SRC},
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.rpartition("|")[2].strip() for line in loaded.stderr.splitlines()}
    heavy = ("aiohttp", "asyncio", "structlog", "cryptography", "http.client", "email", "msgpack", "uvloop", "logging")
    assert not modules & set(heavy)
    assert "Usage: rostra connect proxy" in loaded.stdout


def test_flags_take_one_dash_or_two_and_either_form():
    for argv in (["-sidecar-for", "web"], ["--sidecar-for=web"], ["-sidecar-for=web"]):
        assert parse_options(argv, {}).sidecar_for == "web"


def test_the_environment_fills_in_what_flags_do_not_say():
    env = {"CONSUL_HTTP_ADDR": "10.0.0.1:8500", "CONSUL_HTTP_TOKEN": "t", "CONSUL_HTTP_SSL": "true"}
    options = parse_options(["-proxy-id=p"], env)
    assert (options.http_addr, options.token) == ("https://10.0.0.1:8500", "t")
    assert parse_options(["-proxy-id=p", "-http-addr=unix:///s", "-token=u"], env).http_addr == "unix:///s"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "one of -sidecar-for, -proxy-id and -service"),
        (["-proxy-id=a", "-sidecar-for=b"], "one of"),
        (["-proxy-id"], "needs a value"),
        (["-proxy-id=a", "-lifeline-fd=x"], "not a number"),
        (["-proxy-id=a", "-nonsense=1"], "unknown flag -nonsense"),
        (["-proxy-id=a", "-http_addr=1"], "unknown flag"),
        (["-proxy-id=a", "-log-level=loud"], "none of trace"),
        (["-proxy-id=a", "-idle-timeout=-1"], "positive"),
        (["-proxy-id=a", "-upstream=db:1"], "belong to -service"),
        (["web"], "unexpected argument"),
    ],
)
def test_a_wrong_flag_is_named(argv, told):
    with pytest.raises(UsageError, match=told):
        parse_options(argv, {})
