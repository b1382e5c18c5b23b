# ROSE. `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= trainer,local,graders
# Test processes side by side. More than the cores: most tests wait for a process or a lease most of the time.
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart up test-models test test-clients test-fast lint types layers format check docs bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"ROSE needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

setup: $(VENV)/.installed ## Make the environment .venv with everything that running ROSE needs

setup-dev: $(VENV)/.installed-dev ## The same, with what the tests and checks need

quickstart: setup ## Fine-tune a small model from upload to chat, and compare
	$(BIN)/rose quickstart

up: setup ## Start ROSE on this machine
	$(BIN)/rose up

test-models: setup-dev ## Fetch the tokenizers and templates of real models that the tests read (once, 330 MB)
	$(BIN)/python -m tests.real_templates.fetch

test: test-models ## Run all tests: real Postgres, NATS and torch, started by the tests
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-clients: setup-dev ## Run the test suites of OpenAI's own clients against a running ROSE (fetches them once)
	ROSE_TEST_CLIENTS=all $(BIN)/pytest tests/clients -s

test-fast: setup-dev ## Run the tests that need no service
	$(BIN)/pytest tests/unit

lint: setup-dev ## Look for mistakes and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev ## Check the types
	$(BIN)/pyright

layers: setup-dev ## Check which part may import which
	$(BIN)/lint-imports

format: setup-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types layers test ## Everything that CI runs

docs: setup-dev ## Write docs/openapi.json, docs/asyncapi.json and the table of subjects from the code
	$(BIN)/python -m rose.api.describe > docs/openapi.json
	$(BIN)/rose events asyncapi > docs/asyncapi.json
	$(BIN)/python -m rose.asyncapi docs/subjects.md

bench: setup-dev ## Measure, and record in docs/benchmarks.md
	$(BIN)/python -m benchmarks

clean: ## Remove the environment and caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
