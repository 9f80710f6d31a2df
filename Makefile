PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' -c constraints.txt

.PHONY: help demo test test-quick test-network test-ray docs dist coverage lock clean

help:  ## list these targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-14s %s\n", $$1, $$2}'

demo: .venv/train.stamp  ## tag a sound, then run the whole training on generated sounds
	$(BIN)/ced tag -m esc10 resources/rooster.ogg
	$(BIN)/ced demo

test: .venv/dev.stamp  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-quick: .venv/dev.stamp  ## only the tests that take less than a few seconds each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not network"

test-network: .venv/dev.stamp  ## download the published weights and compare them with published values
	$(BIN)/pytest -m network

test-ray: .venv/dev.stamp  ## tag on a local Ray cluster, whose nodes and workers are lost on the way (two minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m ray

docs: .venv/dev.stamp  ## build the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

dist: .venv/dev.stamp  ## build the source distribution and the wheel, in dist/
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w dist dist/*.tar.gz

coverage: .venv/dev.stamp  ## run the tests and report the coverage of each file
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --cov=ced --cov-report=term

lock: $(BIN)/uv  ## resolve all dependencies into locks/, with hashes; versions named in constraints.txt are kept
	$(COMPILE) --extra serve --extra media pyproject.toml -o locks/serve.txt
	$(COMPILE) --extra train --extra hf --extra media --extra mqtt --extra ray --extra serve --extra dev --extra docs \
		--no-emit-package torch pyproject.toml -o locks/dev.txt
	echo setuptools | $(COMPILE) - -o locks/build.txt

clean:  ## remove the environment and all build outputs
	rm -rf .venv demo build dist ced_audio.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage

.venv/bin/python:
	$(PYTHON) -m venv .venv

$(BIN)/uv: | .venv/bin/python
	$(PIP) -c constraints.txt uv

.venv/train.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -c constraints.txt -e '.[train]'
	touch $@

# Installs only files whose hashes are in the lock; torch, which is not in it, in the build that fits the machine.
.venv/dev.stamp: pyproject.toml constraints.txt locks/dev.txt | .venv/bin/python
	$(PIP) --no-deps --require-hashes -r locks/dev.txt
	$(PIP) -c constraints.txt torch
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	touch $@
