from __future__ import annotations

import pytest

from rostra.server.state.catalog import (
    Deregister,
    Nodes,
    NodeServices,
    Register,
    ServiceAddresses,
    ServiceNames,
    canonical,
)
from rostra.server.state.health import Checks, ConnectInstances, NodeChecks, ServiceInstances
from rostra.server.state.rows import CheckRow, NodeRow, ServiceRow
from rostra.server.state.session import CreateSession, Sessions
from rostra.wire.errors import BadRequest, Conflict

ID1 = "aaaaaaaa-0000-0000-0000-000000000001"
ID2 = "aaaaaaaa-0000-0000-0000-000000000002"
UP = {"id": "serfHealth", "name": "Serf Health Status", "status": "passing"}
DOWN = {**UP, "status": "critical"}
ALL = (Nodes(), ServiceNames(), NodeServices("n1"), ServiceInstances("web"), NodeChecks("n1"), Checks())


def test_a_registration_creates_node_service_and_checks(log):
    service = {"name": "web", "id": "web-1", "port": 80, "tags": ("b", "a"), "meta": {"v": "1"}}
    assert log.register("n1", service, {"id": "c1", "status": "passing", "service_id": "web-1"}, {"name": "disk"})
    at = log.store.index
    assert log.ask(Nodes()) == {"n1": NodeRow("n1", "", "10.1.0.1", "dc1", {}, {}, at, at)}
    node, web, checks = log.ask(ServiceInstances("web"))["n1", "web-1"]
    assert node.name == "n1"
    assert web == ServiceRow("n1", "web-1", "web", "", 80, ("b", "a"), {"v": "1"}, create_index=at, modify_index=at)
    assert checks == (
        CheckRow("n1", "disk", "disk", "critical", create_index=at, modify_index=at),
        CheckRow(
            "n1",
            "c1",
            status="passing",
            service_id="web-1",
            service_name="web",
            service_tags=("b", "a"),
            create_index=at,
            modify_index=at,
        ),
    )


def test_registering_the_same_again_moves_no_index_at_all(log):
    what = (
        "n1",
        {"name": "web", "meta": {"b": "2", "a": "1"}, "proxy": {"x": {"q": 1, "p": (1, 2)}}},
        {"id": "c", "service_id": "web"},
        UP,
    )
    log.register(*what, node_meta={"rack": "1"}, node_id=ID1)
    before = [(q, log.ask(q), log.index_of(q)) for q in ALL]
    log.register(*what, node_meta={"rack": "1"}, node_id=ID1.upper())
    assert log.last.touched == ()
    assert [(q, log.ask(q), log.index_of(q)) for q in ALL] == before


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (Register("", "1.2.3.4"), "^Must provide node$"),
        (Register("n1"), "^Must provide address if SkipNodeUpdate is not set$"),
        (Register("n1", "1.2.3.4", node_id="zz"), "^Bad node ID"),
        (Register("n1", "1.2.3.4", service={"id": "x"}), "^Must provide service name with ID$"),
        (Register("n1", "1.2.3.4", service={}), "^Must provide service name$"),
        (Register("n1", "1.2.3.4", service={"name": "w", "port": 65536}), "port 65536"),
        (Register("n1", "1.2.3.4", service={"name": "w", "weight_warning": -1}), "weights"),
        (Register("n1", "1.2.3.4", service={"name": "w", "port": "80"}), "service: field 'port' must be an integer"),
        (Register("n1", "1.2.3.4", service={"name": "w", "tags": (1,)}), "service: field 'tags'"),
        (Register("n1", "1.2.3.4", service={"name": "w", "Port": 1}), "unknown field 'Port'"),
        (Register("n1", "1.2.3.4", service={"name": "p", "kind": "connect-proxy", "port": 1}), "^Proxy.Destination"),
        (
            Register(
                "n1",
                "1.2.3.4",
                service={"name": "p", "kind": "connect-proxy", "proxy": {"destination_service_name": "w"}},
            ),
            "^Port must be set for a Connect proxy",
        ),
        (Register("n1", "1.2.3.4", checks=({},)), "^Must provide check id or name"),
        (Register("n1", "1.2.3.4", checks=({"id": "c", "status": "bogus"},)), "status 'bogus'"),
        (Register("n1", "1.2.3.4", checks=({"id": "c", "service_id": "ghost"},)), "^Missing service registration"),
        (Deregister(""), "^Must provide node$"),
    ],
)
def test_a_wrong_registration_is_refused_and_leaves_nothing_behind(log, command, text):
    empty = log.ask(Nodes()), log.index_of(Nodes())
    with pytest.raises(BadRequest, match=text):
        log.do(command)
    assert (log.ask(Nodes()), log.index_of(Nodes())) == empty
    assert log.ask(ServiceNames()) == log.ask(Checks()) == {}


def test_skip_node_update_leaves_a_node_as_it_is_and_creates_one_that_is_missing(log):
    log.register("n1", address="10.0.0.1")
    log.register("n1", "web", address="10.9.9.9", skip_node_update=True)
    log.register("n2", "web", address="", skip_node_update=True)
    assert [node.address for node in log.ask(Nodes()).values()] == ["10.0.0.1", ""]


def test_names_of_nodes_and_services_do_not_differ_by_case(log):
    log.register("n1", "Web", UP)
    log.register("N1", {"name": "web", "id": "2"}, address="10.1.0.1")
    assert list(log.ask(Nodes())) == ["n1"]
    assert list(log.ask(ServiceInstances("WEB"))) == [("n1", "2"), ("n1", "Web")]
    assert list(log.ask(NodeChecks("N1"))) == ["serfHealth"]
    assert log.ask(NodeServices("N1"))["",].name == "n1"
    log.do(Deregister("N1"))
    assert log.ask(ServiceInstances("web")) == {}


def test_a_node_keeps_its_id_when_a_registration_does_not_give_one(log):
    log.register("n1", node_id=ID1)
    log.register("n1", address="10.0.0.9")
    assert log.ask(Nodes())["n1"][1:3] == (ID1, "10.0.0.9")


def test_a_node_that_shows_its_id_under_another_name_is_renamed(log):
    log.register("old", "web", UP, node_id=ID1)
    created = log.store.index
    log.register("new", node_id=ID1)
    assert [(node.name, node.create_index) for node in log.ask(Nodes()).values()] == [("new", created)]
    assert log.ask(ServiceInstances("web")) == {}


@pytest.mark.parametrize(("state", "is_refused"), [(UP, True), (DOWN, False), (None, False)])
def test_another_node_takes_a_name_only_when_its_owner_is_down(log, state, is_refused):
    log.register("n1", None, *([state] if state else []), node_id=ID1)
    if is_refused:
        with pytest.raises(Conflict, match=f"^Node name n1 is reserved by node {ID1} with name n1"):
            log.register("n1", node_id=ID2)
    else:
        log.register("n1", node_id=ID2)
    assert log.ask(Nodes())["n1"].id == (ID1 if is_refused else ID2)


def test_deregistering_what_is_not_there_succeeds(log):
    log.register("n1")
    for command in (Deregister("x"), Deregister("n1", service_id="x"), Deregister("n1", check_id="x")):
        assert log.do(command) is True
        assert log.last.touched == ()


def test_deregistering_a_service_takes_its_checks_along(log):
    log.register("n1", "web", {"id": "c", "service_id": "web"}, UP)
    log.do(Deregister("n1", service_id="web"))
    assert list(log.ask(NodeChecks("n1"))) == ["serfHealth"]
    assert log.ask(ServiceInstances("web")) == log.ask(ServiceNames()) == {}


def test_deregistering_a_node_takes_everything_along(log):
    log.register("n1", "web", {"id": "c", "service_id": "web"}, UP)
    log.do(Deregister("n1"))
    for query in (Nodes(), ServiceNames(), NodeServices("n1"), ServiceInstances("web"), NodeChecks("n1"), Checks()):
        assert log.ask(query) == {}
        assert log.index_of(query) == log.store.index


def test_a_check_without_a_status_keeps_the_one_that_it_had(log):
    log.register("n1", None, {"id": "c"})
    assert log.ask(NodeChecks("n1"))["c"].status == "critical"
    log.register("n1", None, {"id": "c", "status": "passing"})
    log.register("n1", None, {"id": "c", "notes": "new"})
    assert log.ask(NodeChecks("n1"))["c"][3:5] == ("passing", "new")


def test_checks_follow_the_name_and_tags_of_their_service(log):
    log.register("n1", {"id": "w", "name": "web"}, {"id": "c", "service_id": "w", "status": "passing"})
    log.register("n1", {"id": "w", "name": "web2", "tags": ("t",)})
    assert log.ask(ServiceInstances("web")) == {}
    check = log.ask(ServiceInstances("web2"))["n1", "w"][2][0]
    assert (check.status, check.service_name, check.service_tags) == ("passing", "web2", ("t",))
    assert {"service:web", "service:web2"} <= log.touched()


def test_a_check_can_move_from_the_node_to_a_service(log):
    log.register("n1", "web", {"id": "c", "status": "passing"})
    log.register("n1", "db")
    log.register("n1", None, {"id": "c", "service_id": "db"})
    assert log.ask(ServiceInstances("web"))["n1", "web"][2] == ()
    assert [c.id for c in log.ask(ServiceInstances("db"))["n1", "db"][2]] == ["c"]
    assert {"service:web", "service:db"} <= log.touched()


def test_service_names_show_the_tags_of_all_instances(log):
    log.register("n1", {"name": "web", "tags": ("b", "a", "b")})
    log.register("n2", {"name": "web", "tags": ("c", "a")})
    log.register("n1", "db")
    assert log.ask(ServiceNames()) == {"db": ((),), "web": (("a", "b", "c"),)}
    log.do(Deregister("n1", service_id="web"))
    assert log.ask(ServiceNames())["web"] == (("a", "c"),)


def test_service_names_are_touched_by_names_and_tags_only(log):
    log.register("n1", {"name": "web", "tags": ("a",)})
    log.register("n2", {"name": "web", "tags": ("a",)})
    assert "table:service-names" not in log.touched()
    log.register("n2", {"name": "web", "tags": ("a",), "port": 80}, UP)
    assert "table:service-names" not in log.touched()
    log.do(Deregister("n2"))
    assert "table:service-names" not in log.touched()
    log.do(Deregister("n1"))
    assert "table:service-names" in log.touched()


def test_addresses_of_services_are_touched_by_addresses_and_names_only(log):
    log.register("n1", {"name": "web", "address": "10.9.9.9"}, {"id": "c", "service_id": "web"})
    log.register("n2", {"name": "web"})
    assert log.ask(ServiceAddresses()) == {("n1", "web"): ("10.9.9.9", "web")}
    at = log.index_of(ServiceAddresses())
    log.register("n1", {"name": "web", "address": "10.9.9.9", "port": 8}, {"id": "c", "status": "passing"})
    log.register("n2", {"name": "web", "port": 9})
    assert log.index_of(ServiceAddresses()) == at
    for change, expected in (
        ({"name": "web", "address": "10.8.8.8"}, {("n1", "web"): ("10.8.8.8", "web")}),
        ({"id": "web", "name": "api", "address": "10.8.8.8"}, {("n1", "web"): ("10.8.8.8", "api")}),
        ({"id": "web", "name": "api"}, {}),
        ({"id": "web", "name": "api", "address": "::1"}, {("n1", "web"): ("::1", "api")}),
    ):
        log.register("n1", change)
        assert log.ask(ServiceAddresses()) == expected
        assert log.index_of(ServiceAddresses()) == log.store.index
    log.apply(Deregister("n1"))
    assert log.ask(ServiceAddresses()) == {}
    assert log.index_of(ServiceAddresses()) == log.store.index


def test_a_change_on_a_node_touches_each_instance_on_it_and_no_other(log):
    log.register("n1", "web", UP)
    log.register("n1", "db")
    log.register("n2", "web")
    log.register("n1", None, DOWN)
    touched = set(log.last.touched)
    assert {("service:web", ("n1", "web")), ("service:db", ("n1", "db")), ("node:n1", "serfHealth")} <= touched
    assert ("service:web", ("n2", "web")) not in touched
    assert ("table:checks", ("n1", "serfHealth")) in touched
    assert "table:nodes" not in log.touched()


def test_a_check_of_a_service_touches_that_service_only(log):
    log.register("n1", "web")
    log.register("n1", "db")
    log.register("n1", None, {"id": "c", "service_id": "web"})
    assert "service:web" in log.touched()
    assert "service:db" not in log.touched()


def test_connect_answers_with_proxies_and_native_instances(log):
    proxy = {"name": "web-sidecar", "kind": "connect-proxy", "port": 9, "proxy": {"destination_service_name": "web"}}
    log.register("n1", proxy)
    assert "connect:web" in log.touched()
    log.register("n2", {"name": "web", "native": True})
    log.register("n3", "web")
    assert list(log.ask(ConnectInstances("web"))) == [("n1", "web-sidecar"), ("n2", "web")]
    log.register("n2", {"name": "web"})
    assert ("connect:web", ("n2", "web")) in log.last.touched
    assert list(log.ask(ConnectInstances("WEB"))) == [("n1", "web-sidecar")]
    assert ConnectInstances("web").row(log.store.view(), ("n2", "web")) is None


def test_queries_that_share_a_granule_have_no_row_for_each_others_keys(log):
    log.register("n1", "web", UP)
    view = log.store.view()
    assert NodeServices("n1").row(view, "serfHealth") is None  # type: ignore[arg-type]  # the other query's key
    assert NodeServices("n1").row(view, "sh") is None  # type: ignore[arg-type]  # the other query's key
    assert NodeChecks("n1").row(view, ("",)) is None  # type: ignore[arg-type]  # the other query's key
    assert NodeChecks("n1").row(view, ("s", "web")) is None  # type: ignore[arg-type]  # the other query's key
    assert ServiceInstances("db").row(view, ("n1", "web")) is None


def test_checks_are_listed_in_order_of_node_and_id(log):
    for node in ("b", "a"):
        log.register(node, "web", UP, {"id": "z"}, {"id": "c", "service_id": "web"})
    assert list(log.ask(Checks())) == [(n, c) for n in "ab" for c in ("c", "serfHealth", "z")]


def test_canonical_maps_do_not_depend_on_the_order_of_insertion():
    one = canonical({"b": {"y": 1, "x": [1, {"q": 1, "p": 2}]}, "a": 2})
    other = canonical({"a": 2, "b": {"x": (1, {"p": 2, "q": 1}), "y": 1}})
    assert repr(one) == repr(other)


def test_ids_of_services_and_checks_do_not_differ_by_case(log):
    log.register(
        "n1", {"id": "App-1", "name": "app", "port": 1}, {"id": "C1", "service_id": "app-1", "status": "passing"}
    )
    created = log.store.index
    log.register("n1", {"id": "app-1", "name": "app", "port": 2}, {"id": "c1", "service_id": "APP-1"})
    ((key, (_, service, checks)),) = log.ask(ServiceInstances("app")).items()
    assert (key, service.id, service.port, service.create_index) == (("n1", "app-1"), "app-1", 2, created)
    assert [(c.id, c.service_id, c.status, c.create_index) for c in checks] == [("c1", "app-1", "passing", created)]
    log.do(Deregister("n1", check_id="C1"))
    assert log.ask(NodeChecks("n1")) == {}
    log.do(Deregister("n1", service_id="APP-1"))
    assert log.ask(ServiceInstances("app")) == {}


def test_a_new_spelling_of_an_id_takes_the_checks_along_and_keeps_the_sessions(log):
    log.register("n1", {"id": "App", "name": "app"}, {"id": "C1", "service_id": "App", "status": "passing"})
    log.do(CreateSession("s", "n1", node_checks=("c1",)))
    log.register("n1", {"id": "app", "name": "app"}, {"id": "c1", "status": "passing", "service_id": "app"})
    assert log.touched() >= {"service:app", "node:n1"}
    assert [(c.id, c.service_id) for c in log.ask(NodeChecks("n1")).values()] == [("c1", "app")]
    assert list(log.ask(Sessions())) == ["s"]
    log.do(Deregister("n1", check_id="C1"))
    assert log.ask(Sessions()) == {}


def test_instances_that_an_older_version_kept_apart_become_one(log, reloaded):
    log.register("n1", {"id": "App", "name": "app"}, {"id": "c1", "service_id": "App"})
    services = log.store.tables.services
    for service_id in ("app", "aPP"):
        services.put(("n1", service_id), services.rows["n1", "App"]._replace(id=service_id))
    log.store = reloaded(log.store)
    log.register("n1", {"id": "app", "name": "app"})
    assert list(log.ask(ServiceInstances("app"))) == [("n1", "app")]
    assert log.ask(NodeChecks("n1"))["c1"].service_id == "app"
