# make demo   set up .venv, train classifiers and generators on handwritten digits, compare them (six to eight minutes)
# make check  set up .venv, check style and types, run the tests that start no process (90 seconds on two cores)
# make test   the same with every test (minutes)

PYTHON ?= python3
BIN := .venv/bin
WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) # one more than cores: tests also wait

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

# Made anew when a requirement changes.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; try make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[research,dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
