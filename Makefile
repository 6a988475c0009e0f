# Every target but clean and gpu-check sets up .venv first: once, and again when pyproject.toml changes.

.DEFAULT_GOAL := help
.PHONY: help setup demo drafter test test-next test-families coverage check gpu-check gpu-bundle format clean

BIN := .venv/bin
ARGS ?=

# The tests that start no engine.
UNIT_TESTS ?= $(wildcard tests/algorithm tests/bench tests/demo tests/drafter tests/ops tests/training tests/verify tests/test_*.py)

# Those that hold the contract with vLLM, from its signatures to exact answers.
NEXT_TESTS ?= $(patsubst %,tests/engine/test_%.py,contract settings refusals wiring exactness defaults gpu_path) tests/engine/v2

# No test needs the Hugging Face hub.
test test-next test-families coverage check: export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

help:
	@echo 'make demo    serve a chat model with and without CTC trees and compare (ARGS="--json out.json")'
	@echo 'make drafter train the demo drafter again, hours (OUTPUT=FOLDER PROMPTS=FILE ARGS="--minutes 30")'
	@echo 'make test    run all tests (ARGS="-k walk")'
	@echo 'make test-next  the engine tests over the Python of the newest supported vLLM, which has no CPU wheel'
	@echo 'make test-families  exactness with a tiny target of each family of models, minutes'
	@echo 'make coverage  run all tests and list the lines of the package that none of them runs'
	@echo 'make check   formatting, lint, types and unit tests: what every change must pass'
	@echo 'make gpu-check  kernels and steps on a GPU, without vLLM and without .venv (PYTHON=python3 RESULTS=FOLDER)'
	@echo 'make gpu-bundle one archive with all that gpu-check needs on a machine without network (OUTPUT=FILE);'
	@echo '                ENGINE=1: with vLLM, so that it checks engines too'
	@echo 'make format  format the code and fix what lint can fix'
	@echo 'make setup   only make .venv (PYTHON=python3.12 chooses the interpreter)'
	@echo 'make clean   remove .venv, .venv-next, caches and build products'

setup:
	@PYTHON='$(PYTHON)' scripts/setup-venv.sh

demo: setup
	$(BIN)/vllm-ctc-spec demo $(ARGS)

# What has been done is kept in OUTPUT, and the next call goes on from there.
drafter: setup
	$(BIN)/python scripts/train_drafter.py $(or $(OUTPUT),drafter-training) $(PROMPTS) $(ARGS)

# Three tests at a time, because most of one with an engine is its start, on one core, and waits for disks and messages.
# A process that has done its share takes of another's, so that the long ones are not left to one at the end. vLLM would
# bind the threads of all engines to the same cores.
test test-next test-families coverage: export VLLM_CPU_OMP_THREADS_BIND := nobind
test test-next test-families coverage: export OMP_NUM_THREADS := 1
test: setup
	$(BIN)/pytest --numprocesses 3 --dist worksteal $(ARGS)

test-next: setup
	scripts/setup-venv-next.sh
	.venv-next/bin/python -m pytest --numprocesses 3 --dist worksteal $(NEXT_TESTS) $(ARGS)

# Not part of `make test`, because it takes minutes. One process: all its tests wait for the same two engines.
test-families: setup
	$(BIN)/pytest -m families tests/engine/test_families.py $(ARGS)

# Not part of `make test`, because counting lines slows the tests down.
coverage: setup
	$(BIN)/pytest --numprocesses 3 --dist worksteal --cov --cov-report=term-missing $(ARGS)

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(if $(strip $(UNIT_TESTS)),$(BIN)/pytest $(UNIT_TESTS) $(ARGS))

# On a machine with a GPU and nothing of ours: its own Python has torch and Triton.
gpu-check:
	PYTHON='$(PYTHON)' benchmarks/gpu/check.sh $(RESULTS)

gpu-bundle: setup
	$(BIN)/python -m benchmarks.gpu.bundle $(or $(OUTPUT),gpu-bundle.tar.gz) $(if $(ENGINE),--engine) $(ARGS)

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv .venv-next .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
	find vllm_ctc_spec tests -name __pycache__ -type d -prune -exec rm -rf {} +
