# The two commands of the README are `make demo` and `make test`; both need only Python 3.11 and a
# package registry.  VENV=FOLDER uses another virtual environment than .venv.
VENV ?= .venv
PYTHON ?= python3
# Neighbours in one process: they share what was traced and made before.
PYTEST_ARGS ?= -n auto --dist worksteal

export MPLBACKEND := Agg
bin := $(VENV)/bin
users := $(VENV)/.thresher
developers := $(VENV)/.thresher-dev

.PHONY: demo test slow bench lint clean

demo: $(users)
	$(bin)/thresher demo -o build/demo

test: lint
	$(bin)/python -m pytest -m "not slow" $(PYTEST_ARGS)

slow: $(developers)
	$(bin)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(developers)
	$(bin)/ruff check .
	$(bin)/python tests/typecheck.py

bench: $(developers)
	$(bin)/python -m tests.benchmarks

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamps are newer than pyproject.toml exactly when what it asks for is installed.
$(developers): pyproject.toml constraints.txt | $(bin)/python
	$(bin)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(users)

$(users): pyproject.toml constraints.txt | $(bin)/python
	$(bin)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(bin)/python:
	$(PYTHON) -m venv $(VENV)
