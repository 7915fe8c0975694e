from __future__ import annotations

from rostra.agent.checks.alias import alias_result
from rostra.agent.checks.check import Thresholds, aggregate, cap_captured, cap_reported, expired_output
from rostra.server.state.rows import CheckRow


def row(check_id: str, status: str, service_id: str = "", output: str = "") -> CheckRow:
    return CheckRow("n", check_id, check_id, status, output=output, service_id=service_id)


def test_without_thresholds_each_result_counts() -> None:
    counted = Thresholds()
    assert [counted.observe(s) for s in ("passing", "critical", "warning")] == ["passing", "critical", "warning"]


def test_a_check_passes_only_after_enough_successes_in_a_row() -> None:
    counted = Thresholds(success_before_passing=3)
    results = ["passing", "passing", "critical", "passing", "passing", "passing"]
    assert [counted.observe(s) for s in results] == [None, None, "critical", None, None, "passing"]


def test_failures_are_a_warning_first_and_critical_later() -> None:
    counted = Thresholds(failures_before_warning=2, failures_before_critical=3)
    assert [counted.observe("critical") for _ in range(4)] == [None, "warning", "critical", "critical"]


def test_an_expired_ttl_shows_what_was_said_last() -> None:
    assert expired_output("good") == "TTL expired (last output before timeout follows): good"
    assert expired_output("") == "TTL expired"


def test_long_output_is_cut_and_says_so() -> None:
    assert cap_reported("ab", 4096) == "ab"
    assert cap_reported("a" * 10, 4) == "aaaa ... (captured 4 of 10 bytes)"
    assert cap_captured(b"tail", 10) == "Captured 4 of 10 bytes\n...\ntail"


def test_the_worst_check_is_the_status_and_maintenance_is_above_all() -> None:
    assert aggregate([]) == "passing"
    assert aggregate([row("a", "passing"), row("b", "warning")]) == "warning"
    assert aggregate([row("a", "critical"), row("b", "warning")]) == "critical"
    assert aggregate([row("a", "critical"), row("_service_maintenance:x", "critical")]) == "maintenance"
    assert aggregate([row("_node_maintenance", "critical")]) == "maintenance"


def test_an_alias_is_the_worst_of_its_service_and_the_node() -> None:
    checks = [row("a", "passing", "s"), row("b", "critical", "other")]
    assert alias_result("n", "s", checks, service_exists=True) == ("passing", "All checks passing.")
    checks.append(row("disk", "warning", output="full"))
    assert alias_result("n", "s", checks, service_exists=True) == ("warning", 'Aliased check "disk" failing: full')
    checks.append(row("c", "critical", "s", "down"))
    assert alias_result("n", "s", checks, service_exists=True) == ("critical", 'Aliased check "c" failing: down')


def test_an_alias_of_a_service_that_is_not_there_is_critical() -> None:
    assert alias_result("n", "s", [], service_exists=True) == ("passing", "No checks found.")
    assert alias_result("n", "s", [], service_exists=False) == ("critical", "Service s could not be found on node n")
