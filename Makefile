# Every target works on a fresh machine with Python 3.11+, make and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8000
MODEL  ?=

.PHONY: setup serve test lint bench mutants clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'torch>=2.11,<2.14'
	$(BIN)/pip install --quiet -e '.[test,bench]'
	touch $@

serve: setup
	@exec $(BIN)/layerskip serve $(MODEL) --port $(PORT)

test: setup
	$(BIN)/pytest -q -m 'not gpu'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.decode

mutants: setup
	$(BIN)/python -m tests.mutants

clean:
	rm -rf $(VENV)
