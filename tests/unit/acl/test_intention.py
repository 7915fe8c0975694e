from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.acl.intention import decide, precedence


class Rule(NamedTuple):
    source: str
    destination: str
    action: str


@pytest.mark.parametrize(
    ("source", "destination", "expected"), [("web", "db", 9), ("*", "db", 8), ("web", "*", 6), ("*", "*", 5)]
)
def test_the_more_exact_intention_ranks_higher(source, destination, expected):
    assert precedence(source, destination) == expected


LADDER = [Rule("web", "db", "allow"), Rule("*", "db", "deny"), Rule("web", "*", "allow"), Rule("*", "*", "deny")]


@pytest.mark.parametrize("top", range(4))
def test_the_highest_match_decides_in_whatever_order_they_come(top):
    for rules in permutations(LADDER[top:]):
        decision = decide("web", "db", rules, default_allow=False)
        assert decision.winner == LADDER[top]
        assert decision.allowed is (LADDER[top].action == "allow")


@pytest.mark.parametrize("default", [True, False])
def test_without_a_match_the_default_decides(default):
    decision = decide("web", "db", [Rule("api", "db", "allow"), Rule("web", "cache", "deny")], default)
    assert (decision.allowed, decision.winner) == (default, None)
    assert "by default: no intention matches web → db" in decision.reason


def test_a_deny_wins_a_tie():
    for rules in permutations([Rule("web", "db", "allow"), Rule("web", "db", "deny")]):
        assert decide("web", "db", rules, default_allow=True).allowed is False


def test_an_action_that_is_not_known_denies():
    assert decide("web", "db", [Rule("web", "db", "perhaps")], default_allow=True).allowed is False


def test_the_reason_names_the_winner():
    decision = decide("web", "db", [Rule("*", "db", "deny")], default_allow=True)
    assert decision.reason == "denied by intention * → db (deny, precedence 8)"


names = st.sampled_from(["web", "db", "*"])


@given(st.lists(st.builds(Rule, names, names, st.sampled_from(["allow", "deny"]))), names, names, st.booleans())
def test_the_decision_is_that_of_a_sorted_list(rules, source, destination, default):
    matching = [r for r in rules if r.source in (source, "*") and r.destination in (destination, "*")]
    matching.sort(key=lambda r: (-precedence(r.source, r.destination), r.action == "allow"))
    expected = matching[0].action == "allow" if matching else default
    assert decide(source, destination, rules, default).allowed is expected
