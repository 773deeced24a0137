# Every target makes its own virtual environment; the second call finds it ready. What only tests need is left until they are asked for.
PYTHON ?= python3
EXTRAS ?= cpu
PRESET ?= mini
PORT ?= 3000
WORKERS ?= 2
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export DAGSTER_TELEMETRY ?= 0
export DVC_NO_ANALYTICS ?= 1

.PHONY: run test dev lint defs bench clean

run: .venv/.ready-$(EXTRAS)
	$(BIN)/onereward run --preset $(PRESET)

test: .venv/.ready-$(EXTRAS),test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

dev: .venv/.ready-$(EXTRAS)
	$(BIN)/onereward dev --preset $(PRESET) --port $(PORT)

lint: .venv/.ready-$(EXTRAS),test
	$(BIN)/ruff check .
	$(BIN)/mypy

defs: .venv/.ready-$(EXTRAS),test
	$(BIN)/dg check defs

bench: .venv/.ready-$(EXTRAS)
	$(BIN)/python -m benchmarks.run --homes .bench --next-round

# The home stays: it holds people's labels and what is in production.
clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info

.venv/.ready-$(EXTRAS): pyproject.toml
	@echo "Setting up .venv with [$(EXTRAS)]: some minutes, 2 GB. torch first, then the rest."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile "torch==2.13.0"
	@echo "torch is installed, now the other packages."
	$(BIN)/pip install --quiet --no-compile -e ".[$(EXTRAS)]" "torch==2.13.*"
	rm -f .venv/.ready-*
	touch .venv/.ready-$(EXTRAS)

.venv/.ready-$(EXTRAS),test: .venv/.ready-$(EXTRAS)
	@echo "Adding what the tests need: a minute."
	$(BIN)/pip install --quiet --no-compile -e ".[$(EXTRAS),test]" "torch==2.13.*"
	touch .venv/.ready-$(EXTRAS),test
