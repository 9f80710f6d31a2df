PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/train.stamp  ## tag a few sounds, then teach a student on generated ones, from files to tags
	$(BIN)/ced tag -m esc10 resources/rooster.ogg
	$(BIN)/ced demo

test: .venv/dev.stamp  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

clean:  ## remove the environment and what `make demo` wrote
	rm -rf .venv demo build ced_audio.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

.venv/train.stamp: EXTRAS = train
.venv/dev.stamp: EXTRAS = train,hf,media,serve,dev
