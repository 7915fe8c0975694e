"""The mutants: for each hazard of docs/raft.md, the rule against it switched off, and the tests that must notice.

A mutant is a replacement of exact text in one file of the product; each text must be there exactly once. Where a rule
moves, its mutant moves with it. `tests` are pytest node ids; `seeds`, where there are any, are those of the simulator,
which has to notice as well: that keeps the simulator honest.
"""

# ruff: noqa: E501 (exact texts of other files)

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

UNIT = "tests/unit/server/raft"

#: Of the simulator, for mutants that it notices within a few: enough that another order of events changes nothing.
SEEDS = 60


@dataclass(frozen=True, slots=True)
class Mutant:
    """`what` is switched off by replacing, in `file`, each first text of `changes` by the second."""

    id: str
    what: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]
    seeds: range = range(0)

    @property
    def hazard(self) -> str:
        return self.id.partition(".")[0]

    def mutated(self, source: str) -> str:
        for old, new in self.changes:
            source = source.replace(old, new)
        return source

    def problem(self, root: Path) -> str:
        """Why this mutant does not fit the tree, or ""."""
        source = (root / self.file).read_text(encoding="utf-8")
        for old, _ in self.changes:
            if (count := source.count(old)) != 1:
                return f"{self.id}: in {self.file} there is {count} times: {old!r}"
        try:
            ast.parse(self.mutated(source))
        except SyntaxError as e:
            return f"{self.id}: {self.file} does not parse with it: {e}"
        return "" if self.tests or self.seeds else f"{self.id}: nothing is there to catch it"


def _mutant(id: str, what: str, file: str, *changes: tuple[str, str], by: str, seeds: int = 0) -> Mutant:
    """`by`: lines "test_file test_name", the file without its beginning where it is a unit test of server/raft."""
    tests = []
    for line in by.split("\n"):
        if line.strip():
            file_name, _, test = line.strip().partition(" ")
            path = file_name if file_name.startswith("tests/") else f"{UNIT}/{file_name}"
            tests.append(f"{path}::{test.strip()}" if test else path)
    return Mutant(id, what, file, changes, tuple(tests), range(seeds))


GUARD, CORE, LOG = "server/raft/guard.py", "server/raft/core.py", "server/raft/log.py"
REPLICATION, ELECTIONS = "server/raft/replication.py", "server/raft/elections.py"
TRANSPORT, MESSAGES = "server/raft/transport.py", "server/raft/messages.py"
JOURNAL, SNAPSHOTS, SNAPSHOTTING = "server/raft/journal.py", "server/raft/snapshots.py", "server/raft/snapshotting.py"
DISK, MEMBERS, MEMBERSHIP = "server/raft/disk.py", "server/raft/members.py", "server/raft/membership.py"

MUTANTS: tuple[Mutant, ...] = (
    _mutant(
        "H1.1",
        "an append without a place in the log may commit what is here",
        GUARD,
        (
            'message = {**message, "commit_index": min(message["commit_index"], core.commit_index())}',
            "pass",
        ),
        by="test_guard.py test_h1_an_append_without_a_place_in_the_log_commits_nothing",
    ),
    _mutant(
        "H2.1",
        "appends reach the core as they are: it truncates after prevLogIdx",
        GUARD,
        ("message = self._only_conflicts(message)", "pass"),
        by="""test_guard.py test_h2_a_late_heartbeat_truncates_nothing
        test_guard.py test_h2_entries_sent_twice_in_other_batches_truncate_nothing""",
        seeds=200,  # it takes messages that overtake one another: one seed in a hundred
    ),
    _mutant(
        "H2.2",
        "a known prefix commits what is behind it",
        GUARD,
        ('"commit_index": min(message["commit_index"], end),', '"commit_index": message["commit_index"],'),
        by="test_guard.py test_h2_a_known_prefix_proves_no_more_than_itself",
    ),
    _mutant(
        "H2.3",
        "a known prefix acknowledges what is behind it",
        GUARD,
        ("self._answer_next = end + 1", "self._answer_next = None"),
        by="test_guard.py test_h2_a_known_prefix_proves_no_more_than_itself",
    ),
    _mutant(
        "H2.4",
        "a committed entry may be replaced",
        GUARD,
        ("if start <= self._core.commit_index():", "if False:"),
        by="test_guard.py test_a_leader_that_contradicts_a_committed_entry_stops_the_process",
    ),
    _mutant(
        "H2.5",
        "entries that come again commit more than the leader says",
        GUARD,
        ('"commit_index": min(message["commit_index"], end),', '"commit_index": end,'),
        by="test_guard.py test_h2_entries_that_come_again_commit_no_more_than_the_leader_says",
        seeds=SEEDS,
    ),
    _mutant(
        "H3.1",
        "a snapshot at the start throws the log's tail away",
        SNAPSHOTTING,
        ("if not len(journal) or journal.term_at(found.index) != found.term:", "if True:"),
        by="test_snapshotting.py test_h3_a_restart_goes_on_with_the_entries_behind_the_snapshot",
        seeds=SEEDS,
    ),
    _mutant(
        "H3.2",
        "an installed snapshot throws away the entries that fit it",
        SNAPSHOTTING,
        ("if journal.term_at(snapshot.index) != snapshot.term:", "if True:"),
        by="test_snapshotting.py test_h3_entries_that_fit_the_snapshot_stay_behind_it",
    ),
    _mutant(
        "H3.3",
        "a snapshot at the start leaves a log that contradicts it",
        SNAPSHOTTING,
        ("if not len(journal) or journal.term_at(found.index) != found.term:", "if not len(journal):"),
        by="test_snapshotting.py test_h3_what_a_crash_left_between_snapshot_and_log_is_put_right",
    ),
    _mutant(
        "H3.4",
        "the core compacts the log for a snapshot of its own",
        CORE,
        ("def _SyncObj__tryLogCompaction(self)", "def _no_compaction(self)"),
        by="test_guard.py test_h3_h4_h22_the_core_never_drops_entries_for_a_snapshot_of_its_own",
    ),
    _mutant(
        "H4.1",
        "old segments are deleted before the disk has the record that replaces them",
        JOURNAL,
        (" or self.durable_lsn < self._forget_lsn:", ":"),
        by="test_journal.py test_a_segment_stays_until_the_record_that_makes_it_superfluous_is_on_the_disk",
    ),
    _mutant(
        "H4.2",
        "dropping the log's beginning deletes segments that are still needed",
        JOURNAL,
        (" and segments[count + 1].first <= base:", ":"),
        by="""test_journal.py test_segments_go_when_nothing_in_them_is_needed_and_term_and_vote_stay
        test_journal.py test_wherever_the_power_goes_all_that_was_synced_is_there_and_nothing_that_never_was""",
        seeds=SEEDS,
    ),
    _mutant(
        "H5.1",
        "a sync of a file does not reach the disk",
        DISK,
        ("os.fdatasync(self._fd)", "pass"),
        by="test_disk.py test_h5_a_sync_reaches_the_disk",
    ),
    _mutant(
        "H5.2",
        "the name of a new file is not made durable",
        DISK,
        ("os.fsync(fd)", "pass"),
        by="test_disk.py test_h5_a_created_file_and_its_name_are_durable_in_this_order",
    ),
    _mutant(
        "H5.3",
        "what is written to the journal is not synced",
        JOURNAL,
        (
            "            self._allocated = start + step\n        file.sync()",
            "            self._allocated = start + step",
        ),
        by="test_journal.py test_wherever_the_power_goes_all_that_was_synced_is_there_and_nothing_that_never_was",
        seeds=SEEDS,
    ),
    _mutant(
        "H5.4",
        "term and vote are not written down",
        JOURNAL,
        ('self._record(_META.pack(META, term) + (votedForNodeId or "").encode())', "pass"),
        by="test_journal.py test_a_reopened_journal_has_its_entries_term_vote_and_commit_index",
        seeds=SEEDS,
    ),
    _mutant(
        "H5.5",
        "a new segment begins without the vote",
        JOURNAL,
        (
            "_beginning(header, self._term, self._vote, self._commit, base)",
            "_beginning(header, self._term, None, self._commit, base)",
        ),
        by="test_journal.py test_segments_go_when_nothing_in_them_is_needed_and_term_and_vote_stay",
    ),
    _mutant(
        "H5.6",
        "what a killed process had written counts before it is synced",
        JOURNAL,
        ("            if found.unvouched:\n", "            if False:\n"),
        by="test_journal.py test_what_a_killed_process_had_written_is_on_the_disk_before_it_counts",
    ),
    _mutant(
        "H6.1",
        "a torn tail stays on the disk, behind what is written next",
        JOURNAL,
        ("            if found.torn_bytes:\n", "            if False:\n"),
        by="""test_journal.py test_garbage_after_the_tail_is_wiped
        test_journal.py test_a_torn_tail_is_wiped_and_what_was_synced_stays""",
    ),
    _mutant(
        "H6.2",
        "checksums do not depend on the place",
        JOURNAL,
        ("zlib.crc32(body, salt ^ (offset & 0xFFFFFFFF))", "zlib.crc32(body)"),
        ("zlib.crc32(body, salt ^ (at & 0xFFFFFFFF)) == crc", "zlib.crc32(body) == crc"),
        ("zlib.crc32(head, self._salt ^ (self._tail & 0xFFFFFFFF))", "zlib.crc32(head)"),
        by="test_journal.py test_a_checksum_is_good_in_its_place_only",
    ),
    _mutant(
        "H6.3",
        "damage in the middle is taken for a torn tail",
        JOURNAL,
        ("if witness is not None or (header.format > 1 and frame_count < len(_BEGINNING)):", "if False:"),
        by="test_journal.py test_a_flipped_bit_in_the_middle_is_refused_and_nothing_is_touched",
    ),
    _mutant(
        "H7.1",
        "no zeros are written ahead of the journal",
        JOURNAL,
        ("            file.write(start, bytes(step))\n", "            file.truncate(start + step)\n"),
        by="test_journal.py test_nothing_is_written_on_the_loop_and_space_is_zeroed_before_it_is_used",
    ),
    _mutant(
        "H7.2",
        "a full disk is passed over, and what it did not take acknowledged",
        JOURNAL,
        (
            "            if error is None and seconds is not None:\n                done(seconds)",
            "            if True:\n                done(seconds or 0.0)",
        ),
        by="test_log.py test_a_failed_disk_stops_the_process_and_nothing_is_acknowledged",
        seeds=SEEDS,
    ),
    _mutant(
        "H7.3",
        "a sync that failed is tried again",
        JOURNAL,
        (
            "                self._failed = True\n                self.on_failed(",
            "                self._is_syncing = False\n                self.on_failed(",
        ),
        by="test_journal.py test_a_failed_disk_is_reported_once_and_never_tried_again",
    ),
    _mutant(
        "H8.1",
        "what goes wrong inside is logged, and the server goes on",
        LOG,
        (
            "        except BadMessage:\n            raise\n        except Exception as e:\n            self._fail_with(e)",
            "        except BadMessage:\n            raise\n        except Exception:\n            pass",
        ),
        by="""test_promises.py test_h8_a_contradiction_in_the_log_stops_the_process
        test_promises.py test_h8_whatever_a_turn_of_the_log_raises_stops_the_process
        test_promises.py test_h8_so_does_what_is_raised_anywhere_else""",
    ),
    _mutant(
        "H8.2",
        "what goes wrong when a link comes or goes costs that link only",
        LOG,
        ("    @_or_stop\n    def _on_link(", "    def _on_link("),
        by="test_promises.py test_h8_so_does_what_is_raised_anywhere_else",
    ),
    _mutant(
        "H9.1",
        "the core may load a snapshot of its own, and swallow its failure",
        CORE,
        ('raise Internal("the core tried to load a snapshot of its own")', "return None"),
        by="test_guard.py test_h9_the_core_never_loads_a_snapshot_of_its_own",
    ),
    _mutant(
        "H9.2",
        "a snapshot that the state refuses is acknowledged",
        SNAPSHOTTING,
        (
            "                    return\n                while not self._is_idle():",
            "                    self._answer(message, snapshot.size, done=True)\n"
            "                    return\n                while not self._is_idle():",
        ),
        by="test_snapshotting.py test_h9_a_snapshot_that_the_state_refuses_is_not_acknowledged_and_changes_nothing",
    ),
    _mutant(
        "H9.3",
        "without its snapshot a log is started from an empty state",
        SNAPSHOTTING,
        (
            "            if first > 1:\n                raise DamagedJournal(",
            "            if first < 0:\n                raise DamagedJournal(",
        ),
        by="test_snapshotting.py test_h9_a_log_whose_snapshot_is_damaged_is_not_started_from_an_empty_state",
    ),
    _mutant(
        "H9.4",
        "a snapshot from before the log's beginning stands in for a lost one",
        SNAPSHOTTING,
        ("if found is None or found.index < first:", "if found is None:"),
        by="test_snapshotting.py test_h9_a_snapshot_from_before_the_log_does_not_stand_in_for_a_lost_one",
    ),
    _mutant(
        "H10.1",
        "an answer counts whatever its term",
        GUARD,
        (
            'if message["term"] != self._core.term() or not self._core.is_leader():  # H10: the core would count it',
            "if not self._core.is_leader():",
        ),
        by="test_guard.py test_h10_an_answer_of_an_earlier_term_counts_for_nothing",
    ),
    _mutant(
        "H10.2",
        "an answer about a snapshot counts whatever its term",
        GUARD,
        (
            'if message["term"] != self._core.term() or not self._core.is_leader():  # H10\n',
            "if not self._core.is_leader():\n",
        ),
        by="test_guard.py test_h10_an_answer_about_a_snapshot_of_an_earlier_term_counts_for_nothing",
    ),
    _mutant(
        "H10.3",
        "a piece of a snapshot may be answered for more than is committed",
        GUARD,
        (' or message["index"] > self._core.commit_index():', ":"),
        by="test_guard.py test_h10_a_follower_cannot_have_a_snapshot_beyond_what_is_committed",
    ),
    _mutant(
        "H11.1",
        "every reset of a flight is honoured",
        REPLICATION,
        ('if message["r"] <= follower.reset_floor:', "if False:"),
        by="test_guard.py test_h11_one_reset_is_honoured_per_flight",
    ),
    _mutant(
        "H11.2",
        "a follower that lacks entries looks for its place one by one",
        GUARD,
        ("next_index = min(next_index, self._core.commit_index() + 1)", "pass"),
        by="test_guard.py test_h11_a_follower_that_misses_entries_asks_for_what_follows_its_commit_index",
    ),
    _mutant(
        "H12.1",
        "a follower that waits for a snapshot is sent entries all the time",
        REPLICATION,
        (" and not follower.streaming:\n                entries", ":\n                entries"),
        by="test_guard.py test_h12_who_waits_for_a_snapshot_gets_one_message_a_round_and_its_answers_cause_none",
    ),
    _mutant(
        "H12.2",
        "each answer of a follower that waits for a snapshot causes another message",
        REPLICATION,
        ("self.is_due = not follower.streaming", "self.is_due = True"),
        by="test_guard.py test_h12_who_waits_for_a_snapshot_gets_one_message_a_round_and_its_answers_cause_none",
    ),
    _mutant(
        "H12.3",
        "no bound on what is on its way to a follower",
        REPLICATION,
        (" and follower.flight_bytes < WINDOW_BYTES", ""),
        by="test_guard.py test_a_window_bounds_what_is_on_its_way_to_a_silent_follower",
    ),
    _mutant(
        "H12.4",
        "each answer causes another message",
        REPLICATION,
        ("        if self._core.next_index(follower.node) <= self._journal.last_index:\n", "        if True:\n"),
        by="test_guard.py test_h12_an_answer_to_a_heartbeat_causes_no_message",
    ),
    _mutant(
        "H13.1",
        "no pre-vote: a server that hears nobody raises its term",
        ELECTIONS,
        (
            "        if self.is_loyal():\n            return False\n        term = self._core.term() + 1",
            "        return True\n        term = self._core.term() + 1",
        ),
        by="test_guard.py test_an_isolated_server_asks_but_never_raises_its_term",
    ),
    _mutant(
        "H13.2",
        "votes are given although the leader was heard just now",
        ELECTIONS,
        ("        return not self.is_loyal()\n", "        return True\n"),
        by="test_guard.py test_who_heard_the_leader_lately_grants_nothing_and_does_not_campaign",
    ),
    _mutant(
        "H13.3",
        "pre-votes are granted although the leader was heard just now",
        ELECTIONS,
        ("            and not self.is_loyal()\n        )", "        )"),
        by="test_guard.py test_who_heard_the_leader_lately_grants_nothing_and_does_not_campaign",
    ),
    _mutant(
        "H13.4",
        "nobody is told of a newer term",
        GUARD,
        ('self._send(peer_id, {"type": "stale", "term": self._core.term()})', "pass"),
        by="test_guard.py test_h13_a_leader_of_the_past_is_told_the_term",
    ),
    _mutant(
        "H13.5",
        "a leader that is told of a newer term stays",
        GUARD,
        ('self._core.adopt_term(message["term"])', "pass"),
        by="test_guard.py test_h13_a_leader_follows_a_higher_term_so_that_the_other_can_rejoin",
    ),
    _mutant(
        "H13.6",
        "a pre-vote is granted to a shorter log",
        ELECTIONS,
        ('            and (message["last_log_term"], message["last_log_index"]) >= (last[2], last[1])\n', ""),
        by="test_guard.py test_a_pre_vote_is_refused_to_a_shorter_log_and_a_known_term",
    ),
    _mutant(
        "H13.7",
        "a term may fall",
        GUARD,
        (
            '        if message["term"] > self._core.term():\n            self._core.adopt_term',
            "        if True:\n            self._core.adopt_term",
        ),
        by="test_guard.py test_h13_terms_never_fall",
    ),
    _mutant(
        "H13.8",
        "a refused pre-vote counts as granted",
        ELECTIONS,
        ('elif message["granted"] and message["term"] == self._asked_term', 'elif message["term"] == self._asked_term'),
        by="test_guard.py test_refusals_and_grants_for_another_term_are_no_grants",
    ),
    _mutant(
        "H13.9",
        "a leader grants pre-votes",
        ELECTIONS,
        ("            and not self._core.is_leader()\n", ""),
        by="test_guard.py test_a_leader_grants_nobody_a_pre_vote",
    ),
    _mutant(
        "H14.1",
        "a leader that hears nobody stays leader for 30 s",
        CORE,
        ("leaderFallbackTimeout=timing.election_min_s,", ""),
        by="test_log.py test_a_leader_that_hears_nobody_steps_down",
    ),
    _mutant(
        "H15.1",
        "the answer to a caller that gave up raises in the middle of apply",
        LOG,
        (
            "            if not future.done():\n                try:\n                    future.set_result(result)",
            "            if True:\n                try:\n                    future.set_result(result)",
        ),
        ("except Exception as e:  # H15", "except ZeroDivisionError as e:  # H15"),
        by="test_promises.py test_h15_a_caller_that_gave_up_harms_nobody",
    ),
    _mutant(
        "H16.1",
        "an exception in apply is logged, and the entry tried again",
        LOG,
        (
            "        self._turn()\n",
            "        try:\n            self._turn()\n        except Exception:\n            self._schedule()\n",
        ),
        by="test_log.py test_an_exception_in_apply_stops_the_process",
    ),
    _mutant(
        "H16.2",
        "entries of unknown kinds are passed over",
        LOG,
        (
            "            if kind != BATCH:\n                raise",
            "            if kind != BATCH:\n                return True\n                raise",
        ),
        by="test_promises.py test_h16_an_entry_of_a_kind_that_nobody_knows_stops_the_process",
    ),
    _mutant(
        "H16.3",
        "a command that fails leaves half of its changes behind",
        "server/state/store.py",
        (
            '        except Exception as e:\n            tx.rollback()\n            result = ("err", "internal", self._note(kind, e))',
            '        except Exception as e:\n            result = ("err", "internal", self._note(kind, e))',
        ),
        by="tests/unit/server/state/test_store.py test_a_command_that_fails_leaves_nothing_behind",
    ),
    _mutant(
        "H17.1",
        "a write on its way is reported as not done when leadership is lost",
        LOG,
        ('partial(Timeout, f"{why}: the write may or may not have been done")', "NoLeader"),
        by="""test_promises.py test_h17_a_write_that_never_left_is_not_done_and_one_that_left_is_unknown
        test_log.py test_writes_on_their_way_are_unknown_when_another_leader_appears""",
    ),
    _mutant(
        "H17.2",
        "writes that never left hang when leadership is lost",
        LOG,
        ("        _fail_all((future for _, future in pending), NoLeader)\n", ""),
        by="""test_log.py test_stopping_answers_everyone_who_waits
        test_promises.py test_h17_a_write_that_never_left_is_not_done_and_one_that_left_is_unknown""",
    ),
    _mutant(
        "H18.1",
        "votes are counted, not voters",
        ELECTIONS,
        (" or vote in self._votes:", ":"),
        by="test_guard.py test_h18_a_vote_that_comes_twice_is_one_vote",
    ),
    _mutant(
        "H19.1",
        "the leader counts itself before its own disk has the entry",
        REPLICATION,
        ('if message["success"] and message["next_node_idx"] - 1 > self._journal.durable_index:', "if False:"),
        by="test_guard.py test_h19_an_answer_counts_when_the_leaders_own_disk_has_the_entry",
        seeds=SEEDS,
    ),
    _mutant(
        "H19.2",
        "a server alone commits before its disk has the entry",
        LOG,
        ("        if replication.has_other_voters or journal.is_durable:\n", "        if True:\n"),
        by="test_log.py test_a_result_is_given_only_when_the_disk_has_the_entry",
    ),
    _mutant(
        "H19.3",
        "answers that wait for the leader's disk are counted without it",
        REPLICATION,
        ('while follower.held and follower.held[0]["next_node_idx"] - 1 <= durable:', "while follower.held:"),
        by="test_guard.py test_h19_an_answer_counts_when_the_leaders_own_disk_has_the_entry",
    ),
    _mutant(
        "H19.4",
        "who elected itself alone speaks of its term before its disk has it",
        REPLICATION,
        ("        if self._began_alone and self._journal.durable_lsn < self._begun_lsn:\n", "        if False:\n"),
        by="test_guard.py test_h19_who_elected_itself_alone_tells_nobody_before_its_disk_has_the_term",
    ),
    _mutant(
        "H20.1",
        "messages that we do not speak reach the core",
        GUARD,
        (
            "            self.dropped += 1\n            return\n        handle(peer_id, message)",
            "            self._deliver(Node(peer_id), message)\n            return\n        handle(peer_id, message)",
        ),
        by="test_guard.py test_messages_that_this_house_does_not_speak_are_dropped",
    ),
    _mutant(
        "H20.2",
        "the core unpickles changes of the membership in the log",
        CORE,
        ("dynamicMembershipChange=False", "dynamicMembershipChange=True"),
        ("def _SyncObj__parseChangeClusterRequest(self", "def _no_change(self"),
        by="test_guard.py test_h20_a_pickle_in_the_log_is_never_loaded",
    ),
    _mutant(
        "H20.3",
        "a message with fields of a wrong type is let through",
        MESSAGES,
        ("if type(value) is not wanted or (type(value) is int and not 0 <= value < _INT_MAX):", "if False:"),
        by="test_messages.py test_anything_else_is_a_bad_message",
    ),
    _mutant(
        "H20.4",
        "messages of another cluster are taken",
        MESSAGES,
        ("if parts[1] != cluster_id:", "if False:"),
        by="test_messages.py test_anything_else_is_a_bad_message",
    ),
    _mutant(
        "H20.5",
        "entries out of order are let through",
        MESSAGES,
        ("        _check_entries(message)", "        pass"),
        by="test_messages.py test_anything_else_is_a_bad_message",
    ),
    _mutant(
        "H20.6",
        "a frame of any length is waited for",
        "wire/frames.py",
        ("if length > self._bytes_max:", "if False:"),
        by="tests/unit/wire/test_frames.py test_an_announced_length_above_the_bound_is_refused_before_its_bytes_come",
    ),
    _mutant(
        "H20.7",
        "an agent may open a Raft connection",
        "server/endpoint.py",
        ("if server_id is None or server_id != peer.node_id:", "if False:"),
        by="tests/cluster/test_trust.py test_a_client_is_no_server_whatever_it_says",
    ),
    _mutant(
        "H20.8",
        "a raft connection of who is no member is taken",
        TRANSPORT,
        (
            "        if self._closed or link is None or peer_id < self._node_id:",
            "        if link is None:\n"
            '            link = self.links[peer_id] = Link(Member(peer_id, "", 0, "", ""))\n'
            "        if self._closed:",
        ),
        by="test_log.py test_strangers_and_the_wrong_side_are_refused",
    ),
    _mutant(
        "H20.9",
        "a peer's certificate is not looked at",
        "runtime/tls.py",
        ("context.verify_mode = ssl.CERT_REQUIRED", "context.verify_mode = ssl.CERT_NONE"),
        by="""tests/unit/runtime/test_tls.py test_an_expired_certificate_is_refused
        tests/unit/runtime/test_tls.py test_a_certificate_of_another_ca_with_the_same_name_is_refused""",
    ),
    _mutant(
        "H20.10",
        "a server may show another key than the list of members names",
        "server/peers.py",
        ("if key_hash is not None and shown != key_hash:", "if False:"),
        by="tests/cluster/test_sessions.py test_a_server_with_another_key_than_expected_leaves_no_unseen_exception",
    ),
    _mutant(
        "H20.11",
        "a term from the far future is taken for the present one",
        GUARD,
        (
            'if max(message.get("term", 0), message.get("current", 0)) > self._core.term() + TERMS_AHEAD_MAX:',
            "if False:",
        ),
        by="test_guard.py test_h20_a_term_from_the_far_future_is_not_written_down",
    ),
    _mutant(
        "H21.1",
        "a list of members counts only once it was committed and restarted with",
        GUARD,
        ("            self._membership.appended(entries)", "            pass"),
        by="tests/cluster/test_raft_cluster.py test_a_learner_gets_everything_counts_for_nothing_and_is_promoted",
        seeds=SEEDS,
    ),
    _mutant(
        "H21.2",
        "a list whose entry was replaced stays in force",
        MEMBERSHIP,
        ("while self._lists[-1][0] >= first and len(self._lists) > 1:", "while False:"),
        by="test_membership.py test_h21_when_its_entry_is_replaced_the_list_before_is_in_force_again",
    ),
    _mutant(
        "H21.3",
        "after a restart the members are those of the founding",
        LOG,
        (
            "            self._membership.appended(journal.entry(i) for i in range(first, journal.last_index + 1))",
            "            assert first",
        ),
        by="tests/cluster/test_raft_cluster.py test_members_survive_the_restart_of_all",
    ),
    _mutant(
        "H21.4",
        "a removed server and a learner campaign",
        ELECTIONS,
        ("        if not self._votes_itself or self.disk_hangs:  # H21", "        if False:  # H21"),
        by="test_guard.py test_h21_who_does_not_vote_never_campaigns",
    ),
    _mutant(
        "H21.5",
        "learners and replicas count as voters",
        CORE,
        (
            "self._SyncObj__otherNodes: set[Node] = deciding\n",
            "self._SyncObj__otherNodes: set[Node] = deciding | told\n",
        ),
        by="test_guard.py test_h21_learners_are_told_everything_and_count_for_nothing",
    ),
    _mutant(
        "H21.6",
        "the votes of learners count",
        ELECTIONS,
        (" or peer_id not in self._voters or vote", " or vote"),
        by="test_guard.py test_h21_the_vote_of_a_learner_is_none",
    ),
    _mutant(
        "H21.7",
        "a list of members counts although its entry was not taken",
        GUARD,
        ("        if entries and fits:", "        if entries:"),
        by="test_guard.py test_h21_entries_that_do_not_fit_change_no_members",
    ),
    _mutant(
        "H21.8",
        "who is not in a list that may be taken back is not heard any more",
        LOG,
        ("before = () if self.members_settled else self._membership.before", "before = ()"),
        by="test_promises.py test_h21_who_may_still_be_a_member_is_heard_until_the_list_without_it_is_committed",
    ),
    _mutant(
        "H21.9",
        "who is not known is heard although it proves nothing",
        "server/introduction.py",
        ("or not hmac.compare_digest(", "or False and hmac.compare_digest("),
        by="tests/unit/server/test_introduction.py test_a_proof_is_of_no_use_to_another_key_or_cluster_and_none_without_the_key",
    ),
    _mutant(
        "H21.10",
        "who was away hears nobody that was let in meanwhile",
        "server/roster.py",
        (
            "if raft.leader_id is None and raft.last_heard_age_s() > ALONE_S and self.hear(",
            "if False and (lambda *_: _)(",
        ),
        by="tests/cluster/test_membership.py test_h21_who_was_away_while_all_others_changed_hears_the_only_one_that_is_left",
    ),
    _mutant(
        "H21.11",
        "a list that is not committed is told to nobody",
        "server/roster.py",
        (
            "            answer |= self.introduction()",
            "            answer |= raft.members_settled and self.introduction()",
        ),
        ('or {"membership": dump_membership(self._membership(raft))}', "or {}"),
        by="tests/cluster/test_membership.py test_a_member_is_told_whom_to_hear_although_the_list_that_says_so_is_not_committed",
    ),
    _mutant(
        "H21.12",
        "a stranger is heard although there is a leader",
        "server/roster.py",
        ("if raft.leader_id is None and raft", "if raft"),
        by="tests/cluster/test_membership.py test_h21_nobody_is_introduced_to_who_has_a_leader_or_has_only_just_lost_it",
    ),
    _mutant(
        "H21.13",
        "a stranger is heard in the moment of an election",
        "server/roster.py",
        ("is None and raft.last_heard_age_s() > ALONE_S and", "is None and"),
        by="tests/cluster/test_membership.py test_h21_nobody_is_introduced_to_who_has_a_leader_or_has_only_just_lost_it",
    ),
    _mutant(
        "H21.14",
        "who comes back and knows none of the members believes none of them",
        "server/standing.py",
        ("                self._hear(said, reply, key_hash)  # whoever", "                pass  # whoever"),
        by="tests/cluster/test_membership.py test_h21_who_comes_back_to_a_cluster_of_none_that_it_knows_follows_it",
    ),
    _mutant(
        "H21.15",
        "the row of a server that is being removed is written as if it stayed",
        "server/roster.py",
        ("        return member.name in self.leaving or all(", "        return False and all("),
        by="tests/cluster/test_membership.py test_a_server_that_is_removed_while_the_rows_follow_the_list_has_left",
    ),
    _mutant(
        "MOVED.1",
        "who has a leader does not look for a member that it cannot reach",
        "server/standing.py",
        ("            if self._misses_one() or not self._has_asked:", "            if not self._has_asked:"),
        by="tests/sim/test_moves.py test_a_server_that_knows_only_old_addresses_is_looked_for_by_those_that_have_a_leader",
    ),
    _mutant(
        "MOVED.2",
        "who knows that a server has moved tells others what stands in the list",
        "server/roster.py",
        ("m.name, *self._where(m), m.key_hash", "m.name, m.host, m.port, m.key_hash"),
        by="tests/sim/test_moves.py test_who_knows_where_all_are_tells_those_that_know_only_where_it_is",
    ),
    _mutant(
        "MOVED.3",
        "a server is asked only where the list says that it is, not where it was heard from",
        "server/standing.py",
        ("known = [join_address(*self._peers.where(m)) for m in others] + [", "known = ["),
        by="tests/sim/test_moves.py test_who_knows_where_all_are_tells_those_that_know_only_where_it_is",
    ),
    _mutant(
        "MOVED.4",
        "what others say of a server counts more than what it says itself",
        "server/peers.py",
        (
            "for known in (self._hints, self._hearsay):\n            place",
            "for known in (self._hearsay, self._hints):\n            place",
        ),
        by="tests/unit/server/test_peers.py test_where_a_server_was_heard_from_is_tried_before_what_others_say_and_that_before_the_list",
    ),
    _mutant(
        "MOVED.5",
        "the list of another server counts as if each of those in it had said where it is",
        "server/run.py",
        ("self._peers.hear_say(member.id", "self._peers.hint(member.id"),
        by="tests/cluster/test_membership.py test_an_old_list_that_another_server_shows_takes_no_hint_away",
    ),
    _mutant(
        "NAME.1",
        "the name of a failed node is free although another server has a connection of it",
        "server/enrolment.py",
        ('return f"has a connection to server {name}" if held is True else ""', 'return ""'),
        by="tests/attack/test_enrolment.py test_the_name_of_a_failed_node_is_not_free_while_any_server_has_a_connection_of_it",
    ),
    _mutant(
        "NAME.2",
        "the session of a key goes on when its name is another's",
        "server/run.py",
        ("                self._endpoint.agents.end_former(*effect[1:3])", "                pass"),
        by="tests/attack/test_enrolment.py test_a_name_that_goes_to_another_key_takes_the_session_of_the_old_one_and_its_writes_with_it",
    ),
    _mutant(
        "NAME.3",
        "whoever shows another key is heard for the node of that name",
        "server/leader.py",
        ('if member is not None and key_hash in ("", member.key_hash):', "if member is not None:"),
        by="tests/attack/test_enrolment.py test_who_shows_another_key_is_not_heard_for_the_node_of_that_name",
    ),
    _mutant(
        "ENROL.1",
        "one address enrols as many names as it likes",
        "server/enrolment.py",
        ("        return left >= 1\n", "        return True\n"),
        by="tests/attack/test_enrolment.py test_one_address_enrols_a_whole_deployment_at_once_and_then_one_each_second",
    ),
    _mutant(
        "ENROL.2",
        "names that were enrolled and never used stay",
        "server/leader.py",
        ("        await self._forget_unused(members, now)\n", ""),
        by="tests/attack/test_enrolment.py test_names_that_somebody_enrols_and_leaves_are_bounded_and_go",
    ),
    _mutant(
        "ENROL.3",
        "names that nobody uses have no bound",
        "server/enrolment.py",
        ("if self._unused >= UNUSED_MAX:", "if False:"),
        by="tests/attack/test_enrolment.py test_where_too_many_names_are_unused_the_next_one_is_told_the_bound_and_what_to_do",
    ),
    _mutant(
        "H22.1",
        "entries are applied while the tables are copied for a snapshot",
        LOG,
        (
            "        if self._snapshots.holds_apply:  # its end schedules another turn\n            return\n",
            "",
        ),
        by="test_snapshotting.py test_nothing_is_applied_while_the_tables_are_copied",
        seeds=SEEDS,
    ),
    _mutant(
        "H22.2",
        "a snapshot leaves nothing of the log before it",
        SNAPSHOTTING,
        ("kept = self._limits.log_bytes_max // 3", "kept = 0"),
        by="test_snapshotting.py test_h22_a_snapshot_leaves_a_part_of_the_log_for_followers_that_lag_a_little",
    ),
    _mutant(
        "H22.3",
        "the log in memory has no bound",
        SNAPSHOTTING,
        ("return kept < self._limits.log_bytes_max or self._keeps_all", "return True"),
        by="test_snapshotting.py test_at_its_bound_the_log_takes_nothing_more_until_a_snapshot_has_made_room",
    ),
    _mutant(
        "H22.4",
        "entries that no snapshot holds are dropped from the log",
        SNAPSHOTTING,
        (
            "while base < min(floor, first + TRIM_ENTRIES) and size > kept:",
            "while base < journal.last_index and size > kept:",
        ),
        by="test_snapshotting.py test_what_no_snapshot_holds_stays_in_the_log",
    ),
    _mutant(
        "H23.1",
        "new entries leave with the next heartbeat",
        LOG,
        ("elif journal.last_index != last or replication.is_due:", "elif core.heartbeat_is_due():"),
        by="test_promises.py test_h23_a_write_leaves_at_once_and_not_with_the_next_heartbeat",
    ),
    _mutant(
        "H24.1",
        "a commit index beyond the log is believed",
        JOURNAL,
        ("return min(self._commit, self._entries[-1][1])  # H24", "return self._commit"),
        ("self.commit_index = min(self.commit_index, self.entries[-1][1])", "pass"),
        by="test_promises.py test_h24_a_commit_index_beyond_the_log_is_not_believed",
    ),
    _mutant(
        "ACK.1",
        "votes and answers leave before the disk has what they promise",
        TRANSPORT,
        (
            'if message["type"] in _UNBOUND or (self._journal.is_durable and not self._waiting):',
            "if True:",
        ),
        by="""test_log.py test_a_vote_is_asked_and_given_only_when_the_disk_knows
        test_log.py test_a_follower_answers_heartbeats_while_its_disk_is_slow""",
        seeds=SEEDS,
    ),
    _mutant(
        "ACK.2",
        "a follower says that it has a snapshot before its disk knows",
        TRANSPORT,
        ('"snapshot", "timeout_now"})', '"snapshot", "timeout_now", "snapshot_answer"})'),
        by="test_snapshotting.py test_a_snapshot_is_acknowledged_only_when_the_disk_knows_of_it",
    ),
    _mutant(
        "LEASE.1",
        "the lease is longer than the followers' loyalty",
        ELECTIONS,
        ("LOYALTY, LEASE = 0.9, 0.8", "LOYALTY, LEASE = 0.9, 1.2"),
        by="test_guard.py test_the_lease_ends_before_its_followers_may_elect_another",
    ),
    _mutant(
        "LEASE.2",
        "the lease goes on after leadership was offered to another",
        LOG,
        ("        if self._offers and not self._are_declined():\n", "        if False:\n"),
        by="test_promises.py test_from_the_offer_of_leadership_on_the_lease_is_void_until_the_heir_lets_it_pass",
    ),
    _mutant(
        "LEASE.3",
        "the lease counts from the answer instead of from the question",
        REPLICATION,
        (
            'follower.echoed = max(follower.echoed, message["r"])',
            'follower.echoed = max(follower.echoed, message["r"], self._clock())',
        ),
        by="test_promises.py test_the_lease_counts_from_when_a_round_was_sent_and_not_from_its_answer",
        seeds=SEEDS,
    ),
    _mutant(
        "LEASE.4",
        "a restarted server votes as if it had promised nothing",
        ELECTIONS,
        ("        self._heard_ns = clock()\n", "        self._heard_ns = clock() - int(60e9)\n"),
        by="test_guard.py test_a_restarted_server_counts_as_having_heard_the_leader",
    ),
    _mutant(
        "LEASE.5",
        "rounds of a leadership before count for the lease",
        REPLICATION,
        ("follower.echoed = follower.reset_floor = NEVER", "follower.reset_floor = NEVER"),
        by="test_guard.py test_what_was_answered_in_a_leadership_before_is_no_lease",
    ),
    _mutant(
        "LEASE.6",
        "the number of another leader's clock counts for the lease",
        SNAPSHOTTING,
        ('"r": message["r"] if message["term"] == self._core.term() else 0,', '"r": message["r"],'),
        by="test_snapshotting.py test_what_another_leaders_clock_said_is_not_told_to_the_next_one",
    ),
    _mutant(
        "LEASE.7",
        "an offer of leadership has passed although the heir may not have read it yet",
        LOG,
        (" or (follower is not None and follower.echoed > round_):", " or follower is not None:"),
        by="test_promises.py test_from_the_offer_of_leadership_on_the_lease_is_void_until_the_heir_lets_it_pass",
    ),
    _mutant(
        "LEASE.9",
        "only the last offer of leadership is remembered",
        LOG,
        (
            "                    self._offers[heir] = ",
            "                    self._offers.clear()\n                    self._offers[heir] = ",
        ),
        by="test_promises.py test_an_offer_that_was_made_before_the_last_one_voids_the_lease_too",
    ),
    _mutant(
        "LEASE.8",
        "who is offered leadership may take it later as well",
        ELECTIONS,
        ("            core.doTick(0)\n            self._transfer_term = -1\n", ""),
        by="test_guard.py test_an_offer_of_leadership_is_taken_at_once_or_never",
    ),
    _mutant(
        "READINDEX.1",
        "a read is answered without a round",
        LOG,
        (
            "while self._rounds and self._rounds[0][0] <= answered and self._rounds[0][1] <= applied:",
            "while self._rounds:",
        ),
        by="test_log.py test_a_read_is_answered_by_a_round_that_began_after_it",
    ),
    _mutant(
        "READINDEX.2",
        "a read joins a round that was sent before it arrived",
        LOG,
        (
            "        self._reads.append(waiter)\n",
            "        (self._rounds[-1][2] if self._rounds else self._reads).append(waiter)\n",
        ),
        by="test_promises.py test_a_read_never_joins_a_round_that_is_on_its_way",
    ),
    _mutant(
        "READINDEX.3",
        "a read is answered before what it must see is applied",
        LOG,
        (" and self._rounds[0][1] <= applied:", ":"),
        by="test_log.py test_a_new_leader_reads_nothing_before_its_first_entry_is_committed",
    ),
    _mutant(
        "READINDEX.4",
        "barriers of a server share a round that began before them",
        "wire/rounds.py",
        ("            future, self._next = self._next, None\n", "            future = self._next\n"),
        by="tests/unit/wire/test_rounds.py test_a_request_never_joins_a_round_that_has_begun",
    ),
    _mutant(
        "READINDEX.5",
        "two rounds of one moment are the same",
        REPLICATION,
        ("self.round = max(self._clock(), self.round + 1)", "self.round = self._clock()"),
        by="test_guard.py test_rounds_grow_although_the_clock_stands_still",
    ),
    _mutant(
        "NOOP.1",
        "a new leader reads before the no-op of its term is committed",
        LOG,
        ("index = max(self._core.commit_index(), self._core.noop_index() or 0)", "index = self._core.commit_index()"),
        by="test_log.py test_a_new_leader_reads_nothing_before_its_first_entry_is_committed",
        seeds=SEEDS,
    ),
    _mutant(
        "NOOP.2",
        "a new leader has a lease before the no-op of its term is committed",
        LOG,
        ("return noop is not None and self._core.applied_index() >= noop", "return True"),
        by="""test_log.py test_a_new_leader_reads_nothing_before_its_first_entry_is_committed
        test_promises.py test_a_new_leader_changes_no_members_before_its_first_entry_is_committed""",
        seeds=SEEDS,
    ),
    _mutant(
        "MEMBERS.1",
        "two changes of the members at once",
        LOG,
        (
            "        if not self.members_settled:\n            raise Conflict(",
            "        if False:\n            raise Conflict(",
        ),
        by="tests/cluster/test_raft_cluster.py test_members_change_one_at_a_time_and_never_the_leader_itself",
    ),
    _mutant(
        "MEMBERS.2",
        "one change of the members touches several voters",
        MEMBERS,
        ("    if len(voters(old) ^ voters(new)) > 1:", "    if False:"),
        by="""test_membership.py test_two_voters_never_change_at_once
        test_membership.py test_any_two_majorities_before_and_after_an_allowed_change_share_a_server""",
    ),
    _mutant(
        "MEMBERS.3",
        "members change before an entry of the leader's term is committed",
        LOG,
        (
            "if not self._is_established() or self._journal.durable_index < (self._core.noop_index() or 0):",
            "if False:",
        ),
        by="test_promises.py test_a_new_leader_changes_no_members_before_its_first_entry_is_committed",
    ),
    _mutant(
        "MEMBERS.4",
        "the leader removes itself",
        LOG,
        ("        if self._node_id not in voters(new):\n", "        if False:\n"),
        by="tests/cluster/test_raft_cluster.py test_members_change_one_at_a_time_and_never_the_leader_itself",
    ),
    _mutant(
        "MEMBERS.5",
        "the last voter can be removed",
        MEMBERS,
        ("    if not voters(new):", "    if False:"),
        by="test_membership.py test_the_last_voter_stays",
    ),
    _mutant(
        "TRANSFER.1",
        "leadership is offered to who lacks entries",
        LOG,
        (
            "                if is_level and self._loop.time() >= offer_at:",
            "                if self._loop.time() >= offer_at:",
        ),
        by="test_promises.py test_leadership_is_offered_only_to_who_has_everything_and_nothing_new_is_begun",
    ),
    _mutant(
        "TRANSFER.2",
        "new entries are begun while leadership is handed over",
        LOG,
        ("\n            and not self._handing_over\n", "\n"),
        by="test_promises.py test_leadership_is_offered_only_to_who_has_everything_and_nothing_new_is_begun",
    ),
    _mutant(
        "TRANSFER.3",
        "anyone may tell a server to stand for election",
        ELECTIONS,
        (" and core.leader_id() == peer_id and self._votes_itself:", " and self._votes_itself:"),
        by="test_promises.py test_who_is_offered_leadership_stands_at_once_and_its_voters_are_told_why",
    ),
    _mutant(
        "SNAP.1",
        "a piece of a snapshot that does not follow is taken",
        SNAPSHOTTING,
        ('elif message["data"] and message["offset"] == incoming.offset:', 'elif message["data"]:'),
        ('incoming.write(message["offset"], ', "incoming.write(incoming.offset, "),
        by="test_snapshotting.py test_h22_a_piece_that_does_not_follow_is_not_taken",
    ),
    _mutant(
        "SNAP.2",
        "a piece of a snapshot of an earlier leader is taken",
        GUARD,
        ('elif message["term"] == self._core.term() and self._core.leader_id() == peer_id:', "elif True:"),
        by="test_guard.py test_a_piece_of_a_snapshot_counts_from_the_leader_of_this_term_only",
    ),
    _mutant(
        "SNAP.3",
        "a received snapshot is not verified",
        SNAPSHOTS,
        (
            "if (snapshot.id, snapshot.index, snapshot.term) != (self.id, self.index, self.term):",
            "if False:",
        ),
        (
            '            raise DamagedSnapshot(f"{path} is damaged at byte {at}: the checksum is wrong")',
            "            pass",
        ),
        ("            if end != [count, size, crc]:", "            if False:"),
        by="test_snapshotting.py test_a_snapshot_that_was_damaged_on_its_way_is_asked_for_again",
    ),
    _mutant(
        "SNAP.4",
        "a snapshot gets its name before it is on the disk",
        SNAPSHOTS,
        ("        file.sync()\n        name", "        name"),
        by="test_snapshots.py test_wherever_the_power_goes_the_old_one_or_the_new_one_is_there_and_whole",
        seeds=SEEDS,
    ),
    _mutant(
        "SNAP.5",
        "a received snapshot gets its name before it is on the disk",
        SNAPSHOTS,
        ("                file.sync()\n                self._disk.rename(", "                self._disk.rename("),
        by="test_snapshots.py test_wherever_the_power_goes_a_snapshot_can_be_received_after_it",
    ),
    _mutant(
        "SNAP.6",
        "a snapshot is taken in the middle of an entry",
        SNAPSHOTTING,
        ("while not self._is_idle() or self._installing:", "while self._installing:"),
        by="test_snapshotting.py test_a_snapshot_is_never_taken_in_the_middle_of_an_entry",
    ),
    _mutant(
        "SNAP.7",
        "a snapshot that the log has overtaken takes the state back",
        SNAPSHOTTING,
        (
            "                if snapshot.index > core.commit_index():\n                    if journal",
            "                if True:\n                    if journal",
        ),
        by="test_snapshotting.py test_a_snapshot_that_the_log_has_overtaken_meanwhile_takes_nothing_back",
    ),
    _mutant(
        "CRC.1",
        "checksums of the journal are not looked at",
        JOURNAL,
        ("return body if zlib.crc32(body, salt ^ (at & 0xFFFFFFFF)) == crc else None", "return body"),
        by="""test_journal.py test_a_flipped_bit_in_the_middle_is_refused_and_nothing_is_touched
        test_journal.py test_wherever_the_power_goes_all_that_was_synced_is_there_and_nothing_that_never_was""",
        seeds=SEEDS,
    ),
    _mutant(
        "CRC.2",
        "the checksum of a journal's header is not looked at",
        JOURNAL,
        ("if zlib.crc32(head) != _U32.unpack_from(data, HEADER_BYTES - _U32.size)[0]:", "if False:"),
        by="test_journal.py test_a_flipped_bit_in_the_beginning_is_refused_since_it_was_made_whole",
    ),
    _mutant(
        "CRC.3",
        "checksums of a snapshot are not looked at",
        SNAPSHOTS,
        (" or zlib.crc32(body, at & 0xFFFFFFFF) != crc:", ":"),
        ("            if end != [count, size, crc]:", "            if False:"),
        by="""test_snapshotting.py test_h9_a_log_whose_snapshot_is_damaged_is_not_started_from_an_empty_state
        test_snapshotting.py test_a_snapshot_that_was_damaged_on_its_way_is_asked_for_again""",
    ),
    _mutant(
        "BOOTSTRAP.1",
        "a cluster is founded before all its members hold it",
        "server/founding.py",
        ("        if not lacking:\n", "        if True:\n"),
        by="""tests/unit/server/test_bootstrap.py test_crashes_at_any_step_and_lost_messages_still_end_in_one_cluster
        tests/unit/server/test_bootstrap.py test_islands_never_found_clusters_with_a_common_member""",
    ),
    _mutant(
        "BOOTSTRAP.2",
        "a founding that was refused may be held later",
        "server/founding.py",
        ("        if cluster_id in stored.refused:\n", "        if False:\n"),
        by="tests/unit/server/test_bootstrap.py test_a_prepared_proposal_is_never_refused_and_a_refused_one_never_prepared",
    ),
    _mutant(
        "BOOTSTRAP.3",
        "a founding that is held may be refused",
        "server/founding.py",
        (
            "        if self._is_mine(cluster_id):\n            return self.stored, f",
            "        if False:\n            return self.stored, f",
        ),
        by="tests/unit/server/test_bootstrap.py test_a_prepared_proposal_is_never_refused_and_a_refused_one_never_prepared",
    ),
    _mutant(
        "BOOTSTRAP.4",
        "a cluster is founded beside one that is seen",
        "server/founding.py",
        ("            self.existing = peer\n", "            pass\n"),
        by="tests/unit/server/test_bootstrap.py test_with_an_existing_cluster_in_sight_no_other_is_founded",
    ),
    _mutant(
        "BOOTSTRAP.5",
        "a promise about a founding is given before it is on the disk",
        "server/bootstrap.py",
        ("        try:\n            self._keep(stored)\n", "        try:\n            self._founder.stored = stored\n"),
        by="tests/unit/server/test_bootstrap.py test_the_file_is_synced_before_the_answer",
    ),
    _mutant(
        "BOOTSTRAP.6",
        "a server whose log is gone votes with its old identity",
        "server/bootstrap.py",
        (
            "if stored.committed is not None and stored.started and not (has_data if has_log is None else has_log):",
            "if False:",
        ),
        by="tests/unit/server/test_bootstrap.py test_a_server_whose_log_is_gone_refuses_to_start_once_it_had_one",
    ),
    _mutant(
        "LIVED.1",
        "a data directory is started without what its notes name",
        "server/lived.py",
        ("    _check_parts(directory, first, stored, has_log)\n", ""),
        by="tests/unit/server/test_lived.py test_each_part_that_the_notes_name_must_be_there",
    ),
    _mutant(
        "LIVED.2",
        "a journal that ends before what is noted is believed",
        JOURNAL,
        ("        if found.place < reached:\n", "        if False:\n"),
        by="test_witness.py test_a_servers_own_notes_of_its_journal_are_believed",
        seeds=SEEDS,
    ),
    _mutant(
        "LIVED.3",
        "a note beside the key that is lost or old is made good by the other",
        "server/lived.py",
        ("    if first is None or (second is not None and first.starts < second.starts):\n", "    if False:\n"),
        by="""tests/unit/server/test_lived.py test_an_older_note_beside_the_key_shows_nothing_any_more
        tests/unit/server/test_lived.py test_a_lost_note_beside_the_log_is_no_loss_and_one_beside_the_key_is""",
    ),
    _mutant(
        "LIVED.4",
        "a server runs with another server's key",
        "server/lived.py",
        ("    if found != key_hash:\n", "    if False:\n"),
        by="tests/unit/server/test_lived.py test_the_key_is_the_one_that_the_others_know",
    ),
    _mutant(
        "LIVED.5",
        "who is listed as a voter begins with an empty log",
        "server/founding.py",
        (
            "        if mine.suffrage == VOTER:\n            self.counted_on",
            "        if False:\n            self.counted_on",
        ),
        by="tests/unit/server/test_bootstrap.py test_a_server_without_a_log_that_the_others_list_as_a_voter_waits_to_be_replaced",
    ),
    _mutant(
        "LIVED.6",
        "a server that does not know a process of its own, which was seen, is heard",
        "server/raft/witness.py",
        ("        if seen_process not in lineage and seen_starts > starts - len(lineage):\n", "        if False:\n"),
        by="""test_witness.py test_a_server_knows_its_former_processes_however_often_it_was_started_since
        test_witness.py test_the_vote_of_who_has_lost_its_log_counts_for_nothing""",
    ),
    _mutant(
        "LIVED.7",
        "a server whose log ends before what it has acknowledged is heard",
        "server/raft/witness.py",
        ('        if said["last_index"] < acknowledged:\n', "        if False:\n"),
        by="""test_witness.py test_a_log_never_ends_before_what_it_has_acknowledged
        test_witness.py test_a_follower_that_comes_back_with_less_than_it_acknowledged_is_told_so""",
    ),
    _mutant(
        "LIVED.8",
        "what a server says counts although it has lost its log",
        LOG,
        ("            self._outlived.add(peer_id)\n", ""),
        by="test_witness.py test_the_vote_of_who_has_lost_its_log_counts_for_nothing",
    ),
    _mutant(
        "LIVED.9",
        "a running server does not note how far its journal is",
        LOG,
        ("            self._on_reached(self._reached)\n", ""),
        by="test_witness.py test_how_far_the_journal_is_is_noted_while_the_server_runs",
    ),
    _mutant(
        "LINK.1",
        "two connections of a pair are alive at once",
        TRANSPORT,
        ("        if old is not None:\n", "        if False:\n"),
        by="test_log.py test_a_new_connection_replaces_the_old_one",
    ),
    _mutant(
        "PAUSE.1",
        "a leader that stood still judges its followers before it has read what they said",
        LOG,
        (
            "self._stood_still = since_s >= self._timing.election_min_s / 2 and not self._stood_still",
            "self._stood_still = False",
        ),
        by="test_promises.py test_a_leader_that_stood_still_reads_before_it_judges_who_is_silent",
    ),
    _mutant(
        "PAUSE.2",
        "a server each of whose turns is long never does its work",
        LOG,
        (" and not self._stood_still", ""),
        by="test_log.py test_a_server_each_of_whose_turns_is_long_works_all_the_same",
    ),
    _mutant(
        "HANG.1",
        "a leader whose disk hangs leads on, and nobody can write",
        LOG,
        ("            self._core.step_down()\n", "            pass\n"),
        by="test_log.py test_a_leader_whose_disk_hangs_lets_another_one_lead",
    ),
    _mutant(
        "HANG.2",
        "a server whose disk hangs stands for election",
        ELECTIONS,
        (" or self.disk_hangs:", ":"),
        by="""test_log.py test_a_leader_whose_disk_hangs_lets_another_one_lead
        test_log.py test_a_follower_whose_disk_hangs_says_so_once_and_names_no_leader_that_is_gone""",
    ),
    _mutant(
        "HANG.3",
        "a disk at its first write counts as one that hangs",
        LOG,
        (
            "        self._pumped_s = self._disk_moved_s = self._loop.time()\n",
            "        self._pumped_s = self._loop.time()\n",
        ),
        by="test_log.py test_a_disk_that_is_at_its_first_write_does_not_hang",
    ),
    _mutant(
        "HANG.4",
        "a pause of the process counts as one of its disk",
        LOG,
        ("            self._disk_moved_s += since_s", "            pass"),
        by="test_log.py test_a_pause_of_the_process_is_no_pause_of_its_disk",
    ),
    _mutant(
        "ROOM.1",
        "the log of a follower that applies slowly grows without end",
        GUARD,
        ("new[0][0][:1] == BATCH and not self._has_room()", "False"),
        by="test_snapshotting.py test_a_followers_log_is_bounded_too_and_goes_on_when_there_is_room",
    ),
    _mutant(
        "ROOM.2",
        "the leader's log grows without end while no snapshot can be written",
        LOG,
        ("            and self._snapshots.has_room\n", ""),
        by="test_snapshotting.py test_at_its_bound_the_log_takes_nothing_more_until_a_snapshot_has_made_room",
    ),
    _mutant(
        "ROOM.3",
        "a log that is full when the server starts stays full",
        SNAPSHOTTING,
        ("            self._start(self._trim())  # the process", "            pass  # the process"),
        by="test_snapshotting.py test_a_process_that_ended_between_a_snapshot_and_the_shortening_of_the_log_shortens_it_when_it_starts",
    ),
    _mutant(
        "ROOM.4",
        "a follower whose log is full has all that it lacks sent again and again",
        GUARD,
        (" and self._asked_full % FULL_ASKS_EVERY:", " and False:"),
        by="test_snapshotting.py test_a_followers_log_is_bounded_too_and_goes_on_when_there_is_room",
    ),
    _mutant(
        "ROOM.5",
        "a log that goes on behind a received snapshot stays as long as it was",
        SNAPSHOTTING,
        ("remove_older(disk, keep))\n            await self._trim()\n", "remove_older(disk, keep))\n"),
        by="test_snapshotting.py test_a_log_that_fits_the_snapshot_is_shortened_like_any_other",
    ),
    _mutant(
        "LIBRARY.1",
        "any version of pysyncobj will do",
        CORE,
        ("    if found != LIBRARY_SHA256:\n", "    if False:\n"),
        by="test_log.py test_another_version_of_the_library_is_refused",
    ),
    _mutant(
        "DEDUP.1",
        "an entry that comes twice is applied twice",
        "server/state/store.py",
        ("if client is not None and (earlier := client.results.get(sequence)) is not None:", "if earlier := None:"),
        by="tests/unit/server/state/test_store.py test_an_entry_that_comes_twice_is_applied_once_and_gives_the_same_result",
        seeds=SEEDS,
    ),
    _mutant(
        "DEDUP.2",
        "what clients were told is not part of a snapshot",
        "server/state/store.py",
        ("self.tables, self.clients = loaded.tables, loaded.clients", "self.tables = loaded.tables"),
        by="tests/unit/server/state/test_store.py test_a_restored_server_repeats_results_as_well",
        seeds=SEEDS,
    ),
    _mutant(
        "DEDUP.3",
        "a write may be repeated after its result was acknowledged",
        "server/state/clients.py",
        ("        if sequence < known:\n", "        if False:\n"),
        by="tests/unit/server/state/test_store.py test_results_are_forgotten_once_the_client_has_them",
        seeds=SEEDS,
    ),
)
