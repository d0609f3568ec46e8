# make quickstart | test | compare | lint; `make help` lists them all.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test test-slow lint format compare bench-cadence bench-checkpoint bench-data bench-forgetting bench-gpu bench-memory bench-model bench-parallel bench-peers bench-recall bench-stability faults kernels nodes clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

install: $(VENV)/.installed ## the virtual environment with everything a run needs

install-dev: $(VENV)/.installed-dev ## ... and what tests and lint need

quickstart: install ## real text -> shards -> a small Hope, trained, evaluated, sampled (minutes)
	$(BIN)/python -m tools.quickstart

compare: install ## Hope against its controls and a Transformer++ of equal size, three seeds
	$(BIN)/python -m tools.compare

bench-cadence: install ## what levels of different periods cost in time, traffic and memory (three minutes)
	$(BIN)/python -m tools.bench_cadence

bench-checkpoint: install ## how long training waits for a checkpoint, and what reuse saves (three minutes)
	$(BIN)/python -m tools.bench_checkpoint

bench-data: install ## our token shards beside MDS, litdata and Megatron: speed, seek, memory, size (ten minutes)
	$(BIN)/python -m tools.bench_data

bench-forgetting: install ## English, then code: what is left of English, with slow levels and without (a quarter of an hour)
	$(BIN)/python -m tools.bench_forgetting

bench-gpu: install ## on a GPU: scan, kernels, layers and models beside a Transformer++ (docs/gpu.md has shorter parts)
	$(BIN)/python -m tools.bench_gpu

bench-memory: install ## what the memories' writes are worth to a language model of code (half an hour)
	$(BIN)/python -m tools.bench_memory

bench-peers: install ## one layer of Hope beside public implementations, which are installed apart (ten minutes)
	$(BIN)/python -m tools.bench_peers

bench-stability: install ## a million tokens through the default memories: are they bounded? (ten minutes)
	$(BIN)/python -m tools.bench_stability --picture docs/stability.png

bench-model: install ## a Hope layer beside a Transformer++ layer and public implementations (half an hour)
	$(BIN)/python -m tools.bench_model

bench-parallel: install ## every layout against one process: parity, memory, speed, bubbles (half an hour)
	$(BIN)/python -m tools.bench_parallel

bench-recall: install ## associative recall: 64 pairs in 512 tokens, with and without the memories' writes
	$(BIN)/python -m tools.bench_recall

kernels: install-dev ## compile the GPU kernels for an H100 without one: registers, shared memory, spills (minutes)
	$(BIN)/python -m tools.compile_kernels

nodes: install ## 2 and 4 nodes (network namespaces), one killed in the middle; DeepSpeed over ssh (ten minutes)
	$(BIN)/python -m tools.nodes

faults: install ## more than 200 faults on 2 and 4 processes, each survived to the bit? and a soak (ten minutes)
	$(BIN)/python -m tools.faults

test: install-dev ## the tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: install-dev ## the tests that take longer
	$(BIN)/python -m pytest -m slow

lint: install-dev ## ruff (lint, formatting) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches; data/, runs/ and the virtual environment stay
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
