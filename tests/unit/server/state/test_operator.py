from __future__ import annotations

import pytest

from rostra.server.state.operator import Autopilot, SetAutopilot
from rostra.server.state.rows import AutopilotRow
from rostra.wire.errors import BadRequest


def configuration(log):
    return log.ask(Autopilot())[""]


def test_before_it_is_set_autopilot_has_the_defaults(log):
    assert configuration(log) == AutopilotRow(True, 200, 250, 0, 10_000, False, 0, 0)


def test_what_is_set_is_read_back_also_after_a_snapshot(log, reloaded):
    assert log.do(SetAutopilot(min_quorum=3, auto_admit_servers=True)) is True
    row = configuration(log)
    assert (row.min_quorum, row.auto_admit_servers, row.max_trailing_logs) == (3, True, 250)
    assert row.create_index == row.modify_index == log.store.index
    again = reloaded(log.store)
    assert again.hash() == log.store.hash()
    assert again.tables.autopilot.get("") == row


def test_cas_sets_only_what_nobody_changed_meanwhile(log):
    assert log.do(SetAutopilot(min_quorum=3, cas=0)) is True
    index = configuration(log).modify_index
    assert log.do(SetAutopilot(min_quorum=5, cas=0)) is False
    assert log.do(SetAutopilot(min_quorum=5, cas=index)) is True
    row = configuration(log)
    assert (row.min_quorum, row.create_index) == (5, index)
    assert row.modify_index > index


def test_setting_the_same_again_moves_no_index_and_wakes_nobody(log):
    log.do(SetAutopilot(min_quorum=3))
    index = log.index_of(Autopilot())
    log.do(SetAutopilot(min_quorum=3))
    assert log.index_of(Autopilot()) == index
    assert log.last.touched == ()


@pytest.mark.parametrize("bad", [{"min_quorum": -1}, {"last_contact_threshold_ms": 1 << 40}, {"max_trailing_logs": -5}])
def test_numbers_that_cannot_be_meant_are_refused(log, bad):
    with pytest.raises(BadRequest, match=next(iter(bad))):
        log.do(SetAutopilot(**bad))
