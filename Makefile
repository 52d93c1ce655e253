# make demo, make test: set-up included. Python 3.11 or newer and make are all that is needed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NEWEST := .venv-newest/bin
DEMO := plain weight_norm weight_norm_init batch_norm mean_only
PIP_FLAGS := --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-isa test-newest lint types check format constraints clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/ready ## train on real digits for two minutes: a table and a picture
	rm -rf runs/demo
	for variant in $(DEMO); do \
	  $(BIN)/python -m experiments.train --config=configs/digits.py:$$variant --workdir=runs/demo/$$variant || exit 1; \
	done
	$(BIN)/python -m experiments.report $(DEMO:%=runs/demo/%) --out=runs/demo/report

# Every kernel would warn that it listens on this machine without encryption.
docs: SHELL := bash -o pipefail
docs: .venv/docs ## the documentation, every cell of it run: docs/_build/html/index.html
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --jobs 2 --quiet docs docs/_build/html \
	  2>&1 | sed '/^$$/d; /IPKernelApp. WARNING . Kernel is running over TCP/d'
	@echo "open docs/_build/html/index.html"

test: lint types check ## all checks: lint, format, types, doctests, tests

lint: .venv/ready ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready ## mypy and basedpyright: wnjax/, experiments/, programs of users
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: .venv/ready ## doctests and tests only
	$(BIN)/pytest -n 2 --dist worksteal

test-newest: .venv-newest/ready ## doctests and tests on the newest Python found, with the newest JAX
	$(NEWEST)/python -c "import jax, flax, sys; print('Python', sys.version.split()[0], 'jax', jax.__version__, 'flax', flax.__version__)"
	$(NEWEST)/pytest -n 2 --dist worksteal

# XLA cannot build some kernels of float16 for SSE4.2 (jax 0.10.2): "Failed to materialize symbols".
test-isa: .venv/ready ## doctests and tests, compiled as on processors with SSE4.2, AVX2 and AVX-512
	XLA_FLAGS=--xla_cpu_max_isa=SSE4_2 $(BIN)/pytest -n 2 --dist worksteal -k "not float16 or bfloat16"
	XLA_FLAGS=--xla_cpu_max_isa=AVX2 $(BIN)/pytest -n 2 --dist worksteal
	XLA_FLAGS=--xla_cpu_max_isa=AVX512 $(BIN)/pytest -n 2 --dist worksteal

format: .venv/ready ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up .venv with $$($(PYTHON) --version); a few minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt flit_core
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --no-build-isolation --editable '.[experiments,test]'
	@touch $@

.venv/docs: .venv/ready
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	@touch $@

.venv-newest/ready: pyproject.toml .ci/newest-python
	@echo "setting up .venv-newest with $$($$(.ci/newest-python) --version); a few minutes, once"
	$$(.ci/newest-python) -m venv .venv-newest
	$(NEWEST)/pip install $(PIP_FLAGS) --editable '.[experiments,test]'
	@touch $@

constraints: ## renew constraints.txt with today's releases for this Python
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/pip install $(PIP_FLAGS) flit_core '.[docs,experiments,test]'
	{ echo "# What .venv is made of: today's newest for Python 3.11. make constraints renews it."; \
	  .venv-constraints/bin/pip freeze --exclude wnjax; } > constraints.txt
	rm -rf .venv-constraints

clean: ## remove both environments, caches, runs and the built documentation
	rm -rf .venv .venv-newest .*_cache runs docs/_build docs/_pictures
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
