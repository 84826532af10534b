# `make train` and `make test` do everything on a fresh machine: each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all check gpu clean

train: .venv/train
	$(BIN)/python train_minimal.py

# Two tests at a time: most of them start programs and wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope tests

test: .venv/test
	$(PYTEST) -m "not long"

test-all: test
	$(PYTEST) -m long

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
