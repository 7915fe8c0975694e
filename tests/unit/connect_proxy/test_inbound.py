"""Who is let in: the intentions of a snapshot, in every order of precedence."""

from __future__ import annotations

import pytest

from rostra.connect_proxy.inbound import Inbound, decide
from rostra.connect_proxy.session import Refusal
from rostra.connect_proxy.snapshot import Leaf, ProxySnapshot, Rule

EXACT_ALLOW, EXACT_DENY = Rule("api", "allow", 9, "ea"), Rule("api", "deny", 9, "ed")
ANY_ALLOW, ANY_DENY = Rule("*", "allow", 8, "aa"), Rule("*", "deny", 8, "ad")
FAR_ALLOW, FAR_DENY = Rule("api", "allow", 6, "fa"), Rule("*", "deny", 5, "fd")


def snapshot(*rules: Rule, default_allow: bool = False) -> ProxySnapshot:
    return ProxySnapshot(
        "p", "web", "a.consul", "dc1", Leaf("c", "k"), ("r",), default_allow=default_allow, intentions=rules
    )


@pytest.mark.parametrize(
    ("rules", "source", "allowed", "by"),
    [
        ((EXACT_ALLOW, ANY_DENY), "api", True, "ea"),
        ((EXACT_ALLOW, ANY_DENY), "other", False, "ad"),
        ((EXACT_DENY, ANY_ALLOW), "api", False, "ed"),
        ((ANY_ALLOW, FAR_DENY), "other", True, "aa"),
        ((ANY_DENY, FAR_ALLOW), "api", False, "ad"),
        ((FAR_ALLOW, FAR_DENY), "api", True, "fa"),
        ((FAR_ALLOW, FAR_DENY), "other", False, "fd"),
        ((), "api", False, None),
    ],
)
def test_the_most_exact_intention_decides(rules, source, allowed, by):
    decision = decide(snapshot(*rules), source)
    assert decision.allowed is allowed
    assert (decision.rule.id if decision.rule else None) == by


def test_the_default_decides_when_nothing_fits():
    assert decide(snapshot(EXACT_DENY, default_allow=True), "other").allowed is True
    assert decide(snapshot(default_allow=False), "other").fields() == {"intention": "none", "default": "deny"}


def test_a_refusal_tells_what_it_overruled():
    fields = decide(snapshot(EXACT_DENY, ANY_ALLOW), "api").fields()
    assert fields == {"intention": "ed", "rule": "api=>web:deny", "precedence": 9, "overruled": "*=>web:allow(8)"}


def test_the_destination_that_an_agent_names_counts_whatever_the_precedence():
    far = Rule("*", "deny", 8, "fd", "*")
    exact = Rule("api", "allow", 5, "ea", "web")
    decision = decide(snapshot(far, exact), "api")
    assert (decision.allowed, decision.rule) == (True, exact)
    assert decide(snapshot(far, exact), "other").fields()["rule"] == "*=>*:deny"


def test_a_rule_for_all_destinations_is_shown_as_one():
    assert decide(snapshot(FAR_DENY), "api").fields()["rule"] == "*=>*:deny"


@pytest.mark.parametrize(
    ("uri", "refusal"),
    [
        ("spiffe://a.consul/ns/default/dc/dc1/svc/api", None),
        ("spiffe://b.consul/ns/default/dc/dc1/svc/api", "wrong_trust_domain"),
        ("spiffe://a.consul/agent/client/dc/dc1/id/n1", "not_a_service"),
        ("spiffe://a.consul/ns/default/dc/dc1/svc/api/", "not_a_service"),
        ("spiffe://a.consul/ns/default/dc/dc1/svc/", "not_a_service"),
        ("spiffe://a.consul/ns/default/dc/dc1/svc/ap%69", "not_a_service"),
        ("spiffe://u@a.consul/ns/default/dc/dc1/svc/api", "not_a_service"),
        ("https://a.consul/ns/default/dc/dc1/svc/api", "not_a_service"),
        ("", "not_a_service"),
    ],
)
def test_only_services_of_the_own_trust_domain_are_known(uri, refusal):
    found = Inbound(snapshot()).source(uri)
    assert (found.reason if isinstance(found, Refusal) else None) == refusal
