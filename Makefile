# One-line doors. Each sets up what it needs; the work is in the commands, which `--help` explains.
VENV  ?= .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
NPROC ?= 1

.PHONY: help setup demo precompute sft-data sft train eval test test-fast lint clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY) ## Make .venv: CUDA or CPU, by what the machine has
$(READY): pyproject.toml deploy/setup.sh
	VENV=$(VENV) deploy/setup.sh

demo: $(READY) ## The main job on a real small model: about ten minutes on two CPU cores
	$(BIN)/python -m recipes.demo.run

precompute: $(READY) ## MODEL= PROMPTS= CACHE= [TEACHER=] [CONFIG=]: the student's rollouts and the teacher's scores
	$(BIN)/lopd precompute run --model "$(MODEL)" --prompts "$(PROMPTS)" --cache "$(CACHE)" $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)

sft-data: $(READY) ## TEACHER= PROMPTS= CACHE= [CONFIG=]: the teacher's answers, under CACHE/sft
	$(BIN)/lopd precompute sft-data --model "$(TEACHER)" --prompts "$(PROMPTS)" --cache "$(CACHE)/sft" $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)

sft: $(READY) ## CACHE= MODEL= OUTPUT= [CONFIG=] [NPROC=]: fine-tune MODEL on CACHE/sft
	$(BIN)/torchrun --nproc-per-node $(NPROC) -m trainer sft $(CONFIG) model="$(MODEL)" data="$(CACHE)/sft" output="$(OUTPUT)" $(ARGS)

train: $(READY) ## CACHE= MODEL= OUTPUT= [CONFIG=] [NPROC=]: distil into MODEL from CACHE/scored
	$(BIN)/torchrun --nproc-per-node $(NPROC) -m trainer opd $(CONFIG) model="$(MODEL)" data="$(CACHE)/scored" output="$(OUTPUT)" $(ARGS)

eval: $(READY) ## MODEL= TEACHER= DATA= OUTPUT= [CONFIG=]: exact reverse KL at MODEL's fresh rollouts DATA
	$(BIN)/python -m trainer eval $(CONFIG) model="$(MODEL)" teacher="$(TEACHER)" data="$(DATA)" output="$(OUTPUT)" $(ARGS)

test: $(READY) ## All tests: the real engine, a real S3 server, two gloo ranks
	$(BIN)/python -m pytest

test-fast: $(READY) ## The tests that start no engine and no server: under two minutes
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY) ## ruff and basedpyright over everything
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright --pythonpath $(BIN)/python

clean: ## Remove the environment and all runs
	rm -rf $(VENV) runs
