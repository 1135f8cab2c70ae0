# make (lint + test), lint, fix, demo, test, test-real, parity, fuzz, load, bench. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := all
.PHONY: all lint fix demo test test-real parity fuzz load bench

all: lint test

# One stamp per extra: an install runs again only when pyproject.toml has changed.
.venv/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

fix: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The main job on the embedded demo: a picture and a question go in, the answer and a picture with boxes come out.
demo: .venv/installed-cpu
	$(BIN)/siglance run -i tests/data/scene.png -p "describe"
	$(BIN)/siglance run -i tests/data/scene.png -p "detect all" --draw scene-boxes.png
	@echo "wrote scene-boxes.png"

# The fast suite in two processes; the tests of one file stay together, because they share bundles.
test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Downloads the real Gemma 3 270M (253 MB, Gemma terms of use) into .cache/ and compares with its golden tokens.
test-real: .venv/installed-parity
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m real

parity: .venv/installed-parity
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m parity

fuzz: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m fuzz

load: .venv/installed-dev
	$(BIN)/python -m pytest -q -m load

bench: .venv/installed-dev
	$(BIN)/python -m pytest -q benchmarks --benchmark-only
