# Plain venv and pip. Every target makes .venv first; nothing but the package index is needed.
PYTHON ?= python3
VENV := .venv
PEER := .venv-adapterhub
BIN := $(VENV)/bin
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export GRAFTWORK_DATA ?= $(abspath ../shared/data)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo compose test test-adapterhub test-quantised slow systems check anatomy clean

# torch first and pinned: any other build would bring gigabytes of CUDA
$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

demo: $(VENV)/installed-demo          ## the main job on a real backbone and real text, under 8 minutes on 2 cores
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python examples/demo.py

compose: $(VENV)/installed-demo       ## several adapters at once, arithmetic and fusion, on SST-2 and Subj
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python examples/compose.py

test: $(VENV)/installed-test          ## all tests but the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

# AdapterHub's library needs an older transformers, so it has an environment of its own
$(PEER)/installed: Makefile constraints.txt
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)" \
		adapters==1.3.0 "transformers~=4.57.0"
	touch $@

test-adapterhub: $(VENV)/installed-test $(PEER)/installed   ## AdapterHub's own library reads what graftwork writes, and makes the fixtures again
	$(BIN)/python tests/fixtures/adapterhub/export.py $(PEER)/written
	$(PEER)/bin/python tests/fixtures/adapterhub/check.py $(PEER)/written
	rm -rf $(PEER)/made && $(PEER)/bin/python tests/fixtures/adapterhub/make.py $(PEER)/made
	$(BIN)/python tests/fixtures/adapterhub/same.py $(PEER)/made

test-quantised: $(VENV)/installed-test $(VENV)/installed-quantised   ## adapters on a backbone held in 4 and 8 bits, with the libraries that quantise
	$(BIN)/python -m pytest tests/core/test_quantised.py

slow: $(VENV)/installed-test          ## the tests that take longer than a minute
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

systems: $(VENV)/installed-test       ## for every catalogue id: how many of its acceptance checks exist and pass
	$(BIN)/python -m pytest -n $(WORKERS) -m system --systems tests

check: $(VENV)/installed-check        ## lint, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/test_layout.py

anatomy: $(VENV)/installed-test       ## the share of transformers' model types whose roles are found
	$(BIN)/python benchmarks/anatomy.py --write docs/anatomy.md

clean:
	rm -rf $(VENV) $(PEER)
