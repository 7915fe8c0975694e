"""Our CLI and Consul's, asked the same of one real Consul agent: same output, same exit status.

Runs where ROSTRA_CONSUL_BIN names a consul binary (1.8 or later).
"""

import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_consul import CONSUL, needs_consul, running_consul

pytestmark = needs_consul


@pytest.fixture(scope="module")
def consul() -> Iterator[str]:
    with running_consul() as (host, port):
        address = f"{host}:{port}"
        for words in SEED:
            subprocess.run([CONSUL, *words], check=True, capture_output=True, env=environment(address))
        yield address


def environment(address: str) -> dict[str, str]:
    return {**os.environ, "CONSUL_HTTP_ADDR": address}


SEED = [
    ["kv", "put", "a/b", "1"],
    ["kv", "put", "a/c"],
    ["kv", "put", "-flags=42", "a/d", "xyz"],
    ["kv", "put", "a/ü b", "é<&>\n"],
    ["services", "register", "-name=web", "-id=w1", "-port=80", "-tag=b", "-tag=a", "-meta=k=v"],
    ["services", "register", "-name=api"],
    ["intention", "create", "web", "db"],
    ["intention", "create", "-deny", "-meta=a=b", "*", "db"],
]
READS = """members|members -detailed|members -status=foo|members -status=alive|catalog datacenters|catalog nodes
catalog nodes -detailed|catalog services|catalog services -tags|catalog services -node=o|catalog services -node=o -tags
catalog services -node=nope|catalog nodes -service=web|catalog nodes -service=web -detailed|catalog nodes -service=no
catalog nodes -node-meta=foo=bar|catalog nodes -near=_agent|catalog nodes -filter Node==o|catalog nodes -datacenter=no
kv get a/b|kv get nope|kv get -detailed a/d|kv get -detailed a/c|kv get -recurse a|kv get -recurse -detailed a/
kv get -keys|kv get -keys a/|kv get -keys -separator= a|kv get -recurse nope|kv get -keys nope|kv get -base64 a/b
kv get -recurse -base64 a|kv get -detailed -base64 a/b|kv get a/c|kv get /a/b|kv get|kv get -recurse|kv get a b
kv get -recurse=maybe a|kv get -bogus a|kv export a|kv export nope|kv put -cas a/b 2|kv put -cas -modify-index=1 a/b 2
kv put l @nope|kv put -acquire l x|kv put -acquire -session=nope l x|kv put /x/y 1|kv put a b c|kv put -flags=x a 1
kv delete -cas a/b|kv delete -cas -modify-index=1 a/b|kv delete -recurse -cas -modify-index=3 a|kv delete
kv import {|kv import|kv import @nope|intention get web db|intention get * db|intention get no such
intention check web db|intention check x db|intention check x|intention match db|intention match -source web
intention match|intention create web db|intention create -allow -deny x y|intention delete no such|info
services register|services deregister|services register x.json|kv|kv bogus|validate
operator raft list-peers|operator raft list-peers -stale|operator raft list-peers -datacenter=no|operator|operator raft
operator raft remove-peer|operator raft remove-peer -address=a -id=b|operator raft remove-peer -id=nope
operator raft remove-peer -address=1.2.3.4:8300|operator autopilot get-config|operator autopilot get-config -stale
operator autopilot set-config -max-trailing-logs=x|operator autopilot set-config -last-contact-threshold=5
operator autopilot set-config|operator autopilot set-config -cleanup-dead-servers=false -last-contact-threshold=1m
operator autopilot get-config|operator autopilot set-config -min-quorum=3 -server-stabilization-time=90s
operator autopilot get-config -datacenter=no|operator autopilot set-config -cleanup-dead-servers=maybe
kv put w/1 -5|kv put -- w/2 1|kv get -recurse w|kv delete w/1|kv delete nope|kv delete -recurse w"""


@pytest.mark.parametrize("words", re.split(r"[|\n]", READS))
def test_output_and_exit_status_are_consuls(rostra_process: Any, consul: str, words: str) -> None:
    theirs = subprocess.run([CONSUL, *words.split()], capture_output=True, env=environment(consul), timeout=30)
    ours = rostra_process(*words.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(consul))
    out, err = ours.communicate(timeout=30)
    assert (out.decode(), ours.returncode) == (theirs.stdout.decode(), theirs.returncode)
    assert err.count(b"\n") <= 1 or words in ("kv", "kv bogus", "operator", "operator raft")


def test_a_lock_is_taken_and_given_up(rostra_process: Any, consul: str) -> Any:
    request = urllib.request.Request(f"http://{consul}/v1/session/create", b"{}", method="PUT")
    with urllib.request.urlopen(request) as answer:
        session = re.search(rb'"ID": *"([^"]+)"', answer.read())
    assert session is not None

    def put(*flags: str) -> tuple[bytes, int]:
        words = ["kv", "put", *flags, f"-session={session[1].decode()}", "lk", "v"]
        process = rostra_process(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(consul))
        return process.communicate(timeout=30)[0], process.returncode

    assert put("-acquire") == (b"Success! Lock acquired on: lk\n", 0)
    assert put("-release") == (b"Success! Lock released on: lk\n", 0)
    assert put("-release") == (b"Error! Did not release lock\n", 1)


def test_a_definition_file_registers_the_same_service(rostra_process: Any, consul: str, tmp_path: Path) -> Any:
    file = tmp_path / "svc.hcl"
    file.write_text(
        """service { name = "full" id = "full-1" port = 9 tags = ["x"] meta { a_b = "c" }
          check { http = "http://127.0.0.1/" interval = "10s" header { X_y = ["1"] } }
          connect { sidecar_service { proxy { upstreams = [{ destination_name = "db", local_bind_port = 9191 }] } } }
          weights { passing = 5 warning = 2 } tagged_addresses { lan { address = "10.0.0.1" port = 3 } } }"""
    )

    def registered_by(run: Any) -> bytes:
        run("register")
        with urllib.request.urlopen(f"http://{consul}/v1/agent/service/full-1") as answer:
            seen = bytes(answer.read())
        run("deregister")
        return seen

    def theirs(verb: str) -> None:
        subprocess.run([CONSUL, "services", verb, str(file)], check=True, env=environment(consul))

    def ours(verb: str) -> None:
        assert rostra_process("services", verb, str(file), env=environment(consul)).wait(timeout=30) == 0

    assert registered_by(ours) == registered_by(theirs)


def test_intentions_are_replaced_and_deleted(rostra_process: Any, consul: str) -> Any:
    def run(*words: str) -> tuple[str, int]:
        process = rostra_process(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(consul))
        return process.communicate(timeout=30)[0].decode(), process.returncode

    assert run("intention", "create", "-deny", "p", "q") == ("Created: p => q (deny)\n", 0)
    assert run("intention", "check", "p", "q") == ("Denied\n", 1)
    assert run("intention", "create", "-replace", "-allow", "p", "q") == ("Replaced: p => q (allow)\n", 0)
    assert run("intention", "check", "p", "q") == ("Allowed\n", 0)
    assert run("intention", "delete", "p", "q") == ("Intention deleted.\n", 0)
    assert run("intention", "delete", "p", "q")[1] == 1
