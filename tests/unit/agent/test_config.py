"""Flags, JSON and HCL → one Config, or every problem with its place."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import rostra
from rostra.agent import config
from rostra.agent.config import Config, ConfigErrors, Secret, load, pick_address
from rostra.agent.config.loading import Loading
from rostra.agent.config.settings import DEFAULTS

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
BASE = ["-data-dir=/nonexistent/rostra", "-bind=127.0.0.1", "-node=n1"]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a file that messages then name by its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigErrors) as e:
        load(argv)
    return str(e.value).splitlines()


def from_hcl(text: str, *argv: str) -> Config:
    return load([*BASE, *argv, f"-hcl={text}"])


def hcl_problems(text: str, *argv: str) -> list[str]:
    return problems(*BASE, *argv, f"-hcl={text}")


# ── flags ──


def test_defaults_are_consuls() -> None:
    c = load(BASE)
    assert (c.datacenter, c.domain, c.server, c.client_addrs) == ("dc1", "consul", False, ("127.0.0.1",))
    assert (c.server_port, c.join_port, c.http_port, c.dns_port) == (8300, 8301, 8500, 8600)
    assert (c.sidecar_min_port, c.sidecar_max_port) == (21000, 21255)
    assert (c.retry_interval_s, c.check_update_interval_s, c.http_max_conns_per_client) == (30.0, 300.0, 200)
    assert c.warnings == ()


def test_the_benchmarks_command_line_is_understood(write: Any) -> None:
    write(
        "s1.json",
        '{ "limits": {"http_max_conns_per_client": 10000, "rpc_max_conns_per_client": 10000},'
        ' "connect": {"enabled": true},\n  "leave_on_terminate": false, "skip_leave_on_interrupt": true }',
    )
    c = load(
        f"-server -bootstrap-expect=3 -node=s1 -datacenter=dc1 -bind=127.0.0.1 -client=127.0.0.1 -encrypt={KEY} "
        "-data-dir=/nonexistent/s1 -config-file=s1.json -log-level=warn -retry-join=127.0.0.1 -retry-join=127.0.0.2 "
        "-retry-join=127.0.0.3 -retry-interval=1s".split()
    )
    assert c.server
    assert (c.bootstrap_expect, c.bootstrap, c.node_name, c.advertise_addr) == (3, False, "s1", "127.0.0.1")
    assert c.retry_join == ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    assert (c.retry_interval_s, c.log_level, c.http_max_conns_per_client) == (1.0, "warn", 10000)
    assert c.encrypt.reveal() == KEY
    assert len(c.warnings) == 1


def test_the_mesh_benchmarks_command_line_is_understood() -> None:
    limit = "limits { http_max_conns_per_client = 10000 }"
    c = load(["-dev", "-node=mesh", "-bind=127.0.0.21", "-client=127.0.0.21", "-log-level=warn", f"-hcl={limit}"])
    assert (c.dev, c.bind_addr, c.http_addrs) == (True, "127.0.0.21", ("127.0.0.21",))
    assert (c.http_max_conns_per_client, c.warnings) == (10000, ())


@pytest.mark.parametrize(
    "argv",
    [["-node=x"], ["--node=x"], ["-node", "x"], ["--node", "x"], ["-node=y", "-node=x"], ["-server=false", "-node=x"]],
)
def test_flags_take_one_dash_or_two_and_a_value_after_equals_or_space(argv: list[str]) -> None:
    assert load([*BASE[:2], *argv]).node_name == "x"


def test_dev_is_one_open_server_in_memory_on_loopback() -> None:
    c = load(["-dev"])
    assert (c.server, c.bootstrap, c.bind_addr, c.advertise_addr) == (True, True, "127.0.0.1", "127.0.0.1")
    assert (c.log_level, c.data_dir, c.intentions_default_allow, c.warnings) == ("info", "", True, ())


def test_dev_says_that_it_is_open_when_others_can_reach_it() -> None:
    assert load(["-dev", "-bind=127.0.0.1", "-client=0.0.0.0"]).warnings == (
        "-dev is open to everyone who can reach 0.0.0.0: no access control, state in memory",
    )


def test_dev_with_a_data_directory_keeps_its_state_in_memory_and_says_so() -> None:
    assert load(["-dev", "-data-dir=/nonexistent/x"]).warnings == (
        "data_dir is not used with -dev: the state is in memory and ends with the agent",
    )


def test_flags_win_over_files_and_fragments_over_flags(write: Any) -> None:
    write("a.hcl", 'node_name = "file" datacenter = "file" log_level = "warn" retry_join = ["f"]')
    c = load(
        ["-config-file=a.hcl", *BASE[:2], "-node=flag", "-datacenter=flag", "-retry-join=g", '-hcl=datacenter="frag"']
    )
    assert (c.node_name, c.datacenter, c.log_level) == ("flag", "frag", "warn")
    assert c.retry_join == ("g", "f")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-bogus"], "flag provided but not defined: -bogus"),
        (["-retryjoin=x"], 'flag provided but not defined: -retryjoin; did you mean "-retry-join"?'),
        (["-node"], "flag needs an argument: -node"),
        (["-http-port=x"], '-http-port: must be a port number, not "x"'),
        (["-http-port=70000"], "-http-port: invalid port 70000: 1 to 65535, or -1 to switch it off"),
        (["-server=maybe"], '-server: must be true or false, not "maybe"'),
        (["-retry-interval=5x"], '-retry-interval: invalid duration "5x": write it like "30s", "5m" or "1h30m"'),
        (["-log-level=loud"], '-log-level: invalid log level "loud": one of trace, debug, info, warn, error'),
        (["-node-meta=x"], '-node-meta: "x" must have the form key:value'),
        (["-bind=foo"], "-bind: invalid ip address: foo"),
        (["-client=foo"], "-client: invalid ip address: foo"),
        (["-retry-join=provider=aws tag_key=x"],
         '-retry-join: cloud auto-join is not supported: "provider=aws tag_key=x"; give addresses or host names'),
        (["-config-file=/nonexistent/a.hcl"],
         "cannot read the configuration file /nonexistent/a.hcl: No such file or directory"),
        (["-config-dir=/nonexistent"], "cannot read the configuration directory /nonexistent: it is not a directory"),
        (["-config-file=a.txt"],
         "a.txt: the name of a configuration file ends in .json or .hcl (or give -config-format)"),
        (["-config-format=yaml"], '-config-format: must be "hcl" or "json", not "yaml"'),
        (["extra", "words"], "unexpected extra arguments: extra words"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line(argv: list[str], message: str) -> None:
    assert problems(*BASE, *argv) == [message]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-server"], "data_dir cannot be empty: give -data-dir=PATH, or -dev to try things out"),
        ([], "data_dir cannot be empty: give -data-dir=PATH, or -dev to try things out"),
        ([*BASE, "-bootstrap"], "-bootstrap: 'bootstrap = true' requires 'server = true'"),
        ([*BASE, "-bootstrap-expect=3"], "-bootstrap-expect: 'bootstrap_expect > 0' requires 'server = true'"),
        ([*BASE, "-server", "-bootstrap", "-bootstrap-expect=3"],
         "-bootstrap-expect: 'bootstrap_expect > 0' and 'bootstrap = true' are mutually exclusive"),
        (["-dev", "-node=a b"],
         """-node: "a b" is no name for a node: 1 to 64 letters, digits, '-', '_' or '.'"""),
        (["-dev", "-node=" + 65 * "a"],
         f"""-node: "{65 * 'a'}" is no name for a node: 1 to 64 letters, digits, '-', '_' or '.'"""),
        (["-dev", "-bootstrap-expect=3"], "-bootstrap-expect: 'bootstrap_expect > 0' not allowed in dev mode"),
        ([*BASE, "-advertise=0.0.0.0"], "-advertise: advertise address cannot be 0.0.0.0, :: or [::]"),
        ([*BASE, "-bind={{ GetPrivateIP }}"],
         "-bind: go-sockaddr templates are not supported: give the address itself, or bind to 0.0.0.0 and one of this "
         "host's addresses is advertised"),
        ([*BASE, "-bind=127.0.0.1 127.0.0.2"],
         "-bind: cannot contain multiple addresses; use addresses.http and addresses.dns to listen on several"),
        ([*BASE, "-http-port=8600"], "-http-port: HTTP address 127.0.0.1:8600 already configured for DNS"),
        ([*BASE, "-datacenter=a b"], '-datacenter: datacenter cannot be "a b": use only a-z, 0-9, - and _, 64 at most'),
        ([*BASE, "-node-id=x"], '-node-id: "x" is not a UUID'),
        ([*BASE, "-recursor=dns.example"], '-recursor: "dns.example" is not an address or address:port'),
        ([*BASE, "-data-dir=/dev/null"], "-data-dir: /dev/null is not a directory"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_one_line(argv: list[str], message: str) -> None:
    assert problems(*argv) == [message]


def test_during_a_change_the_new_and_the_old_secret_are_accepted_and_a_third_is_not() -> None:
    assert load([*BASE, f"-encrypt={KEY},{KEY}"]).encrypt.reveal() == f"{KEY},{KEY}"
    (line,) = problems(*BASE, f"-encrypt={KEY},{KEY},{KEY}")
    assert line == "-encrypt: more than two keys: during a change it is the new one, a comma, and the old one"
    assert KEY not in line


def test_an_encrypt_key_that_is_none_is_refused_without_printing_it() -> None:
    for bad in ("correct horse battery staple", "YWJj", "c2VjcmV0LXZhbHVl!"):
        lines = problems(*BASE, f"-encrypt={bad}")
        assert lines == [
            '-encrypt: not a key: it must be 32 random bytes (or 16 or 24) in base64, such as "rostra keygen" prints'
        ]


def test_the_secret_prints_as_stars_everywhere() -> None:
    c = load([*BASE, f"-encrypt={KEY}"])
    shown = f"{c} {c!r} {c.encrypt} {c.encrypt!r} {[c.encrypt]} {c.encrypt:>10}"
    assert KEY not in shown
    assert "***" in shown
    assert dataclasses.asdict(c)["encrypt"] == c.encrypt
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(c.encrypt)
    assert (bool(Secret("")), Secret("a") == Secret("a")) == (False, True)


def test_ports_may_be_switched_off() -> None:
    c = load([*BASE, "-http-port=-1", "-dns-port=-1"])
    assert (c.http_port, c.dns_port) == (-1, -1)


def test_one_private_address_is_advertised_and_several_are_asked_about() -> None:
    assert pick_address(["127.0.0.1", "10.1.2.3", "198.51.100.7"], ipv6=False) == "10.1.2.3"
    assert pick_address(["127.0.0.1", "198.51.100.7", "fd00::1"], ipv6=False) == "198.51.100.7"
    assert pick_address(["10.1.2.3", "fd00::1"], ipv6=True) == "fd00::1"
    with pytest.raises(ValueError, match=r"which of 10\.1\.2\.3, 192\.168\.1\.1 shall other nodes use"):
        pick_address(["10.1.2.3", "192.168.1.1"], ipv6=False)
    with pytest.raises(ValueError, match="no address to advertise was found"):
        pick_address(["127.0.0.1"], ipv6=False)


def test_the_addresses_of_this_host_include_loopback() -> None:
    assert "127.0.0.1" in config.host_addresses()


# ── files ──


def test_a_directory_is_read_in_the_order_of_names_and_other_files_are_left_alone(write: Any) -> None:
    write("d/b.hcl", 'node_name = "b" retry_join = ["2"]')
    write("d/a.json", '{"node_name": "a", "retry_join": ["1"]}')
    write("d/notes.txt", "not configuration")
    c = load([*BASE[:2], "-config-dir=d"])
    assert (c.node_name, c.retry_join) == ("b", ("1", "2"))
    assert c.config_files == ("d/a.json", "d/b.hcl")


def test_keys_may_be_camel_case_or_upper_case() -> None:
    c = from_hcl(
        'LogLevel = "warn" Ports { HTTP = 12 } DNSConfig { ServiceTTL { "*" = "5s" } } Client_Addr = "127.0.0.9"'
    )
    assert (c.log_level, c.http_port, c.dns_service_ttl_s) == ("warn", 12, {"*": 5.0})
    assert c.client_addrs == ("127.0.0.9",)


def test_blocks_of_one_name_are_merged() -> None:
    c = from_hcl('ports { dns = 53 } ports { http = 80 } node_meta { a = "1" } node_meta { b = "2" }')
    assert (c.dns_port, c.http_port, c.node_meta) == (53, 80, {"a": "1", "b": "2"})


def test_all_problems_are_told_at_once_with_file_line_column_and_key(write: Any) -> None:
    write("a.hcl", 'bogus = 1\nports {\n  htp = 80\n}\nretry_interval = "5x"\n')
    write("b.json", '{\n "server": "yes",\n "node_name": 5,\n "retry_join": "x",\n "ports": 3 }')
    assert problems(*BASE, "-config-file=a.hcl", "-config-file=b.json", "-dns-port=x") == [
        "a.hcl:1:1: bogus: unknown configuration key",
        'a.hcl:3:3: ports.htp: unknown configuration key; did you mean "http"?',
        'a.hcl:5:1: retry_interval: invalid duration "5x": write it like "30s", "5m" or "1h30m"',
        "b.json:2:2: server: must be true or false, not a string",
        "b.json:3:2: node_name: must be a string, not the number 5",
        "b.json:4:2: retry_join: must be a list of strings, not a string",
        "b.json:5:2: ports: must be a block, not the number 3",
        '-dns-port: must be a port number, not "x"',
    ]


def test_malformed_json_names_file_line_and_column(write: Any) -> None:
    write("a.json", '{\n  "node_name": "x"\n  "server": true\n}')
    assert problems("-config-file=a.json") == [
        "a.json:3:3: expected ',' or '}' after the value of 'node_name', found \"server\""
    ]


def test_malformed_hcl_names_file_line_and_column(write: Any) -> None:
    write("a.hcl", "server = true\nports {\n  http = \n}\n")
    assert problems("-config-file=a.hcl") == ["a.hcl:4:1: expected a value for 'http', found '}'"]


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.hcl").write_bytes(b"a = \xff")
    assert problems(f"-config-file={tmp_path}/a.hcl") == [f"{tmp_path}/a.hcl: not UTF-8 text: byte 4 is 0xff"]


def test_a_wrong_value_in_a_fragment_names_the_flag() -> None:
    assert hcl_problems("performance { raft_multiplier = 11 }") == [
        "-hcl:1:15: performance.raft_multiplier: cannot be 11; it must be between 1 and 10"
    ]


def test_a_key_given_twice_is_warned_about() -> None:
    assert from_hcl('log_level = "warn"\nlog_level = "info"').warnings == (
        "-hcl:2:1: log_level: given more than once; the last one counts",
    )


def test_consuls_unused_keys_give_one_warning_that_names_them_all() -> None:
    c = from_hcl(
        'raft_protocol = 3 disable_update_check = true segments = [{ name = "x" }] telemetry { statsd_address = "x" } '
        'gossip_lan { gossip_nodes = 3 } acl { tokens { agent = "s3cr3t" } } leave_on_terminate = true',
        "-raft-protocol=3",
        "-disable-host-node-id",
    )
    assert c.warnings == (
        "accepted because Consul knows them, without effect here: -disable-host-node-id, -raft-protocol, acl.tokens, "
        "disable_update_check, gossip_lan, leave_on_terminate, raft_protocol, segments, telemetry",
    )


def test_enabled_acls_are_not_passed_over_in_silence() -> None:
    c = from_hcl('acl { enabled = true default_policy = "deny" }')
    assert c.warnings == ("acl.enabled: tokens are not enforced by this version; every request is allowed",)
    assert not c.intentions_default_allow


def test_an_unknown_key_inside_a_known_block_is_an_error() -> None:
    assert hcl_problems('acl { polcy_ttl = "30s" }') == [
        '-hcl:1:7: acl.polcy_ttl: unknown configuration key; did you mean "policy_ttl"?'
    ]


def test_even_numbers_of_servers_are_warned_about() -> None:
    argv = [*BASE, "-server"]
    assert "survives the loss of none" in load([*argv, "-bootstrap-expect=2"]).warnings[0]
    assert load([*argv, "-bootstrap-expect=4"]).warnings == (
        "bootstrap_expect = 4: a cluster of 4 servers survives the loss of 1, as one of 3",
    )
    assert load([*argv, "-bootstrap-expect=1"]).bootstrap


@pytest.mark.parametrize("flags", ["-bootstrap-expect=1", "-bootstrap", "-server", "-bootstrap -bootstrap-expect=1"])
def test_a_development_agent_may_be_told_that_it_founds_a_cluster_of_one(flags: str) -> None:
    config = load(["-dev", *flags.split()])
    assert config.bootstrap
    warnings = ["bootstrap_expect = 1: the same as bootstrap = true, which -dev implies"]
    assert list(config.warnings) == (warnings if "expect" in flags else [])


def test_bootstrap_and_an_expectation_of_one_server_say_the_same() -> None:
    assert load([*BASE, "-server", "-bootstrap", "-bootstrap-expect=1"]).bootstrap


def test_a_server_can_be_one_that_never_votes_under_both_of_its_names(write: Any) -> None:
    argv = [*BASE, "-server"]
    assert not load(argv).non_voting_server
    for flag in ("-non-voting-server", "-read-replica"):
        assert load([*argv, flag]).non_voting_server
    for key in ("non_voting_server", "read_replica"):
        assert load([*argv, f"-config-file={write('x.hcl', f'{key} = true')}"]).non_voting_server
    assert "founds no cluster" in load([*argv, "-read-replica", "-bootstrap-expect=3"]).warnings[-1]
    for more in (["-bootstrap"], ["-bootstrap-expect=1"]):
        assert "by itself" in problems(*argv, "-read-replica", *more)[0]
    assert "requires 'server = true'" in problems(*BASE, "-read-replica")[0]


# ── definitions ──


def test_service_and_check_definitions_are_collected_with_their_places(write: Any) -> None:
    write(
        "web.hcl",
        'service {\n  Name = "web" Port = 80\n  checks = [{ HTTP = "http://x" interval = "10s" }]\n'
        '  connect { sidecar_service { proxy { upstreams { destination_name = "api" LocalBindPort = 9 } } } }\n}\n'
        'check { id = "mem" tcp = "localhost:1" interval = "10s" }\n',
    )
    write("more.json", '{"services": [{"name": "a"}, {"name": "b"}], "checks": [{"name": "c", "ttl": "10s"}]}')
    c = load([*BASE, "-config-file=web.hcl", "-config-file=more.json"])
    assert [(d.value["name"], d.where) for d in c.services] == [
        ("web", "web.hcl:1:1"), ("a", "more.json:1:15"), ("b", "more.json:1:30"),
    ]  # fmt: skip
    assert c.services[0].value == {
        "name": "web",
        "port": 80,
        "checks": [{"http": "http://x", "interval": "10s"}],
        "connect": {"sidecar_service": {"proxy": {"upstreams": [{"destination_name": "api", "local_bind_port": 9}]}}},
    }
    assert [d.value for d in c.checks] == [
        {"id": "mem", "tcp": "localhost:1", "interval": "10s"}, {"name": "c", "ttl": "10s"},
    ]  # fmt: skip


def test_maps_of_the_user_inside_definitions_stay_as_written() -> None:
    text = """service { name = "x" meta { MyKey = "V" } tagged_addresses { LAN_x { Address = "10.0.0.1" Port = 1 } }
      proxy { config { Envoy_Thing { b_C = 1 } } } 
      check { http = "x" interval = "1s" header { X-Y = ["1"] Z = "2" } } }"""
    (service,) = from_hcl(text).services
    assert service.value["meta"] == {"MyKey": "V"}
    assert service.value["tagged_addresses"] == {"LAN_x": {"address": "10.0.0.1", "port": 1}}
    assert service.value["proxy"]["config"] == {"Envoy_Thing": {"b_C": 1}}
    assert service.value["check"]["header"] == {"X-Y": ["1"], "Z": ["2"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("service { port = 80 }", "-hcl:1:1: service: a service definition needs a name"),
        ('service { name = "" }', "-hcl:1:1: service: a service definition needs a name"),
        ('check { ttl = "10s" }', "-hcl:1:1: check: a check definition needs a name"),
        ('service { name = "x" prt = 1 }',
         '-hcl:1:22: service.prt: unknown configuration key; did you mean "port"?'),
        ('service { name = "x" port = "80" }', "-hcl:1:22: service.port: must be a whole number, not a string"),
        ('service { name = "x" check { ttl = "10y" } }',
         '-hcl:1:30: service.check.ttl: invalid duration "10y": write it like "30s", "5m" or "1h30m"'),
        ('service { name = "x" check { ttl = 10 } }',
         '-hcl:1:30: service.check.ttl: must be a duration in quotes, such as "30s", not the number 10'),
        ('service { name = "x" checks = [{ name = "c" interval = "-1s" }] }',
         "-hcl:1:45: service.checks[0].interval: a duration cannot be negative"),
        ('check { name = "x" status = "fine" }',
         '-hcl:1:20: check.status: "fine" must be one of passing, warning, critical'),
        ('services = ["web"]', "-hcl:1:13: services[0]: must be a block, not a string"),
        ('service { name = "x" check {} check {} }', "-hcl:1:22: service.check: given 2 times; only one is possible"),
        ('service { name = "x" connect { sidecar_service { prot = 1 } } }',
         '-hcl:1:50: service.connect.sidecar_service.prot: unknown configuration key; did you mean "port"?'),
    ],
)  # fmt: skip
def test_a_wrong_definition_is_one_line_with_its_place(text: str, message: str) -> None:
    assert hcl_problems(text) == [message.replace('such as "30s"', 'such as "10s"')]


# ── the table itself ──


def test_every_setting_has_help_and_a_key_or_a_flag() -> None:
    for name, s in config.SETTINGS.items():
        assert s.help.endswith("."), name
        assert s.keys or s.flag, name


def test_no_key_and_no_flag_is_taken_twice() -> None:
    keys = [key for s in config.SETTINGS.values() for key in s.keys] + list(config.UNUSED)
    flags = [s.flag for s in config.SETTINGS.values() if s.flag]
    assert len(keys) == len(set(keys))
    assert len(flags) == len(set(flags))


def test_every_default_is_a_value_its_kind_can_hold_and_config_is_frozen() -> None:
    c = load(["-dev"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.dev = False  # type: ignore[misc]
    assert load(c.argv) == c


def test_the_help_text_names_every_flag() -> None:
    text = config.usage()
    for s in config.SETTINGS.values():
        assert not s.flag or f"  -{s.flag}" in text


def test_argv_alone_is_read_in_less_than_ten_milliseconds_and_a_file_in_less_than_fifty(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"ports": {"http": 1}, "services": [{"name": f"s{i}"} for i in range(50)]})
    )
    best = {}
    for name, argv in {"argv": ["-dev"], "file": ["-dev", f"-config-file={tmp_path}/a.json"]}.items():
        times = []
        for _ in range(5):
            started = time.perf_counter()
            load(argv)
            times.append(time.perf_counter() - started)
        best[name] = min(times)
    assert best["argv"] < 0.010
    assert best["file"] < 0.050


def test_reading_flags_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rostra.agent import config; config.load(['-dev'])\n"
        "heavy = {'aiohttp', 'cryptography', 'structlog', 'asyncio', 'json', 'argparse', 'rostra.agent.hcl'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    source = Path(rostra.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["-dev", "-serf-lan-port=0"], "-serf-lan-port"),
        (["-data-dir=/x", "-serf-lan-port=-1"], "-serf-lan-port"),
        (["-server", "-data-dir=/x", "-server-port=0"], "-server-port"),
        (["-dev", "-server-port=-1"], "-server-port"),
    ],
)
def test_a_port_that_others_have_to_know_is_a_fixed_one(argv: list[str], flag: str) -> None:
    with pytest.raises(ConfigErrors) as e:
        load([*argv, "-bind=127.0.0.1"])
    [problem] = e.value.problems
    assert str(problem).startswith(f"{flag}: invalid port ")
    assert "other nodes have to know it" in str(problem)


def test_ports_that_only_this_host_asks_for_may_be_any() -> None:
    config = load(["-dev", "-server-port=0", "-http-port=0", "-dns-port=0"])
    assert (config.server_port, config.http_port, config.dns_port) == (0, 0, 0)


# ── as Consul takes files ──


def test_every_key_of_consul_is_known() -> None:
    lines = (Path(__file__).parent / "consul_1_8_keys.txt").read_text().splitlines()
    other = {"service.proxy.expose.port"}  # a slip of Consul's: it reads it nowhere
    unknown = []
    for line in lines:
        block, _, words = line.partition(": ")
        for word in words.split() if not line.startswith("#") else ():
            path = word if block == "-" else f"{block}.{word}"
            document: Any = None
            for key in reversed(path.split(".")):
                document = {key: document}
            loading = Loading()
            loading.read_text("f", json.dumps(document), "json")
            if path not in other:
                unknown += [p for p in map(str, loading.problems) if "unknown configuration key" in p]
    assert unknown == []
    assert len(lines) > 30


@pytest.mark.parametrize(
    "text",
    [
        "acl_enforce_version_8 = false",
        'acl_disabled_ttl = "1s"',
        "cache { entry_fetch_rate = 3 entry_fetch_max_burst = 2 }",
        "ports { proxy_min_port = 20000 proxy_max_port = 20255 }",
        'consul { raft { election_timeout = "1s" } }',
    ],
)
def test_a_key_of_older_files_is_taken_with_a_warning(text: str) -> None:
    (warning,) = from_hcl(text).warnings
    assert text.split()[0] in warning


def test_null_is_not_set_at_every_depth_and_empty_in_lists_and_maps_of_strings(write: Any) -> None:
    write(
        "null.json",
        """{"node_name": null, "ports": {"http": null}, "dns_config": null, "retry_join": [null, "10.0.0.1"],
        "node_meta": {"a": null}, "checks": null, "services": [null, {"name": "b"}], "tls": null,
        "service": {"name": "a", "tags": [null, "t"], "meta": {"k": null}, "port": null, "weights": null,
          "tagged_addresses": {"lan": null}, "connect": {"sidecar_service": null}, "checks": [null],
          "check": {"ttl": "1s", "header": {"H": null}, "status": null}}}""",
    )
    c = load([*BASE, "-config-file=null.json"])
    assert (c.node_name, c.http_port, c.retry_join, c.node_meta) == ("n1", 8500, ("10.0.0.1",), {"a": ""})
    assert c.warnings == ()
    assert c.services[1].value == {
        "name": "a",
        "tags": ["", "t"],
        "meta": {"k": ""},
        "tagged_addresses": {"lan": {}},
        "connect": {},
        "checks": [],
        "check": {"ttl": "1s", "header": {"H": []}},
    }


def test_a_whole_number_may_be_written_as_a_float_and_no_other_type_stands_for_another(write: Any) -> None:
    write("f.json", '{"ports": {"http": 8501.0}, "service": {"name": "a", "port": 1e2, "weights": {"passing": 2.0}}}')
    c = load([*BASE, "-config-file=f.json"])
    assert (c.http_port, c.services[0].value["port"]) == (8501, 100)
    assert type(c.http_port) is int
    for wrong in (
        '{"ports": {"http": "8501"}}',
        '{"ports": {"http": 8501.5}}',
        '{"server": "true"}',
        '{"server": 1}',
        '{"node_name": 5}',
        '{"node_name": true}',
        '{"retry_join": "a"}',
        '{"service": {"name": "a", "tags": "t"}}',
        '{"service": {"name": "a", "meta": {"k": 5}}}',
        '{"service": {"name": "a", "check": {"ttl": 10}}}',
        '{"retry_interval": 30}',
    ):
        write("w.json", wrong)
        (problem,) = problems(*BASE, "-config-file=w.json")
        assert "must be" in problem


def test_an_empty_file_sets_nothing_whatever_its_name(write: Any) -> None:
    for name in ("d/empty.json", "d/empty.hcl"):
        write(name, "")
    write("d/z.json", '{"datacenter": "dc7"}')
    assert load([*BASE, "-config-dir=d", "-config-file=d/empty.json"]).datacenter == "dc7"


def test_bootstrap_and_a_cluster_of_one_say_the_same() -> None:
    assert from_hcl("server = true bootstrap = true bootstrap_expect = 1").bootstrap
    assert "mutually exclusive" in hcl_problems("server = true bootstrap = true bootstrap_expect = 2")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('service { name = "a" weights { passing = 0 } }', "Passing must be greater than 0"),
        ('service { name = "a" weights { passing = 1 warning = -1 } }', "Warning must be greater or equal than 0"),
        ('service { name = "a" kind = "connect-proxy" port = 1 proxy {} }', "DestinationServiceName must be non-empty"),
        (
            'service { name = "a" kind = "connect-proxy" proxy { destination_service_name = "b" } }',
            "Port must be set for a Connect proxy",
        ),
        ('service { name = "a" connect { sidecar_service { id = "x" } } }', "cannot specify an ID"),
        (
            'service { name = "a" connect { sidecar_service { connect { sidecar_service {} } } } }',
            "cannot have a nested SidecarService",
        ),
        ('service { name = "a" meta { "a b" = "x" } }', "Key contains invalid characters"),
        ('service { name = "a" meta { "consul-x" = "x" } }', "reserved for internal use"),
        ('service { name = "a" meta { "k" = "' + "v" * 513 + '" } }', "Value is too long"),
        ('service { name = "a" meta { ' + " ".join(f'k{i} = "v"' for i in range(65)) + " } }", "more than 64"),
        ('service { name = "a" port = 70000 }', "70000 is not between 0 and 65535"),
        ('service { name = "a" address = "0.0.0.0" }', "Invalid service address"),
        ('service { name = "a" check { http = "http://x" } }', "Interval must be > 0"),
        ('service { name = "a" check { args = ["x"] interval = "10s" } }', "Scripts are disabled on this agent"),
        ('check { name = "c" ttl = "0s" }', "TTL must be > 0"),
        ('service { name = "a" check { ttl = "0s" } }', "TTL must be > 0"),
        ('check { name = "c" service_id = "nope" ttl = "10s" }', 'ServiceID "nope" does not exist'),
    ],
)
def test_a_definition_is_refused_with_its_place_before_anything_starts(text: str, said: str) -> None:
    (problem,) = hcl_problems(text)
    assert problem.startswith("-hcl:1:1: ")
    assert said in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dns_config { udp_answer_limit = -1 }", "dns_config.udp_answer_limit: cannot be -1"),
        ("dns_config { a_record_limit = -1 }", "dns_config.a_record_limit: cannot be -1"),
        ("dns_config { soa { refresh = -1 } }", "dns_config.soa.refresh: cannot be -1"),
        ('recursors = ["::"]', "cannot be 0.0.0.0, :: or [::]"),
        ('recursors = ["[::]:53"]', "cannot be 0.0.0.0, :: or [::]"),
        ('recursors = ["0.0.0.0:53"]', "cannot be 0.0.0.0, :: or [::]"),
        ('node_meta { "consul-x" = "y" }', "reserved for internal use"),
    ],
)
def test_a_setting_that_nothing_could_work_with_is_refused(text: str, said: str) -> None:
    (problem,) = hcl_problems(text)
    assert said in problem


def test_a_check_may_belong_to_a_service_of_another_file_to_a_sidecar_or_to_one_that_was_registered_before(
    write: Any, tmp_path: Path
) -> None:
    service = 'service { name = "web" port = 1 connect { sidecar_service {} } }'
    assert len(from_hcl(f'{service} check {{ name = "c" service_id = "web" ttl = "1s" }}').checks) == 1
    assert len(from_hcl(f'{service} check {{ id = "c" service_id = "web-sidecar-proxy" ttl = "1s" }}').checks) == 1
    kept = tmp_path / "data" / "services" / f"{hashlib.sha256(b'old').hexdigest()}.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    text = 'check { name = "c" service_id = "old" ttl = "1s" }'
    assert len(load([*BASE, f"-data-dir={tmp_path / 'data'}", f"-hcl={text}"]).checks) == 1


def test_script_checks_of_files_are_taken_where_they_are_allowed() -> None:
    text = 'service { name = "a" check { script_args = ["x"] interval = "10s" } }'
    for key in ("enable_script_checks", "enable_local_script_checks"):
        assert len(from_hcl(f"{key} = true {text}").services) == 1


# ── the page ──

DOCS = Path(__file__).parents[3] / "docs" / "configuration.md"


def rows_of_the_page() -> list[tuple[list[str], list[str], list[str]]]:
    """Keys, flags and defaults of each row; a dash, or prose, is no key and no flag."""
    rows = []
    for line in DOCS.read_text().split("## Accepted without effect")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0] not in ("key", "---"):
            keys, flags = (re.findall(r"`-?([^`=]+)[^`]*`", cell) for cell in cells[:2])
            rows.append((keys, flags, [part.strip("`") for part in re.split(r",\s*", cells[2])]))
    return rows


def test_the_page_on_configuration_has_every_key_and_flag_and_no_other() -> None:
    keys = [key for row in rows_of_the_page() for key in row[0]]
    flags = [flag for row in rows_of_the_page() for flag in row[1]]
    known = {key: s for s in config.SETTINGS.values() for key in s.keys}
    assert len(keys) == len(set(keys))
    assert set(keys) - set(known) == {"service", "services", "check", "checks"}
    assert [name for name, s in config.SETTINGS.items() if s.keys and s.keys[0] not in keys] == []
    assert set(flags) == {s.flag for s in config.SETTINGS.values() if s.flag} | {"read-replica"}


def test_the_page_on_configuration_says_the_defaults() -> None:
    of_key = {key: name for name, s in config.SETTINGS.items() for key in s.keys}
    wrong = []
    for keys, flags, defaults in rows_of_the_page():
        names = list(dict.fromkeys(of_key[key] for key in keys if key in of_key))
        for name, said in zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=False):
            default, kind = DEFAULTS[name], config.SETTINGS[name].kind
            with contextlib.suppress(TypeError, ValueError):
                if kind.parse(said) == default:
                    continue
            if default:  # nothing, or what is chosen at the start, is told in words
                wrong.append(f"{keys} {flags}: {name} is {default!r}, not {said}")
    assert wrong == []
