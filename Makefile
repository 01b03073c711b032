# Everything happens in .venv; nothing global is touched. `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench down lock clean
SHELL := /bin/bash
BIN := .venv/bin
PIPELINE ?= configs/pipelines/quickstart$(shell nvidia-smi -L >/dev/null 2>&1 && echo -gpu).yaml

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 8

setup:  ## Make .venv with the pinned lock (reused while the lock is the same)
	@cat requirements/*.txt pyproject.toml | sha256sum | cmp -s - .venv/ready || requirements/install.sh

demo: setup  ## Start a local cluster and run the whole quickstart: text in, an LLM over HTTP out
	@$(BIN)/manta status >/dev/null 2>&1 || $(BIN)/manta up
	@$(BIN)/manta run $(PIPELINE)
	@echo; echo 'The cluster stays up. Look around: $(BIN)/manta status   End it: make down'

test: setup  ## Run all tests: unit on all cores, then integration on real Ray and real vLLM
ifdef PYTEST_ARGS
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	@failed=0; \
	$(BIN)/python -m pytest tests/unit -n auto --dist worksteal || failed=1; \
	$(BIN)/python -m pytest --ignore tests/unit || failed=1; \
	exit $$failed
endif

check: setup  ## Format, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup  ## Measure side by side with what one would use instead; JSON in bench/results/
	@mkdir -p bench/results
	@for name in $(or $(BENCH),prepare training serving); do \
		$(BIN)/python bench/$$name.py --json bench/results/$$name.json || exit 1; done

down: setup  ## Stop the local cluster and everything it started
	@$(BIN)/manta down --yes

lock: setup  ## Resolve the lock files anew
	@PATH="$(CURDIR)/$(BIN):$$PATH" requirements/lock.sh

clean:  ## Delete the virtual environment
	rm -rf .venv
