# Every target sets up what it needs, once. The lock (infra/requirements-*.txt) decides all versions.
KIND := $(shell command -v nvidia-smi > /dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready-$(KIND)
IMAGE ?= registry.example.com/axonym:0.1.0
UV := $(shell command -v uv 2> /dev/null || echo .uv/bin/uv)

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## install everything into .venv (CUDA build of vLLM where nvidia-smi is found, CPU build elsewhere)

.uv/bin/uv:
	$(PYTHON) -m venv .uv || { echo "no venv module: apt-get install python3-venv" >&2; exit 1; }
	.uv/bin/pip install --quiet uv==0.13.9

$(READY): infra/requirements-$(KIND).txt pyproject.toml | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r infra/requirements-$(KIND).txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

browser:  # Chromium for the tests of the report page; Debian and Ubuntu, as root; elsewhere those tests say why they skip
	@command -v chromium > /dev/null 2>&1 || command -v chromium-browser > /dev/null 2>&1 || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && { apt-get update -qq && apt-get install -y -qq chromium > /dev/null; }; } || \
	  echo "no Chromium: the page tests will be skipped"

demo: setup  ## name planted neurons whose truth is known, on this machine, in a few minutes
	$(BIN)/axonym demo

test: setup browser  ## run the tests
	$(BIN)/python -m pytest

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

image:  ## build the image of a cluster's nodes, IMAGE=registry.example.com/axonym:0.1.0
	docker build --file infra/Dockerfile --tag $(IMAGE) .

lock: | $(filter .uv/bin/uv,$(UV))  ## resolve all versions anew
	for kind in cpu gpu; do \
	  echo torch==2.13.0 | $(UV) pip compile --quiet pyproject.toml --extra $$kind --extra dev --python-version 3.11 \
	    --no-emit-index-url --generate-hashes --no-header --override /dev/stdin -o infra/requirements-$$kind.txt; done

.PHONY: help setup browser demo test check image lock
