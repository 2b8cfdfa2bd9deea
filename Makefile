# All targets create .venv on first use.
# make demo   train and compare classifiers and generators on handwritten digits (six to eight minutes)
# make check  style, types, and the tests that start no process (two minutes on two cores)
# make test   the same with all tests (minutes)

PYTHON ?= python3
BIN := .venv/bin
WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) # cores + 1, since tests also wait

.PHONY: demo check test style clean

demo: .venv/ready
	$(BIN)/python scripts/demo.py

check: style
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not process and not slow'

test: style
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

style: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rebuilt when a requirement changes.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is required; try make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[research,dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
