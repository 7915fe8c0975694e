#!/usr/bin/env python3
"""The data plane alone: application → client proxy → mTLS → server proxy → application, from static snapshots.

    bench/proxy.py [--dur 3] [--runs 1] [--only bulk,c64,c1,new] [--profile DIR]

Starts nginx and iperf3 as applications and three proxies (one for callers, one in front of each application), then
wrk and iperf3 through them, at most 3 s each. Prints one line per measure and the proxies' memory and CPU. With
--profile, py-spy records the two busy proxies while each measure runs. Only processes started here are stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from mesh_certs import MeshCA, service_uri  # noqa: E402

BODY = "0123456789" * 10
TICK = os.sysconf("SC_CLK_TCK")
STARTED: list[subprocess.Popen[bytes]] = []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def start(*argv: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
    STARTED.append(process)
    return process


def stop_all() -> None:
    for process in reversed(STARTED):
        process.send_signal(signal.SIGTERM)
    for process in STARTED:
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_port(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nothing listens on {port}")


def rss_mb(pid: int) -> float:
    return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6, 1)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def snapshot(
    ca: MeshCA, service: str, public: int, local: int, upstreams: list[tuple[str, int, int]]
) -> dict[str, object]:
    leaf = ca.leaf(service)
    return {
        "ProxyID": f"{service}-sidecar-proxy",
        "Service": service,
        "TrustDomain": ca.trust_domain,
        "Datacenter": "dc1",
        "Public": {"Address": "127.0.0.1", "Port": public},
        "Local": {"Address": "127.0.0.1", "Port": local},
        "Leaf": {"CertPEM": leaf.cert_pem, "KeyPEM": leaf.key_pem, "SerialNumber": leaf.serial},
        "Roots": [ca.cert_pem],
        "DefaultAllow": True,
        "Intentions": [],
        "Upstreams": [
            {
                "Name": name,
                "BindAddress": "127.0.0.1",
                "BindPort": bind,
                "Datacenter": "dc1",
                "Identity": service_uri(name, ca.trust_domain),
                "Endpoints": [{"Address": "127.0.0.1", "Port": port, "Weight": 1}],
            }
            for name, bind, port in upstreams
        ],
    }


def wrk(port: int, connections: int, seconds: int, *, close: bool = False) -> dict[str, float]:
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "10s"]
    argv += ["-H", "Connection: close"] if close else []
    out = subprocess.run(
        [*argv, f"http://127.0.0.1:{port}/"], capture_output=True, timeout=seconds + 30
    ).stdout.decode()
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])  # type: ignore[index]
    p99 = re.search(r"99%\s+(\S+)", out)[1]  # type: ignore[index]
    errors = re.search(r"Socket errors: (.*)", out)
    return {"value": rate, "p99": p99, "errors": errors[1] if errors else ""}


def iperf(port: int, streams: int, seconds: int) -> dict[str, float]:
    argv = ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-t", str(seconds), "-P", str(streams), "-J"]
    out = json.loads(subprocess.run(argv, capture_output=True, timeout=seconds + 30).stdout)
    if "error" in out:
        return {"value": 0.0, "errors": out["error"]}
    return {"value": round(out["end"]["sum_received"]["bits_per_second"] / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dur", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", default="c1,c64,new,bulk1,bulk4")
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        try:
            measure(Path(directory), arguments)
        finally:
            stop_all()


def measure(state: Path, arguments: argparse.Namespace) -> None:
    app_http, app_tcp, web, bulk, entry_web, entry_bulk, callers = (free_port() for _ in range(7))
    conf = state / "nginx.conf"
    temp = "".join(f"{n}_temp_path {state}/{n};" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    conf.write_text(
        f"daemon off; worker_processes 1; error_log {state}/nginx.err; pid {state}/nginx.pid;\n"
        "events { worker_connections 8192; }\n"
        f"http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 300s; {temp}\n"
        f'server {{ listen 127.0.0.1:{app_http} backlog=4096; location / {{ return 200 "{BODY}"; }} }} }}\n'
    )
    start("nginx", "-c", str(conf), "-p", str(state), log=state / "nginx.log")
    start("iperf3", "-s", "-B", "127.0.0.1", "-p", str(app_tcp), log=state / "iperf.log")
    ca = MeshCA()
    pids = {}
    for name, snap in (
        ("server-web", snapshot(ca, "web", web, app_http, [])),
        ("server-bulk", snapshot(ca, "bulk", bulk, app_tcp, [])),
        ("client", snapshot(ca, "caller", callers, 9, [("web", entry_web, web), ("bulk", entry_bulk, bulk)])),
    ):
        path = state / f"{name}.json"
        path.write_text(json.dumps(snap))
        process = start(
            sys.executable, "-P", "-m", "rostra.connect_proxy", f"-snapshot={path}", "-log-level=warn",
            log=state / f"{name}.log",
        )  # fmt: skip
        pids[name] = process.pid
    for port in (app_http, app_tcp, web, bulk, entry_web, entry_bulk):
        wait_port(port)
    print("rss MB at start", {n: rss_mb(p) for n, p in pids.items()})
    dur = arguments.dur
    measures: dict[str, tuple[str, Callable[[], dict[str, float]], str]] = {
        "c1": ("req/s", lambda: wrk(entry_web, 1, dur), "server-web"),
        "c64": ("req/s", lambda: wrk(entry_web, 64, dur), "server-web"),
        "new": ("conn/s", lambda: wrk(entry_web, 16, dur, close=True), "server-web"),
        "bulk1": ("Gbit/s", lambda: iperf(entry_bulk, 1, dur), "server-bulk"),
        "bulk4": ("Gbit/s", lambda: iperf(entry_bulk, 4, dur), "server-bulk"),
    }
    for name in arguments.only.split(","):
        unit, run, server = measures[name]
        values, detail = [], {}
        before = {n: cpu_s(p) for n, p in pids.items()}
        spies = []
        if arguments.profile:
            arguments.profile.mkdir(parents=True, exist_ok=True)
            for label in ("client", server):
                spies.append(
                    subprocess.Popen(
                        ["py-spy", "record", "-p", str(pids[label]), "-d", str(dur), "-r", "500", "-f", "raw",
                         "-o", str(arguments.profile / f"{name}-{label}.txt")],
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    )
                )  # fmt: skip
        for _ in range(arguments.runs):
            detail = run()
            values.append(detail["value"])
        for spy in spies:
            spy.wait(30)
        cpu = {n: round(cpu_s(p) - before[n], 2) for n, p in pids.items()}
        extra = {k: v for k, v in detail.items() if k != "value" and v}
        moved = sum(values) * dur / 8 if unit == "Gbit/s" else sum(values) * dur
        if moved:
            per = (
                f"{sum(cpu.values()) / moved:.3f} s/GB"
                if unit == "Gbit/s"
                else f"{sum(cpu.values()) / moved * 1e6:.1f} us"
            )
            extra["proxies' cpu"] = per if unit == "Gbit/s" else f"{per} each"
        print(f"{name:6} {statistics.median(values):>10.2f} {unit:7} cpu s {cpu} {extra}", flush=True)
    print("load", os.getloadavg())
    print("rss MB after", {n: rss_mb(p) for n, p in pids.items()})
    for name in pids:
        text = (state / f"{name}.log").read_text()
        if text:
            print(f"{name}:", text[:2000])


if __name__ == "__main__":
    main()
