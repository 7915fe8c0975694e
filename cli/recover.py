"""`rostra recover`: what to do when a majority of the servers is lost. Reads data directories while no server runs.

A thin edge over `server/raft/`: recovery_disk.py reads and writes the directories, recovery.py compares and decides,
recovery_text.py says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rostra.cli.command import Call, Command, Flag, note, say
from rostra.cli.errors import Failed, UsageError
from rostra.wire.errors import RostraError


def _plan(call: Call) -> int:
    if not call.args:
        raise UsageError("give the data directories of the servers, as many as there are")
    found = _look(call.args)
    from rostra.server.raft.recovery import plan_recovery
    from rostra.server.raft.recovery_text import describe, describe_plan

    plans = plan_recovery(found)
    _say(line for each in found for line in describe(each, found))
    if len(plans) > 1:
        note(f"These are directories of {len(plans)} different clusters; each is planned for itself.")
    _say(line for plan in plans for line in describe_plan(plan))
    return 0 if plans else 1


def _apply(call: Call) -> None:
    if not call["keep"]:
        raise UsageError("-keep=DIR is required: the data directory to go on from (`rostra recover plan` compares)")
    if bool(call["members"]) == bool(call["peers"]):
        raise UsageError("say who the members are: -members=NAME,… or -peers=FILE")
    found = _look([call["keep"], *call.args])
    keep = found[0]
    from rostra.server.raft.recovery import choose, members_by_name, members_by_peers_json, plan_recovery
    from rostra.server.raft.recovery_disk import write
    from rostra.server.raft.recovery_text import describe_change

    if keep.is_empty:
        raise Failed(f"{keep.path} cannot be kept: {(*keep.problems, 'there is no log in it')[0]}")
    if strangers := [f.path for f in found if f.cluster_id not in ("", keep.cluster_id)]:
        raise Failed(f"{', '.join(strangers)}: of another cluster than {keep.path} ({keep.cluster_id})")
    plan = plan_recovery(found)[0]
    try:
        if call["members"]:
            names = [name.strip() for name in call["members"].split(",") if name.strip()]
            members = members_by_name(plan, keep, names)
        else:
            members = members_by_peers_json(plan, keep, Path(call["peers"]).read_bytes(), call["peers"])
        change = choose(plan, keep, members, call["lose"])
        backup = write(change)
    except RostraError as e:
        raise Failed(e.message) from None
    except OSError as e:
        raise Failed(f"{e.filename}: {e.strerror}") from None
    _say(describe_change(change, plan, backup))


def _look(paths: Sequence[str]) -> list[Any]:
    from rostra.server.raft.recovery_disk import look

    try:
        found = [look(Path(path)) for path in paths]
    except RostraError as e:
        raise Failed(e.message) from None
    given = [each.path for each in found]
    if doubled := next((path for path in given if given.count(path) > 1), None):
        raise UsageError(f"{doubled} is given twice")
    return found


def _say(lines: Any) -> None:
    for line in lines:
        say(line)


_DIRECTORIES = """
DIR is the data directory of a server, or a copy of it from another host. No server may be running.
"""

COMMANDS = {
    "plan": Command(
        "recover plan DIR...",
        "Compares data directories, says which one is safe to keep and what each choice loses",
        _plan,
        text=_DIRECTORIES + "Give all there are. Nothing is changed. docs/recovery.md has the whole story.",
    ),
    "apply": Command(
        "recover apply -keep=DIR -members=NAME[,NAME...] [options] [DIR...]",
        "Makes a data directory the one that the cluster goes on from",
        _apply,
        (
            Flag("keep", "The data directory to go on from."),
            Flag("members", "Names of the servers that are members from now on, the kept one among them."),
            Flag("peers", "Consul's peers.json, in the place of -members."),
            Flag("lose", "Name of a server whose entries are given up. May be repeated.", "texts"),
        ),
        text=_DIRECTORIES
        + """
The other DIRs are compared with the kept one: give all there are. Entries that another one has are given up only where
-lose names its server. Each member but the kept one must be among the DIRs and its log agree; servers whose data is
lost are emptied and added afterwards (rostra operator raft add-peer). docs/recovery.md has the whole story.
""",
    ),
}
