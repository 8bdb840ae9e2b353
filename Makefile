# make demo   sample every class of the model in pretrained/demo, without and with Skip-Cache
# make test   run ruff and pytest
# Both need Python 3.11 or newer. They install requirements.txt into .venv first, and again when that file changes.
# make cuda   check and time what only a GPU can show, by CUDA_PYTHON with its own torch; nothing is installed

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

CUDA_PYTHON ?= python3

.PHONY: demo test cuda

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash sample/scripts/demo/demo.sh

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

cuda:
	$(CUDA_PYTHON) tools/cuda.py $(ARGS)

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	touch $@
