# `make demo` and `make test` need Python 3.11; both make the environment first. With a C compiler, kernels of our own are compiled.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env demo test lint format bench clean

env: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard shared_runtime/kernels/*/*.[ch])
	$(PYTHON) scripts/make_env.py $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,optimize,postgres,s3,dev]'
	touch $(STAMP)

demo: env
	$(BIN)/triscope demo

test: env
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(PYTEST)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage
