#!/usr/bin/env bash
# The harness against Rostra and the real Consul in one run, then the proxies against Envoy: a figure means something
# only beside the peer's of the same hour. ROSTRA_SHARED names the folder with bench/ and peers/; RUNS and DUR scale it.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${ROSTRA_SHARED:?set ROSTRA_SHARED to the folder that holds bench/ and peers/}"
runs=${RUNS:-2} dur=${DUR:-3} out=${OUT:-bench/out}
mkdir -p "$out"
out=$(cd "$out" && pwd)  # mesh.py runs in its own folder
sh "$ROSTRA_SHARED/peers/unpack.sh" .peers >/dev/null
PATH=$PWD/.venv/bin:$PATH
export PATH CONSUL_BIN=$PWD/.peers/usr/bin/consul ROSTRA_BIN=$PWD/.venv/bin/rostra ENVOY_BIN=$PWD/.venv/bin/envoy
BENCH_STATE=$(mktemp -d)  # must be on a real disk: fsync counts
export BENCH_STATE
trap 'rm -rf "$BENCH_STATE"' EXIT
rm -f "$out"/*.jsonl
for target in rostra consul; do
    "$ROSTRA_SHARED/bench/bench.py" --target "$ROSTRA_SHARED/bench/targets/$target.sh" --runs "$runs" --dur "$dur" \
        --out "$out/$target.jsonl" failover kv-put kv-get health watch dns idle
done
(cd "$ROSTRA_SHARED/bench" && ./mesh.py --runs "$runs" --dur "$dur" --state "$BENCH_STATE" --out "$out/mesh.jsonl" \
    mesh_targets/rostra.sh mesh_targets/consul.sh "mesh_targets/envoy.sh l4 1")
"$ROSTRA_SHARED/bench/report.py" "$out"/*.jsonl | tee "$out/report.md"
