# Few, plain verbs. `make demo` and `make test` are the README's two commands; both start from nothing but Python and make.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test unit attack fuzz-http sim torture mutants check bench venv clean

demo: venv  ## the whole product on this machine, step by step, each step verified
	@$(VENV)/bin/python -P deploy/local/demo.py

test: venv  ## every test that this machine can run
	@$(VENV)/bin/pytest -q -n 4 --dist loadfile

unit: venv  ## the tests of single parts, within a minute
	@$(VENV)/bin/pytest -q -n 4 --dist loadfile tests/unit

attack: venv  ## every attack of tests/attack, the long forms too; about ten minutes
	@$(VENV)/bin/pytest -q -m "long or not long" tests/attack

fuzz-http: venv  ## N=20000 requests in every odd but lawful form, on asyncio and on uvloop; SEED=
	@$(VENV)/bin/python -m tests.fuzz.http -n $(or $(N),20000) $(if $(SEED),--seed $(SEED))

torture: venv  ## real processes, MINUTES=10 of kill -9, stops, partitions, torn tails, full and slow disks; SEED=, SERVERS=3,5
	@$(VENV)/bin/python -m tests.torture --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(if $(SERVERS),--servers $(SERVERS))

mutants: venv  ## each rule of the Raft layer switched off in turn, in a copy: a test must notice; ONLY="H2 LEASE"
	@$(VENV)/bin/python -m tests.mutants.run $(ONLY)

check: venv  ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

sim: venv  ## simulated clusters: SEEDS=n of them, from SEED on; SEED=x alone replays one with a trace
	@$(VENV)/bin/python -m tests.sim.run $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SEED),--seed $(SEED))

bench: venv  ## the harness against Rostra and the real Consul, side by side (needs ROSTRA_SHARED)
	@bash bench/side_by_side.sh

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
