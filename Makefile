# Every target that needs Python packages depends on the stamp file, so the first
# one you run installs them and later ones start at once.

PYTHON ?= python3
# Extra options for the command that a target runs, for example: make test ARGS="-k losses"
ARGS ?=
# A package index to take torch, and nothing else, from: on Linux the default torch
# brings several GB of CUDA libraries, which PyTorch's CPU-only index avoids.
TORCH_INDEX ?=
# A folder with all packages, made by `make wheelhouse`: setup then takes them from there, without a network.
WHEELHOUSE ?=

VENV := .venv
STAMP := $(VENV)/.installed
VENV_PYTHON := $(VENV)/bin/python
# `make wheelhouse` fills that folder, so its own setup cannot take anything from there.
OFFLINE := $(if $(filter wheelhouse,$(MAKECMDGOALS)),,$(if $(WHEELHOUSE),--no-index --find-links "$(WHEELHOUSE)"))
INSTALL := $(VENV_PYTHON) -m pip install -c constraints.txt $(OFFLINE)

DOWNLOAD := $(VENV_PYTHON) -m pip download -c constraints.txt -d "$(WHEELHOUSE)"
# nbval runs each notebook and compares what comes out; a notebook's cells stay together on one worker.
NOTEBOOKS := --nbval --nbval-cell-timeout=600 --ignore=notebooks/solutions notebooks

# Everything needed at run time is in the repository: a lookup on the network would be a mistake.
export HF_HUB_OFFLINE := 1
# The tokenizers' own threads clash with forked worker processes.
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-browser test-class test-extras lab class lint format bench bench-trl wheelhouse clean distclean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install everything (options: PYTHON=python3.12, TORCH_INDEX=URL, WHEELHOUSE=DIR)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "tgpo-lab needs Python 3.11 or newer, which PYTHON=$(PYTHON) is not: try make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "PYTHON=$(PYTHON) lacks the standard module venv: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
# torch goes first and alone. With TORCH_INDEX its own dependencies wait for the
# second command, because that index may not hold the pinned versions of them.
	$(INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") torch
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(STAMP) ## Run the demo and write its report (options: ARGS="--steps 12")
	$(VENV_PYTHON) -m tgpo_lab demo $(ARGS)

test: $(STAMP) ## Run the tests and the notebooks (options: ARGS="-k name")
	PYTHONSTARTUP="$(CURDIR)/tgpo_lab/notebook_guard.py" $(VENV_PYTHON) -m pytest -n 2 --dist loadscope $(NOTEBOOKS) tests $(ARGS)

test-class: $(STAMP) ## Install nbgrader and take a class through it
	$(INSTALL) -e '.[class]'
	$(VENV_PYTHON) -m pytest tests/test_class_route.py $(ARGS)

test-extras: $(STAMP) ## Install fused kernels, adapters, mathematical answers, TensorBoard and trl, and run their tests
	$(INSTALL) -e '.[liger,lora,math,tensorboard,trl]'
	$(VENV_PYTHON) -m pytest -n 2 tests/test_against_trl.py tests/test_engine.py tests/test_engine_processes.py \
		tests/test_fused_kernels.py tests/test_lora.py tests/test_memory.py tests/test_positions.py tests/test_rewards.py tests/test_tracking.py \
		tests/test_trl_trainer.py $(ARGS)

test-browser: $(STAMP) ## Run the tests in JupyterLab, Notebook 7 and a headless Chromium, which this installs
	$(INSTALL) -e '.[dev,browser]'
	sh tests/browser/need_chromium.sh
	$(VENV_PYTHON) -m pytest tests/browser $(ARGS)

lab: $(STAMP) ## Open the notebooks in JupyterLab
# JupyterLab would otherwise ask the reader for leave to fetch news, and the network for updates and extensions. The
# settings keep the page from asking; the options keep the server from it, whatever a user's own settings say.
	$(VENV_PYTHON) -m jupyterlab notebooks --LabApp.app_settings_dir="$(CURDIR)/lab_settings" \
		--LabApp.news_url=None --LabApp.extension_manager=readonly \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(ARGS)

class: $(STAMP) ## Make the notebooks and their solutions from notebooks/source (options: ARGS="03")
	$(VENV_PYTHON) -m tgpo_lab class $(ARGS)

lint: $(STAMP) ## Check the code's style
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

format: $(STAMP) ## Format the code and apply the safe fixes
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

bench: $(STAMP) ## Measure speed and memory
	$(VENV_PYTHON) -m tgpo_lab bench $(ARGS)

bench-trl: $(STAMP) ## Compare with trl, which this installs
	$(INSTALL) -e '.[trl]'
	$(VENV_PYTHON) benchmarks/against_trl.py $(ARGS)

wheelhouse: $(STAMP) ## Download all packages, for machines without a network (options: WHEELHOUSE=DIR, TORCH_INDEX=URL)
	@test -n "$(WHEELHOUSE)" || { echo "Say where to: make wheelhouse WHEELHOUSE=DIR" >&2; exit 1; }
	$(DOWNLOAD) $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") torch
	$(DOWNLOAD) --find-links "$(WHEELHOUSE)" '.[dev]' 'hatchling>=1.27,<2' editables

clean: ## Remove caches and build products; .venv and runs stay
	rm -rf .hypothesis .pytest_cache .ruff_cache build dist *.egg-info
	find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune \
		-o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean ## Also remove .venv; your runs stay
	rm -rf $(VENV)
