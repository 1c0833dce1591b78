# On a machine with only Python: `make quickstart` or `make test` alone sets everything up in .venv first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: install quickstart test lint format docs

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

quickstart: install
	$(RUN)/decant quickstart --out runs/quickstart

# A process a core, each with one thread: two of them would wait for each other. The order is
# conftest.py's: what takes long comes first, so that both end together.
test: install
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(RUN)/ruff format --check src tests examples
	$(RUN)/ruff check src tests examples
	$(RUN)/mypy
	$(RUN)/lint-imports

format: install
	$(RUN)/ruff format src tests examples
	$(RUN)/ruff check --fix src tests examples

docs: install
	$(RUN)/python examples/reference.py
