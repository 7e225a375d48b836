# Every target sets up .venv if it is not there. PYTHON picks the interpreter, ARGS goes to train.py.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install train test lint bench clean

install: $(STAMP)

# torch comes first, by its exact version: asked for by a range, an index may serve a build many times the size.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: $(STAMP)
	$(BIN)/python train.py $(ARGS)

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pytest benchmarks --benchmark-json results.json

clean:
	rm -rf .venv output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
