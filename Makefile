# `make quickstart` and `make test` first install, into .venv, what they need.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# A name on the PATH may be a shim that fails, or a Python without venv, so each candidate is run.
PYTHONS := $(or $(PYTHON),python3.12 python3.11 python3 python)
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

# torchvision's compiled operators load only beside the torch that they were built for.
PAIR := import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)

# The probes whose tables tell the studies' arm `grid` its timestep; one that was stopped goes on.
CIFAR10 = experiments/cifar10.yaml data.root=$(DATA)/cifar10 \
	--layers up_blocks.0 up_blocks.1 up_blocks.2 mid_block --timesteps 10 --images 2000
CAMVID = experiments/camvid.yaml data.root=$(DATA)/camvid \
	--layers up_blocks.0 up_blocks.1 --timesteps 8 --images 101
probe = [ -e runs/$(1)-probe/table.safetensors ] || \
	$(BIN)/distill probe $(2) $(if $(wildcard runs/$(1)-probe/state.pt),--resume)

.PHONY: help install quickstart evidence test lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## install into .venv; again whenever setup.cfg or pyproject.toml changes

quickstart: install ## distil and train from scratch on embedded data, compare both (3 to 7 minutes with AMX)
	@$(if $(wildcard runs/quickstart/config.yaml),echo "going on with runs/quickstart; remove that folder to start afresh",:)
	@$(BIN)/distill train experiments/quickstart.yaml \
		$(if $(wildcard runs/quickstart/config.yaml),--resume)

evidence: install ## the README's figures: on drawn shapes, and with DATA=FOLDER on real images
	@$(BIN)/distill sweep experiments/studies/quickstart.yaml --out experiments/results
ifdef DATA
	@$(call probe,cifar10-1000,$(CIFAR10))
	@$(call probe,camvid-46,$(CAMVID))
	@for study in cifar10-stages cifar10 cifar10-5000 cifar10-vit camvid camvid-367 camvid-vit; do \
		$(BIN)/distill sweep experiments/studies/$$study.yaml data.root=$(DATA)/$${study%%-*} \
			--out experiments/results || exit; \
	done
endif

test: install ## run all tests, offline
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: install ## check style and types
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find distill teachers students rl_policy tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.cfg pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		for python in $(PYTHONS); do \
			"$$python" -c '$(SUITABLE)' 2>/dev/null || continue; \
			echo "making $(VENV) with $$python, $$("$$python" --version)"; \
			"$$python" -m venv $(VENV) && exit; \
		done; \
		echo "no Python 3.11 or newer with venv among: $(PYTHONS)." \
			"Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
		exit 1; }
	@echo "installing into $(VENV); the first time some gigabytes are fetched, most of them torch"
	@$(PIP) install --editable '.[dev]'
	@$(BIN)/python -c '$(PAIR)' 2>/dev/null || { \
		echo "torch and torchvision do not load together; fetching the newest pair" >&2; \
		$(PIP) install --upgrade --force-reinstall torch torchvision; \
		$(BIN)/python -c '$(PAIR)' || { \
			echo "torch and torchvision still do not load together: install a pair from" \
				"https://pytorch.org/get-started into $(VENV), then make again" >&2; \
			exit 1; }; }
	@touch $@
