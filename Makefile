# One-line doors. Each sets up what it needs; the work is in the commands, which `--help` explains.
VENV  ?= .venv
BIN   := $(VENV)/bin
NPROC ?= 1

FULL    := $(VENV)/.ready
TRAINER := $(firstword $(wildcard $(FULL)) $(VENV)/.ready-train)# where only the trainer runs, vLLM is not installed
PEERS   := runs/bench/peers/.ready-peers# TRL and what it needs, apart from ours
JOBS    ?= 2# test processes; each may hold an engine, of up to 2 GB
BENCHMARKS := storage precompute trainer# modules of benchmarks/; one that needs a peer's packages gets a rule bench-<name> with a fresh environment
RECIPE   = $(if $(CONFIG),--config "$(CONFIG)")
missing  = $(strip $(foreach name,$(1),$(if $(strip $($(name))),,$(name))))
need     = @$(if $(call missing,$(1)),echo "error: $(call missing,$(1)) not given. Write: make $(MAKECMDGOALS) $(foreach name,$(1),$(name)=...)" >&2; exit 64,:)

given-%: # before anything is set up
	$(call need,$(subst -, ,$*))

.PHONY: help setup demo precompute sft-data sft train eval test test-fast chaos bench study study-quick lint clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(if $(EXTRAS),$(VENV)/.ready-$(EXTRAS),$(FULL)) ## Make .venv: CUDA or CPU, by what the machine has
$(FULL): pyproject.toml deploy/setup.sh
	EXTRAS= VENV=$(VENV) deploy/setup.sh
$(VENV)/.ready-%: pyproject.toml deploy/setup.sh
	EXTRAS=$* VENV=$(VENV) deploy/setup.sh

demo: $(FULL) ## The main job on a real small model: some ten minutes on two CPU cores
	$(BIN)/python -m recipes.demo.run

precompute: given-MODEL-PROMPTS-CACHE $(FULL) ## MODEL= PROMPTS= CACHE= [TEACHER=] [CONFIG=]: the student's rollouts and the teacher's scores
	$(BIN)/lopd precompute run --model "$(MODEL)" --prompts "$(PROMPTS)" --cache "$(CACHE)" $(if $(TEACHER),--teacher "$(TEACHER)") $(RECIPE) $(ARGS)

sft-data: given-TEACHER-PROMPTS-CACHE $(FULL) ## TEACHER= PROMPTS= CACHE= [CONFIG=]: the teacher's answers, under CACHE/sft
	$(BIN)/lopd precompute sft-data --model "$(TEACHER)" --prompts "$(PROMPTS)" --cache "$(CACHE)/sft" $(RECIPE) $(ARGS)

sft: given-MODEL-CACHE-OUTPUT $(TRAINER) ## CACHE= MODEL= OUTPUT= [CONFIG=] [NPROC=]: fine-tune MODEL on CACHE/sft
	$(BIN)/python -m trainer --ranks $(NPROC) sft $(CONFIG) model="$(MODEL)" data="$(CACHE)/sft" output="$(OUTPUT)" $(ARGS)

train: given-MODEL-CACHE-OUTPUT $(TRAINER) ## CACHE= MODEL= OUTPUT= [CONFIG=] [NPROC=]: distil into MODEL from CACHE/scored
	$(BIN)/python -m trainer --ranks $(NPROC) opd $(CONFIG) model="$(MODEL)" data="$(CACHE)/scored" output="$(OUTPUT)" $(ARGS)

eval: given-MODEL-TEACHER-DATA-OUTPUT $(TRAINER) ## MODEL= TEACHER= DATA= OUTPUT= [CONFIG=]: exact reverse KL at MODEL's fresh rollouts DATA
	$(BIN)/python -m trainer eval $(CONFIG) model="$(MODEL)" teacher="$(TEACHER)" data="$(DATA)" output="$(OUTPUT)" $(ARGS)

test: $(FULL) ## All tests: the real engine, a real S3 server, two gloo ranks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-fast: $(FULL) ## The tests that start no engine, no server and no ranks: under two minutes
	$(BIN)/python -m pytest -m "not slow"

chaos: $(FULL) ## Kill workers, engines and whole boxes, fail requests, for half an hour: nothing may be lost
	$(BIN)/python -m tests.chaos --kills 100 --faults 500 --workers 4 --shards 200 $(ARGS)
	$(BIN)/python -m tests.chaos --kills 30 --faults 150 --workers 4 --shards 60 --writer naive --must-lose $(ARGS)
	$(BIN)/python -m tests.chaos.precompute --kills 150 $(ARGS)
	$(BIN)/python -m tests.chaos.precompute --kills 10 --engine vllm $(ARGS)

bench: $(addprefix bench-,$(BENCHMARKS)) ## Every benchmark: prints its tables, writes its rows to runs/bench/<name>.json
bench-%: $(FULL)
	$(BIN)/python -m benchmarks.$* --json runs/bench/$*.json $(ARGS)
bench-trainer: $(PEERS)
$(PEERS): pyproject.toml deploy/setup.sh
	EXTRAS=peers VENV=$(@D) deploy/setup.sh

study: $(FULL) ## Test the paper's claims on models trained from nothing: three hours or four, resumable; writes docs/study.*
	$(BIN)/python -m benchmarks.study.midsize
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study $(ARGS)
study-quick: $(FULL) ## The claims with two seeds, in a quarter of an hour, beside what docs/study.json has recorded
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study --quick $(ARGS)

lint: $(FULL) ## ruff and basedpyright over everything
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright --pythonpath $(BIN)/python

clean: ## Remove the environment and all runs
	rm -rf $(VENV) runs
