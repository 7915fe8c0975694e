"""Statuses, texts and bodies as a Consul 1.8.7 gave them (exact intentions: as documented since 1.9)."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from rostra.server.state.ca import SetCaConfig, SetRoot
from tests.support.store_servers import CLUSTER
from tests.unit.agent.http.test_catalog import strip

PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
ROOT = {
    "id": "1f:6e",
    "name": "Mesh CA Root Cert",
    "serial": 7,
    "signing_key_id": "ec:67",
    "trust_domain": f"{CLUSTER}.consul",
    "not_before_ms": 1_700_000_000_000,
    "not_after_ms": 2_000_000_000_000,
    "cert_pem": PEM,
}


async def test_roots_before_the_ca_exists_are_an_empty_list(api):
    assert (await api.get("/v1/connect/ca/roots")).json == {"ActiveRootID": "", "TrustDomain": "", "Roots": []}


async def test_roots_name_the_active_one_and_the_trust_domain(api):
    api.servers.apply(SetRoot(ROOT, "key"))
    assert strip((await api.get("/v1/connect/ca/roots")).json) == {
        "ActiveRootID": "1f:6e",
        "TrustDomain": f"{CLUSTER}.consul",
        "Roots": [
            {
                "ID": "1f:6e",
                "Name": "Mesh CA Root Cert",
                "SerialNumber": 7,
                "SigningKeyID": "ec:67",
                "ExternalTrustDomain": CLUSTER,
                "NotBefore": "2023-11-14T22:13:20Z",
                "NotAfter": "2033-05-18T03:33:20Z",
                "RootCert": PEM,
                "IntermediateCerts": None,
                "Active": True,
                "PrivateKeyType": "ec",
                "PrivateKeyBits": 256,
            }
        ],
    }
    pem = await api.get("/v1/connect/ca/roots?pem=true")
    assert (pem.text, pem.headers["Content-Type"]) == (PEM, "application/pem-certificate-chain")


async def test_the_agent_s_roots_are_cached_and_follow_changes(api):
    api.servers.apply(SetRoot(ROOT, "key"))
    first = await api.get("/v1/agent/connect/ca/roots")
    assert first.headers["X-Cache"] == "MISS"
    again = await api.get(f"/v1/agent/connect/ca/roots?index={first.index - 1}")
    assert (again.headers["X-Cache"], again.headers["Age"]) == ("HIT", "0")
    api.servers.apply(SetRoot({**ROOT, "id": "2a:2b"}, "key2"))
    changed = await api.get(f"/v1/agent/connect/ca/roots?index={first.index}&wait=5s")
    assert changed.json["ActiveRootID"] == "2a:2b"


async def test_the_configuration_has_defaults_and_shows_what_was_set(api):
    assert strip((await api.get("/v1/connect/ca/configuration")).json) == {
        "Provider": "consul",
        "Config": {"IntermediateCertTTL": "8760h", "LeafCertTTL": "72h", "RotationPeriod": "2160h"},
        "State": None,
        "ForceWithoutCrossSigning": False,
    }
    api.servers.apply(SetCaConfig({"LeafCertTTL": "1h"}))
    assert (await api.get("/v1/connect/ca/configuration")).json["Config"]["LeafCertTTL"] == "1h"


async def create(api, source, destination, action="allow", **more):
    body = {"SourceName": source, "DestinationName": destination, "Action": action, **more}
    reply = await api.call("POST", "/v1/connect/intentions", body)
    assert reply.status == 200, reply.text
    return reply.json["ID"]


async def test_an_intention_is_created_shown_changed_and_deleted_by_its_id(api):
    intention = await create(api, "web", "db", Meta={"a": "b"}, Description="d")
    shown = (await api.get(f"/v1/connect/intentions/{intention}")).json
    assert shown.pop("Hash")
    assert shown.pop("CreatedAt") == shown.pop("UpdatedAt") == "2023-11-14T22:13:20Z"
    assert strip(shown) == {
        "ID": intention,
        "Description": "d",
        "SourceNS": "default",
        "SourceName": "web",
        "DestinationNS": "default",
        "DestinationName": "db",
        "SourceType": "consul",
        "Action": "allow",
        "DefaultAddr": "",
        "DefaultPort": 0,
        "Meta": {"a": "b"},
        "Precedence": 9,
    }
    changed = await api.put(
        f"/v1/connect/intentions/{intention}", {"SourceName": "web", "DestinationName": "db", "Action": "deny"}
    )
    assert changed.json == {"ID": intention}
    assert (await api.get("/v1/connect/intentions")).json[0]["Action"] == "deny"
    assert (await api.delete(f"/v1/connect/intentions/{intention}")).text == "true"
    assert (await api.get("/v1/connect/intentions")).json == []


async def test_changing_the_names_of_an_intention_keeps_its_id(api):
    intention = await create(api, "web", "db")
    await api.put(
        f"/v1/connect/intentions/{intention}", {"SourceName": "web", "DestinationName": "cache", "Action": "allow"}
    )
    assert [
        (i["ID"], i["SourceName"], i["DestinationName"]) for i in (await api.get("/v1/connect/intentions")).json
    ] == [(intention, "web", "cache")]


async def test_intentions_are_written_and_read_by_their_names(api):
    exact = "/v1/connect/intentions/exact?source=web&destination=db"
    assert (await api.get(exact)).status == 404
    assert (await api.put(exact, {"Action": "allow"})).text == "true"
    assert (await api.get(exact)).json["SourceName"] == "web"
    assert (await api.put(exact, {"Action": "deny"})).text == "true"
    assert (await api.get(exact)).json["Action"] == "deny"
    assert (await api.delete(exact)).text == "true"
    gone = await api.get(exact)
    assert (gone.status, gone.text) == (404, "Intention not found")


async def test_match_lists_the_strongest_first_and_null_for_names_without_any(api):
    await create(api, "*", "*", "deny")
    await create(api, "*", "db")
    await create(api, "web", "db")
    by_destination = (await api.get("/v1/connect/intentions/match?by=destination&name=db")).json
    assert [i["Precedence"] for i in by_destination["db"]] == [9, 8, 5]
    by_source = (await api.get("/v1/connect/intentions/match?by=source&name=web&name=zz")).json
    assert [i["Precedence"] for i in by_source["web"]] == [9, 8, 5]
    assert [i["Precedence"] for i in by_source["zz"]] == [8, 5]
    await api.delete("/v1/connect/intentions/exact?source=*&destination=*")
    assert (await api.get("/v1/connect/intentions/match?by=destination&name=q&name=db")).json["q"] is None


async def test_check_answers_with_the_winner_or_the_default(api):
    await create(api, "*", "db", "deny")
    await create(api, "web", "db")
    for source, destination, allowed in [("web", "db", True), ("q", "db", False), ("q", "zz", True)]:
        reply = await api.get(f"/v1/connect/intentions/check?source={source}&destination={destination}")
        assert reply.json == {"Allowed": allowed}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("GET", "match", None, 500, "required query parameter 'by' not set"),
        ("GET", "match?by=source", None, 500, "required query parameter 'name' not set"),
        ("GET", "match?by=zz&name=a", None, 500, "'by' parameter must be one of 'source' or 'destination'"),
        ("GET", "check?source=q", None, 500, "required query parameter 'destination' not set"),
        ("GET", "check?destination=q", None, 500, "required query parameter 'source' not set"),
        ("GET", "check?source=a&destination=b&source-type=zz", None, 500, 'unsupported SourceType: "zz"'),
        ("GET", "zz", None, 400, "Bad request: failed intention lookup: index error: UUID must be 36 characters"),
        (
            "DELETE",
            "zz",
            None,
            500,
            "Intention lookup failed: failed intention lookup: index error: UUID must be 36 characters",
        ),
        ("GET", str(uuid.UUID(int=1)), None, 404, "Intention not found"),
        ("PUT", str(uuid.UUID(int=1)), {}, 500, f"Cannot modify non-existent intention: '{uuid.UUID(int=1)}'"),
        ("DELETE", str(uuid.UUID(int=1)), None, 500, f"Cannot delete non-existent intention: '{uuid.UUID(int=1)}'"),
        (
            "POST",
            "",
            {"SourceName": "web", "Action": "allow"},
            500,
            "1 error occurred:\n\t* DestinationName must be set\n\n",
        ),
        (
            "POST",
            "",
            {"SourceName": "web", "DestinationName": "d", "Action": "zz"},
            500,
            "1 error occurred:\n\t* Action must be set to 'allow' or 'deny'\n\n",
        ),
        (
            "POST",
            "",
            {"SourceName": "w*", "DestinationName": "d", "Action": "allow"},
            500,
            "1 error occurred:\n\t* SourceName: wildcard character '*' cannot be used with partial values\n\n",
        ),
    ],
)
async def test_mistakes_have_known_texts(api, method, path, body, status, text):
    reply = await api.call(method, "/v1/connect/intentions" + (f"/{path}" if path else ""), body)
    assert (reply.status, reply.text) == (status, text)


async def test_a_second_intention_for_the_same_pair_is_refused_with_the_first_one_s_id(api):
    first = await create(api, "web", "db")
    reply = await api.call(
        "POST", "/v1/connect/intentions", {"SourceName": "web", "DestinationName": "db", "Action": "deny"}
    )
    expected = f"duplicate intention found: ALLOW default/web => default/db (ID: {first}, Precedence: 9)"
    assert (reply.status, reply.text) == (500, expected)


@pytest.mark.parametrize("destination", ["db", "DB", "dB"])
async def test_an_intention_protects_its_destination_in_any_spelling(api, destination):
    await create(api, "web", "DB", "deny")
    check = f"/v1/connect/intentions/check?destination={destination}&source="
    assert (await api.get(check + "web")).json == {"Allowed": False}
    assert (await api.get(check + "WEB")).json == {"Allowed": True}  # who connects is told letter for letter
    for by, name in (("destination", destination), ("source", "WEB")):
        found = (await api.get(f"/v1/connect/intentions/match?by={by}&name={name}")).json[name]
        assert [(i["SourceName"], i["DestinationName"]) for i in found] == [("web", "DB")]
    exact = f"/v1/connect/intentions/exact?source=Web&destination={destination}"
    assert (await api.get(exact)).json["DestinationName"] == "DB"
    assert (await api.delete(exact)).text == "true"
    assert (await api.get("/v1/connect/intentions")).json == []


async def test_names_that_differ_by_case_are_one_intention(api):
    first = await create(api, "Api", "DB", "deny")
    body = {"SourceName": "api", "DestinationName": "db", "Action": "allow"}
    reply = await api.call("POST", "/v1/connect/intentions", body)
    assert (reply.status, reply.text) == (
        500,
        f"duplicate intention found: DENY default/Api => default/DB (ID: {first}, Precedence: 9)",
    )
    assert (await api.put("/v1/connect/intentions/exact?source=api&destination=db", body)).text == "true"
    (row,) = (await api.get("/v1/connect/intentions")).json
    assert (row["ID"], row["SourceName"], row["DestinationName"], row["Action"]) == (first, "api", "db", "allow")


async def test_an_update_by_id_never_becomes_another_intention(api):
    x, y = await create(api, "u1", "ud", "deny"), await create(api, "u2", "ud")
    for name in ("u2", "U2"):
        body = {"SourceName": name, "DestinationName": "ud", "Action": "deny"}
        reply = await api.put(f"/v1/connect/intentions/{x}", body)
        text = f"duplicate intention found: ALLOW default/u2 => default/ud (ID: {y}, Precedence: 9)"
        assert (reply.status, reply.text) == (500, text)
    rows = (await api.get("/v1/connect/intentions")).json
    assert [(i["ID"], i["SourceName"], i["Action"]) for i in rows] == [(x, "u1", "deny"), (y, "u2", "allow")]
    body = {"SourceName": "U1", "DestinationName": "ud", "Action": "allow"}
    assert (await api.put(f"/v1/connect/intentions/{x.upper()}", body)).status == 200
    assert (await api.get(f"/v1/connect/intentions/{x}")).json["SourceName"] == "U1"


async def test_intentions_are_listed_by_precedence(api):
    for pair in (("*", "*"), ("a", "*"), ("*", "db"), ("web", "db"), ("api", "zz"), ("api", "db")):
        await create(api, *pair)
    rows = (await api.get("/v1/connect/intentions")).json
    assert [(i["SourceName"], i["DestinationName"]) for i in rows] == [
        ("api", "db"),
        ("api", "zz"),
        ("web", "db"),
        ("*", "db"),
        ("a", "*"),
        ("*", "*"),
    ]


def errors(*problems):
    count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
    return f"{count} occurred:\n" + "".join(f"\t* {problem}\n" for problem in problems) + "\n"


ACTION = "Action must be set to 'allow' or 'deny'"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"SourceType": "bogus"}, errors("SourceType must be set to 'consul'")),
        ({"Action": "ALLOW"}, errors(ACTION)),
        ({"Action": "", "SourceName": ""}, errors("SourceName must be set", ACTION)),
        ({"Description": 257 * "é"}, errors("Description exceeds maximum length 512")),
        ({"Meta": {f"k{i}": "v" for i in range(65)}}, errors("Meta exceeds maximum element count 64")),
        ({"Meta": {"k": 513 * "v"}}, errors('Meta value for key "k" exceeds maximum length 512')),
        ({"Meta": {129 * "k": "v"}}, errors(f'Meta key "{129 * "k"}" exceeds maximum length 128')),
        ({"ID": str(uuid.UUID(int=1))}, "ID must be empty when creating a new intention"),
        ({"SourceNS": "team1"}, errors("SourceNS: Namespaces are a Consul Enterprise feature")),
        ({"Meta": {"k": 5}}, "Failed to decode request body: Meta must be an object of strings"),
    ],
)
async def test_what_an_intention_cannot_be_is_refused_as_consul_does(api, fields, text):
    body = {"SourceName": "web", "DestinationName": "db", "Action": "deny", **fields}
    reply = await api.call("POST", "/v1/connect/intentions", body)
    assert (reply.status, reply.text) == (500, text)
    assert (await api.get("/v1/connect/intentions")).json == []


async def test_the_longest_description_and_meta_are_kept(api):
    body: dict[str, Any] = {"SourceName": "web", "DestinationName": "db", "Action": "deny", "SourceNS": "default"}
    body |= {"Description": 512 * "x", "Meta": {f"k{i}": "v" for i in range(64)}, "SourceType": "consul"}
    made = (await api.call("POST", "/v1/connect/intentions", {**body, "Precedence": 3})).json["ID"]
    row = (await api.get(f"/v1/connect/intentions/{made}")).json
    assert {name: row[name] for name in body} == body
    assert row["Precedence"] == 9


async def test_an_address_without_effect_is_ignored_and_the_answer_says_so(api):
    body = {"SourceName": "web", "DestinationName": "db", "Action": "deny", "DefaultAddr": "10.0.0.1", "DefaultPort": 5}
    reply = await api.call("POST", "/v1/connect/intentions", body)
    assert reply.headers["X-Rostra-Warning"] == "field DefaultAddr, field DefaultPort were ignored"


async def test_an_update_without_all_fields_is_refused(api):
    intention = await create(api, "web", "db")
    reply = await api.put(f"/v1/connect/intentions/{intention}", {"Description": "only"})
    assert (reply.status, reply.text) == (500, errors("SourceName must be set", "DestinationName must be set", ACTION))
