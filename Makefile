# `make train` and `make test` do everything on a fresh machine: each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check gpu clean

train: .venv/train
	$(BIN)/python train_minimal.py

test: .venv/test
	$(BIN)/python -m pytest -q tests

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/train: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@ .venv/train

# With the Python that has torch for the GPU: nothing is installed.
DEVICE ?= cuda
gpu:
	$(PYTHON) scripts/gpu.py --device $(DEVICE)

clean:
	rm -rf .venv
