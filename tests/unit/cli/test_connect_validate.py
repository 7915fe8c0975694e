"""`rostra connect ca` and `rostra validate`."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_the_ca_configuration_is_printed_with_tabs(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/connect/ca/configuration", {"Provider": "consul", "Config": {"LeafCertTTL": "72h"}})
    assert rostra_cli("connect", "ca", "get-config").out == (
        '{\n\t"Provider": "consul",\n\t"Config": {\n\t\t"LeafCertTTL": "72h"\n\t}\n}\n'
    )


@pytest.mark.parametrize(
    ("words", "module", "function"),
    [
        (["agent"], "rostra.agent.run", "main"),
        (["server"], "rostra.agent.run", "main_server"),
        (["connect", "proxy"], "rostra.connect_proxy.run", "main"),
    ],
)
def test_programs_get_their_flags_untouched_and_give_the_exit_status(
    rostra_cli: Any, monkeypatch: pytest.MonkeyPatch, words: Any, module: str, function: str
) -> None:
    seen: list[list[str]] = []

    def program(argv: list[str]) -> int:
        seen.append(argv)
        return 70

    stand_in = ModuleType(module)
    setattr(stand_in, function, program)
    monkeypatch.setitem(sys.modules, module, stand_in)
    package = importlib.import_module(module.rpartition(".")[0])
    monkeypatch.setattr(package, "run", stand_in, raising=False)
    assert rostra_cli(*words, "-node=x", "-hcl", "ports { dns = 53 }").status == 70
    assert seen == [["-node=x", "-hcl", "ports { dns = 53 }"]]


def test_validate_accepts_and_warns(rostra_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "a.hcl").write_text(
        'data_dir = "/nonexistent/d" bind_addr = "127.0.0.1" node_name = "n" raft_protocol = 3'
    )
    done = rostra_cli("validate", f"{tmp_path}")
    assert (done.status, done.out) == (0, "Configuration is valid!\n")
    assert done.err == "accepted because Consul knows them, without effect here: raft_protocol\n"
    assert rostra_cli("validate", "-quiet", f"{tmp_path}/a.hcl").out == ""


def test_validate_tells_one_problem_in_one_line_and_several_in_several(
    rostra_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.hcl").write_text('data_dir = "/nonexistent/d"\nbind_addr = "127.0.0.1"\nservr = true\n')
    assert rostra_cli("validate", "a.hcl") == (
        1, "", 'Config validation failed: a.hcl:3:1: servr: unknown configuration key; did you mean "server"?\n',
    )  # fmt: skip
    (tmp_path / "b.json").write_text('{"ports": {"http": "80"}}')
    assert rostra_cli("validate", "a.hcl", "b.json").err.splitlines() == [
        'a.hcl:3:1: servr: unknown configuration key; did you mean "server"?',
        "b.json:1:12: ports.http: must be a port number, not a string",
    ]
    assert rostra_cli("validate").err == "Must specify at least one config file or directory\n"
    assert "No such file or directory" in rostra_cli("validate", "gone.hcl").err


def test_the_help_of_the_proxy_names_all_its_flags(rostra_cli: Any) -> None:
    done = rostra_cli("connect", "proxy", "-h")
    assert done.status == 0
    for flag in ("sidecar-for", "proxy-id", "service", "upstream", "listen", "service-addr", "http-addr", "token"):
        assert f"  -{flag}=" in done.out
