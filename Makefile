# make demo    installs into .venv, fetches a small real model, runs a batch job over two stages with KV going home
# make test    the tests        make lint    ruff and mypy        make docs    docs/ as a site, in docs/_build
# make clean   removes what the others made
#
# A stamp file in .venv says that the environment is up to date; the model is fetched and converted once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

VENV := .venv
PYTHON_BIN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MODEL := models/SmolLM2-135M-Instruct

# So few KV blocks on the device that the rows in flight do not fit: blocks go home and come back.
DEMO_FLAGS := --pipeline-parallel-size 2 --max-model-len 1024 --max-num-seqs 16 \
	--num-device-blocks 128 --num-window-blocks 48 --host-memory-gib 1 --device cpu

.PHONY: help install model demo test lint docs clean

help:
	@sed -n '1,3s/^# //p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt tools/create_venv.sh
	@tools/create_venv.sh $(VENV)
	echo "installing PipeMax and what it needs into $(VENV) (torch is large: the first time takes minutes)"
	$(PYTHON_BIN) -m pip install $$([ -t 1 ] || echo --quiet) --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(INSTALLED)
	@$(PYTHON_BIN) tools/fetch_demo_model.py $(MODEL)

demo: $(INSTALLED) $(MODEL)/config.json
	@mkdir -p demo
	echo "answering examples/requests.jsonl over two pipeline stages"
	$(VENV)/bin/pipemax run-batch -i examples/requests.jsonl -o demo/answers.jsonl --overwrite \
		--model $(MODEL) $(DEMO_FLAGS)
	$(PYTHON_BIN) tools/show_answers.py examples/requests.jsonl demo/answers.jsonl

test: $(INSTALLED) $(MODEL)/config.json
	@$(PYTHON_BIN) -m pytest

lint: $(INSTALLED)
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(INSTALLED)
	@$(PYTHON_BIN) -m sphinx -q -W --keep-going -b html docs docs/_build
	echo "docs/_build/index.html"

clean:
	@rm -rf $(VENV) demo models docs/_build build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
