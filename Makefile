# Every target makes its own virtual environment; the second call finds it ready.
PYTHON ?= python3
EXTRAS ?= cpu,test
PRESET ?= mini
PORT ?= 3000
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export DAGSTER_TELEMETRY ?= 0
export DVC_NO_ANALYTICS ?= 1

.PHONY: run test dev lint bench clean

run: .venv/.ready
	$(BIN)/onereward run --preset $(PRESET)

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

dev: .venv/.ready
	$(BIN)/onereward dev --preset $(PRESET) --port $(PORT)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv .onereward build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet -e ".[$(EXTRAS)]" "torch==2.13.*"
	touch .venv/.ready
