# `make curve` and `make test` do everything, set-up included. PYTHON chooses the interpreter of the .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: curve test docs gpu gpu-ready lint format ops accuracy compiled lru_steps hf_speed learning_curve decode lru_layer computed clean

curve: .venv/ready  ## cumulative generation time, RWKV-4 against transformers
	$(BIN)/python bench/gen_time.py

test: .venv/ready  ## every property, on the CPU path and on the Triton kernels
	$(BIN)/python -m pytest -n auto --dist worksteal

docs: .venv/docs-ready  ## these pages and those of every public name, in build/docs
	$(BIN)/python docs/tools/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with --quiet it would not be strict

gpu: .venv/ready  ## tests, sanitizers and benchmarks on a GPU, or those of PART=...
	$(BIN)/python bench/gpu.py $(PART)

gpu-ready: .venv/ready  ## all that a few minutes on a GPU need beforehand, on a machine without one
	$(BIN)/python bench/gpu_ready.py

lint: .venv/ready
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix && $(BIN)/ruff format

ops accuracy compiled lru_steps hf_speed learning_curve decode lru_layer: .venv/ready  ## the other benchmarks
	$(BIN)/python bench/$@.py

computed: .venv/ready  ## what is computed for GPUs, without one, into bench/results/computed
	for name in compiled traffic gpu_model; do $(BIN)/python bench/$$name.py --out bench/results/computed || exit; done

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
