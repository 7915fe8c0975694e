from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.acl.identity import AgentIdentity, AuthorityIdentity, BadIdentity, ServiceIdentity, parse

TD = "a9c06fb0-7eae-8e72-3ab7-6880e87f4cb1.consul"


@pytest.mark.parametrize(
    ("uri", "identity"),
    [
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/web", ServiceIdentity(TD, "dc1", "web")),
        (f"spiffe://{TD}/ns/other/dc/dc1/svc/web.v2_x-1", ServiceIdentity(TD, "dc1", "web.v2_x-1", "other")),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/a%20b", ServiceIdentity(TD, "dc1", "a b")),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/%C3%A4", ServiceIdentity(TD, "dc1", "ä")),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/50%25", ServiceIdentity(TD, "dc1", "50%")),
        (f"spiffe://{TD}/agent/client/dc/dc1/id/node-1", AgentIdentity(TD, "dc1", "node-1")),
        (f"spiffe://{TD}", AuthorityIdentity(TD)),
    ],
)
def test_an_identity_is_parsed_and_formatted(uri, identity):
    assert parse(uri) == identity
    assert identity.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://",
        "spiffe:///ns/default/dc/dc1/svc/web",
        f"https://{TD}/ns/default/dc/dc1/svc/web",
        f"SPIFFE://{TD}/ns/default/dc/dc1/svc/web",
        f"spiffe://{TD.upper()}/ns/default/dc/dc1/svc/web",
        f"spiffe://user@{TD}/ns/default/dc/dc1/svc/web",
        f"spiffe://{TD}:443/ns/default/dc/dc1/svc/web",
        f"spiffe://{TD}/",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/",
        f"spiffe://{TD}/ns/default/dc/dc1/svc",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web/",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web/x",
        f"spiffe://{TD}//ns/default/dc/dc1/svc/web",
        f"spiffe://{TD}/ns//dc/dc1/svc/web",
        f"spiffe://{TD}/ns/default/dc/../svc/web",
        f"spiffe://{TD}/ns/default/dc/./svc/web",
        f"spiffe://{TD}/ns/default/dc/%2E%2E/svc/web",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web?x=1",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web#x",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web%2Fadmin",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web%2fadmin",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/%77eb",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/a%c3%a4",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/%FF",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/%",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/%zz",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web%00",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web%0A",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/we b",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/wäb",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/web\n",
        f"spiffe://{TD}\\/ns/default/dc/dc1/svc/web",
        f"spiffe://{TD}/NS/default/dc/dc1/svc/web",
        f"spiffe://{TD}/agent/server/dc/dc1/id/n",
        f"spiffe://{TD}/ns/default/dc/dc1/svc/" + "a" * 254,
        f"spiffe://{TD}/ns/default/dc/dc1/svc/" + "a" * 4096,
        "spiffe://-td/ns/default/dc/dc1/svc/web",
        "spiffe://td./ns/default/dc/dc1/svc/web",
        "spiffe://" + "a" * 256,
    ],
)
def test_a_uri_that_could_be_read_in_two_ways_is_no_identity(uri):
    with pytest.raises(BadIdentity):
        parse(uri)


@pytest.mark.parametrize("service", ["", ".", "..", "a/b", "a\nb", "a\0", "a" * 254, "\U0001f600" * 250, "\ud800"])
def test_a_name_that_cannot_be_written_is_not_formatted(service):
    with pytest.raises(BadIdentity):
        _ = ServiceIdentity(TD, "dc1", service).uri


@given(st.text(max_size=260))
def test_what_is_formatted_is_parsed_to_the_same(service):
    identity = ServiceIdentity(TD, "dc1", service)
    try:
        uri = identity.uri
    except BadIdentity:
        return
    assert parse(uri) == identity


@given(st.text(alphabet="spiffe:/ndcv%2F?#@.a", max_size=60).map(lambda tail: f"spiffe://{TD}/ns/d/dc/d/svc/{tail}"))
def test_whatever_is_parsed_is_spelt_in_that_one_way(uri):
    try:
        identity = parse(uri)
    except BadIdentity:
        return
    assert identity.uri == uri
