# A fresh machine needs only Python 3.11+ (with venv) and make: every target sets up what it needs in .venv.
PYTHON ?= python3
# More words for pytest, for instance: make test ARGS='-k replay'
ARGS ?=
# What a run's time goes to.
DURATIONS := --durations=25 --durations-min=5

BIN := .venv/bin
INSTALLED := .venv/.installed
TORCH_INSTALLED := .venv/.installed-torch
BROWSER_INSTALLED := .venv/.installed-browser
DOCS_INSTALLED := .venv/.installed-docs
KERNEL_SOURCES := $(wildcard lolo/kernels/*.cc lolo/kernels/*.h)
MAX_WHEEL_BYTES := 12000000

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all gpu-test gpu-kernels browser-test check format bench wheel-test docs notebook clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make the environment in .venv (other targets do it by themselves)

quickstart: $(INSTALLED) ## meta-train three optimizers on real data and compare them far past their unroll
	$(BIN)/lolo reproduce quick

test: $(INSTALLED) ## unit, statistical and parity tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(DURATIONS) -m 'not slow and not torch and not browser and not gpu' $(ARGS)

# LOLO_REQUIRE_ALL: a skipped test fails the run (tests/conftest.py).
test-all: $(TORCH_INSTALLED) ## everything slow, and everything that needs PyTorch or an extra; nothing may be skipped
	LOLO_REQUIRE_ALL=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(DURATIONS) -m 'slow or torch' $(ARGS)

# Not in .venv, which holds the CPU builds: with the python of an environment that has JAX and PyTorch for CUDA.
gpu-test: ## on a machine with an NVIDIA GPU: make gpu-test PYTHON=..., of an environment with 'lolo[cuda,torch,test]'
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false LOLO_REQUIRE_ALL=1 $(PYTHON) -m pytest \
	  -m 'not slow and not torch' tests/test_gpu.py tests/test_optax.py $(ARGS)

gpu-kernels: ## the same of the GPU kernels of norm_fc in PyTorch alone, and their speed, in five minutes
	JAX_PLATFORMS=cpu LOLO_REQUIRE_ALL=1 timeout 200 $(PYTHON) -m pytest -m gpu -k torch tests/test_gpu.py $(ARGS)
	JAX_PLATFORMS=cpu timeout 100 $(PYTHON) -m lolo.cli bench torch

browser-test: $(BROWSER_INSTALLED) ## the report in headless Chromium (as root, installs Debian's if there is none)
	chromium=$$($(BIN)/python tools/chromium.py) && \
	LOLO_CHROMIUM=$$chromium LOLO_REQUIRE_ALL=1 $(BIN)/python -m pytest -m browser tests/test_report_in_browser.py $(ARGS)

check: $(INSTALLED) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy lolo

format: $(INSTALLED) ## rewrite the code in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## measure speed on this machine
	$(BIN)/lolo bench

wheel-test: ## build the wheel, install it in an empty environment elsewhere and run a tiny quickstart there
	@set -eu; \
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; trap 'exit 1' HUP INT TERM; \
	echo "building the wheel in $$tmp"; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip wheel -q --no-deps -w "$$tmp/dist" .; \
	wheel=$$(echo "$$tmp"/dist/lolo-*.whl); \
	bytes=$$(wc -c < "$$wheel"); \
	echo "wheel: $$bytes bytes, limit $(MAX_WHEEL_BYTES)"; \
	test "$$bytes" -le $(MAX_WHEEL_BYTES) || { echo "the wheel is too large: look at lolo/data and lolo/weights" >&2; exit 1; }; \
	"$$tmp/venv/bin/python" -m pip install -q -c constraints.txt "$$wheel[train]"; \
	cd "$$tmp"; unset PYTHONPATH; \
	"$$tmp/venv/bin/lolo" reproduce quick --smoke --out "$$tmp/quick"

docs: $(DOCS_INSTALLED) ## build the documentation in docs/_build/html
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build/html

notebook: $(DOCS_INSTALLED) ## run the notebook of the documentation again, with its pictures (some minutes)
	cd docs && ../$(BIN)/jupyter execute --inplace first_optimizer.ipynb

clean: ## remove caches and built files; .venv and runs stay
	rm -rf dist build docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lolo tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: made last, so that an interrupted installation starts again.
$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(KERNEL_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lolo needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

# PyTorch in its own step, so that the version is this one and no CUDA build replaces it; then what examples need.
$(TORCH_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,hub,tensorboard,wandb]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[examples,trainers,triton]'
	@touch $@

$(BROWSER_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,browser]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@
