# `make run` and `make test` need Python 3.11 or later and make; each sets up what it needs in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help run test test-slow test-long test-stores test-bounds test-all check format bench bench-quick autobahn fuzz soak clean

help:
	@echo "make run [PORT=8000] [ARGS=...]  serve      make test [ARGS='-k health']  run the tests"
	@echo "make test-all                  also what takes minutes: faults, chaos, other programs, and each store"
	@echo "make check                     lint, types  make bench, make bench-quick  measure beside the peers"
	@echo "make fuzz                      feed it made-up input for FUZZ_SECONDS (300), and CONTRACT_SECONDS (120)"
	@echo "make soak                      2,000 clients for SOAK_SECONDS (600)"

run: $(VENV)/run
	@exec $(BIN)/python notifyd.py $(if $(PORT),--port $(PORT)) $(ARGS)

# Hundreds of short processes import the same modules: keep them compiled, whatever the machine does by default.
test test-slow test-long test-stores: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/dev
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

# What takes many processes, many seconds or other programs: faults, chaos, workers, Redis, nginx, browsers, bench.
test-slow: $(VENV)/dev
	@$(BIN)/python -m pytest -m "slow and not long" $(ARGS)

# More failovers of Redis, with 500 clients on four processes. Each has nine processes and a machine's attention.
test-long: $(VENV)/dev
	@$(BIN)/python -m pytest -n 1 -m long $(ARGS)

test-all: test test-slow test-long test-stores test-bounds

# What clients and publishers see, again for each store, and with several processes.
API := $(addprefix tests/test_,$(addsuffix .py,batch drain events health heartbeat history hostile http_errors \
	wire_http limits metrics notify origin plain_text publish_once rates resume scale status targets ws_messages))
test-stores: $(VENV)/dev
	@$(BIN)/python -m pytest --server-args='--workers 2 --store-timeout 10' $(API) $(ARGS)
	@$(BIN)/python -m pytest --store sqlite $(API) $(ARGS)
	@$(BIN)/python -m pytest --store redis $(API) $(ARGS)
	@$(BIN)/python -m pytest --store sentinel $(addprefix tests/test_,batch.py health.py publish_once.py resume.py) $(ARGS)

# The servers of some tests, with both ends of the ranges in pyproject.toml.
test-bounds: export PYTHONDONTWRITEBYTECODE :=
test-bounds: $(VENV)/dev
	@$(BIN)/python tests/bounds.py $(ARGS)

check: $(VENV)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tests/audit.py

format: $(VENV)/dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/dev
	@$(BIN)/python bench/run.py $(ARGS)

bench-quick: $(VENV)/dev
	@$(BIN)/python bench/run.py --quick $(ARGS)

# The frames' oracle; needs an interpreter of Python 2.7, and says so where there is none.
autobahn: $(VENV)/dev
	@$(BIN)/python tests/autobahn/run.py $(ARGS)

FUZZ_SECONDS ?= 300
CONTRACT_SECONDS ?= 120
fuzz: $(VENV)/fuzz
	@$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS) $(ARGS)
	@$(BIN)/python tests/fuzz/contract.py --seconds $(CONTRACT_SECONDS)

SOAK_SECONDS ?= 600
soak: $(VENV)/dev
	@$(BIN)/python tests/soak/run.py --seconds $(SOAK_SECONDS) $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A Python without ensurepip leaves an environment without pip. It is removed, or completed if it is an older one.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "notifyd needs Python 3.11 or later; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamps make the second run quick: pip is asked again only when the requirements change.
$(VENV)/run: requirements.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt requirements.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/run

$(VENV)/fuzz: tests/fuzz/requirements.txt $(VENV)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/fuzz/requirements.txt || true
	@touch $@
