"""`rostra recover`: what an operator reads and types, on directories with real journals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from rostra.runtime.data_directory import DataDirectory
from rostra.server.raft.recovery_disk import look
from tests.support.data_directories import CLUSTER, make, member, node_id, write_snapshot

FIVE = ("s1", "s2", "s3", "s4", "s5")


def lines(text: str, containing: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if containing in line]


def command_in(plan: str) -> list[str]:
    """The words of the command that a plan ends with."""
    words = shlex.split(lines(plan, "rostra recover apply")[-1])
    assert words[0] == "rostra"
    return words[1:]


def test_a_plan_tells_what_is_in_each_directory(rostra_cli: Any, tmp_path: Path) -> None:
    directory = make(tmp_path / "s1", "s1", "01122", commit=4)
    write_snapshot(directory, "s1", 3, 1, tuple(map(member, ("s1", "s2", "s3"))))
    done = rostra_cli("recover", "plan", str(directory))
    assert (done.status, done.err) == (0, "")
    told = done.out.splitlines()
    assert told[:2] == [f"{directory}: server s1", f"    node {node_id('s1')}, cluster {CLUSTER}"]
    assert told[2].startswith("    term 2; log entries 1 to 5, the last of term 2; newest command of 1970-01-01")
    assert told[3] == "    known to be committed up to 4"
    assert told[4].startswith("    snapshot up to entry 3 of term 1, ")
    assert told[5] == "    members since entry 2: s1, s2, s3"


def test_a_plan_says_which_one_is_safe_and_what_the_others_lose(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "0111", commit=2, of=FIVE)
    s2 = make(tmp_path / "s2", "s2", "01111111", commit=5, of=FIVE)
    out = rostra_cli("recover", "plan", str(s1), str(s2)).out
    assert lines(out, "safe to keep") == [f"Keep {s2} (s2):  <- safe to keep"]
    assert lines(out, "equal up to") == [f"{s1} and {s2} are equal up to entry 4"]
    assert lines(out, "loses 4 entries") == [f"loses 4 entries (5 to 8) of s2, {s2}:"]
    assert "1 known to be committed, 3 possibly acknowledged" in out
    assert "keys: k5, k6, k7, k8" in out
    assert lines(out, "missing:") == ["missing: s3, s4, s5"]
    assert "The missing servers are a majority" in out


def test_values_are_not_shown(rostra_cli: Any, tmp_path: Path) -> None:
    s1, s2 = make(tmp_path / "s1", "s1", "0111", of=FIVE), make(tmp_path / "s2", "s2", "01", of=FIVE)
    done = rostra_cli("recover", "plan", str(s1), str(s2))
    assert "k3" in done.out
    assert "hush" not in done.out + done.err


def test_a_majority_is_told_to_start(rostra_cli: Any, tmp_path: Path) -> None:
    s1, s2 = make(tmp_path / "s1", "s1", "0111"), make(tmp_path / "s2", "s2", "01")
    done = rostra_cli("recover", "plan", str(s1), str(s2))
    assert done.out.splitlines()[-1] == "No recovery is needed: a majority is here. Start s1, s2."
    done = rostra_cli("recover", "apply", f"-keep={s1}", "-members=s1", str(s2))
    assert (done.status, done.out) == (1, "")
    assert done.err == "a majority of the voting servers is here, no recovery is needed: start s1, s2\n"


def test_the_command_that_a_plan_ends_with_works(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s 1", "s1", "01111", commit=2, of=FIVE)
    s2 = make(tmp_path / "s2", "s2", "01122", commit=2, of=FIVE)
    plan = rostra_cli("recover", "plan", str(s1), str(s2)).out
    words = command_in(plan)
    assert words == ["recover", "apply", f"-keep={s2}", "-members=s2", "-lose=s1", str(s1)]
    done = rostra_cli(*words)
    assert (done.status, done.err) == (0, "")
    assert f"Written into {s2}: entry 6 of term 3, which makes the members" in done.out
    assert "1. s1, s3, s4, s5: must never be started again on the data that they have." in done.out
    assert lines(done.out, "Start s2 on") == [
        f"2. Start s2 on {s2} (or on a copy of it in its place, if that is not where it runs)."
    ]
    assert "rostra operator raft add-peer s1" in done.out
    after = rostra_cli("recover", "plan", str(s2), str(s1)).out.splitlines()
    assert after[-2] == "No recovery is needed: a majority is here. Start s2."
    assert after[-1] == f"Not members any more: s1 ({s1}). Empty these directories before those servers are started."


def test_survivors_that_agree_go_on_together(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "0111", commit=2, of=FIVE)
    s2 = make(tmp_path / "s2", "s2", "01111", commit=2, of=FIVE)
    words = command_in(rostra_cli("recover", "plan", str(s1), str(s2)).out)
    assert words == ["recover", "apply", f"-keep={s2}", "-members=s2,s1", str(s1)]
    done = rostra_cli(*words)
    assert "Start s1 as well, each on the data that it has. s2 leads as soon as a majority" in done.out
    assert [m.name for m in look(s2).members] == ["s1", "s2"]
    assert look(s1).last_index == 4


def test_entries_are_not_given_up_without_a_name(rostra_cli: Any, tmp_path: Path) -> None:
    s1, s2 = make(tmp_path / "s1", "s1", "011", of=FIVE), make(tmp_path / "s2", "s2", "01111", of=FIVE)
    done = rostra_cli("recover", "apply", f"-keep={s1}", "-members=s1", str(s2))
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"s2 ({s2}) has 2 entries that {s1} does not have: 2 possibly acknowledged. To give them up, say -lose=s2\n"
    )
    assert look(s1).last_index == 3
    assert rostra_cli("recover", "apply", "--keep", str(s1), "--members", "s1", "--lose", "s2", str(s2)).status == 0
    assert look(s1).last_index == 4


def test_consul_s_file_is_read(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "011")
    peers = s1 / "server" / "raft" / "peers.json"
    peers.write_text(json.dumps([{"id": node_id("s1"), "address": "10.1.1.1:8300", "non_voter": False}]))
    done = rostra_cli("recover", "apply", f"-keep={s1}", f"-peers={peers}")
    assert (done.status, done.err) == (0, "")
    assert [(m.name, m.host, m.port) for m in look(s1).members] == [("s1", "10.1.1.1", 8300)]
    assert not peers.exists()


def test_directories_of_two_clusters_are_told_apart(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "011")
    other = make(tmp_path / "other", "s2", "011", cluster_id="11111111-0000-4000-8000-000000000000")
    done = rostra_cli("recover", "plan", str(s1), str(other))
    assert len(lines(done.out, "voters can be started from here")) == 2
    assert "2 different clusters" in done.err
    done = rostra_cli("recover", "apply", f"-keep={s1}", "-members=s1", str(other))
    assert done.err == f"{other}: of another cluster than {s1} ({CLUSTER})\n"


def test_damage_is_shown_with_file_and_offset(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "01111", commit=5)
    journal = s1 / "server" / "raft" / "journal-00000001"
    data = bytearray(journal.read_bytes())
    data[data.index(b"k4")] ^= 1
    journal.write_bytes(data)
    done = rostra_cli("recover", "plan", str(s1))
    assert f"CANNOT BE KEPT: {journal} is damaged at byte " in done.out
    assert done.out.splitlines()[-1] == "None of these can be kept. Restore one of them from a backup."
    done = rostra_cli("recover", "apply", f"-keep={s1}", "-members=s1")
    assert done.err.startswith(f"{s1} cannot be kept: {journal} is damaged at byte ")


def test_a_running_server_is_seen(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "011")
    with DataDirectory.lock(s1 / "server"):
        assert "IN USE BY PROCESS" in rostra_cli("recover", "plan", str(s1)).out
        done = rostra_cli("recover", "apply", f"-keep={s1}", "-members=s1")
    assert done.status == 1
    assert "in use by process" in done.err


def test_an_emptied_directory_is_nothing_to_keep(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1")
    done = rostra_cli("recover", "plan", str(s1))
    assert (done.status, lines(done.out, "no log")) == (
        1, ["no log: nothing to keep here (an emptied directory, or a client's)"],
    )  # fmt: skip
    done = rostra_cli("recover", "apply", f"-keep={s1}", "-members=s1")
    assert done.err == f"{s1} cannot be kept: there is no log in it\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["plan"], "rostra recover plan: give the data directories of the servers"),
        (["plan", "/nonexistent/d"], "/nonexistent/d: no such directory"),
        (["apply"], "-keep=DIR is required"),
        (["apply", "-keep=d"], "say who the members are: -members=NAME,… or -peers=FILE"),
        (["apply", "-keep=d", "-members=a", "-peers=b"], "say who the members are"),
    ],
)
def test_what_is_missing_is_said(rostra_cli: Any, words: list[str], problem: str) -> None:
    done = rostra_cli("recover", *words)
    assert (done.status, done.out) == (1, "")
    assert problem in done.err
    assert done.err.count("\n") == 1


def test_what_is_wrong_with_the_choice_is_said(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "011")

    def refused(*words: str) -> str:
        done = rostra_cli("recover", "apply", f"-keep={s1}", *words)
        assert (done.status, done.out) == (1, "")
        return str(done.err)

    assert "no server is called 'x'" in refused("-members=x")
    assert "the kept server, s1, must be in the list" in refused("-members=s2")
    assert "its data directory is not among those given" in refused("-members=s1,s2")
    assert refused(f"-peers={tmp_path}/no") == f"{tmp_path}/no: No such file or directory\n"
    assert "is given twice" in refused("-members=s1", str(s1))
    assert look(s1).last_index == 3


def test_keys_cannot_steer_the_terminal(rostra_cli: Any, tmp_path: Path) -> None:
    s1 = make(tmp_path / "s1", "s1", "011", of=FIVE, key="\x1b[2J{}")
    s2 = make(tmp_path / "s2", "s2", "01", of=FIVE, key="\x1b[2J{}")
    out = rostra_cli("recover", "plan", str(s1), str(s2)).out
    assert "\x1b" not in out
    assert "keys: \\x1b[2J3" in out
