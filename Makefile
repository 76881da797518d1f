# Every target works on a fresh machine with Python 3.11+, make and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   :=
MODEL  :=

.PHONY: setup serve test exhaustive lint bench mutants clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing what pyproject.toml names into $(VENV); torch is large.'
	$(BIN)/pip install --quiet -e '.[test,bench,train]'
	touch $@

# Converted once, into the user's cache.
KNOWN_MODELS := smollm2

serve: setup
	@model=$(if $(filter $(KNOWN_MODELS),$(MODEL)),$$($(BIN)/layerskip convert $(MODEL)),'$(MODEL)') && \
	exec $(BIN)/layerskip serve $${model:+"$$model"} $(if $(PORT),--port $(PORT))

test: setup
	$(BIN)/pytest -q -m 'not gpu and not exhaustive'

exhaustive: setup
	$(BIN)/pytest -q -m exhaustive

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Some five minutes; JSON and a plot come to lie beside the results that are kept, under today's date.
RESULTS := benchmarks/results
TODAY   := $(shell date +%F)

bench: setup
	$(BIN)/layerskip bench --out $(RESULTS)/decode-here-$(TODAY).json
	$(BIN)/python -m benchmarks.serve --rounds 1 --concurrency 1 8 --rates 4 --out $(RESULTS)/serve-here-$(TODAY)

mutants: setup
	$(BIN)/python -m tests.mutants

clean:
	rm -rf $(VENV)
