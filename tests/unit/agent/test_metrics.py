from __future__ import annotations

from datetime import UTC, datetime

from rostra.agent.metrics import Metrics


def test_counters_gauges_and_samples_have_consul_s_json_form():
    metrics = Metrics()
    metrics.count("http.hot", 3)
    metrics.count("http.hot")
    metrics.gauge("cache.bytes", lambda: 7)
    metrics.observe("api.http", 2.0, {"method": "GET"})
    metrics.observe("api.http", 4.0, {"method": "GET"})
    out = metrics.to_json(datetime(2026, 11, 22, 18, 0, tzinfo=UTC))
    assert out["Timestamp"] == "2026-11-22 18:00:00 +0000 UTC"
    assert out["Gauges"] == [{"Name": "consul.cache.bytes", "Value": 7, "Labels": {}}]
    assert (out["Counters"][0]["Name"], out["Counters"][0]["Count"], out["Counters"][0]["Sum"]) == (
        "consul.http.hot",
        4,
        4,
    )
    (sample,) = out["Samples"]
    assert sample["Labels"] == {"method": "GET"}
    assert (sample["Count"], sample["Sum"], sample["Min"], sample["Max"], sample["Mean"]) == (2, 6.0, 2.0, 4.0, 3.0)
    assert round(sample["Stddev"], 3) == 1.414


def test_prometheus_text_has_one_family_per_name_and_cumulative_buckets():
    metrics = Metrics()
    metrics.count("rpc.request")
    metrics.gauge("autopilot.healthy", 1)
    metrics.observe("api.http", 0.7, {"path": 'a"b\\c\n'})
    metrics.observe("api.http", 99999.0, {"path": 'a"b\\c\n'})
    text = metrics.to_prometheus()
    lines = text.splitlines()
    assert "# TYPE consul_rpc_request counter" in lines
    assert "consul_rpc_request 1" in lines
    assert "consul_autopilot_healthy 1" in lines
    assert "# TYPE consul_api_http histogram" in lines
    label = r'path="a\"b\\c\n"'
    assert f'consul_api_http_bucket{{{label},le="1"}} 1' in lines
    assert f'consul_api_http_bucket{{{label},le="+Inf"}} 2' in lines
    assert f"consul_api_http_count{{{label}}} 2" in lines
    assert text.endswith("\n")


def test_a_broken_gauge_hides_no_other():
    metrics = Metrics()
    metrics.gauge("broken", lambda: 1 / 0)
    metrics.gauge("whole", 2)
    assert [g["Name"] for g in metrics.to_json()["Gauges"]] == ["consul.whole"]
