# Everything runs in .venv, which pip alone creates. Works with GNU make 3.81, the version of macOS.

PORT ?= 8000
ARGS ?=

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
# As an environment variable, the constraints also apply to the build of the package.
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(PYTHON_IN_VENV) -m pip install --quiet
# torch is installed separately: see below.
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help run test lint bench clean

help:
	@echo 'make run [PORT=9000] [ARGS=...]  start the server with the bundled demo model; ARGS: see chatstream serve --help'
	@echo 'make test                        set up everything, then lint and run all tests'
	@echo 'make lint                        ruff and mypy'
	@echo 'make bench                       measure the scheduler and the demo model on this machine'
	@echo 'make clean                       remove .venv, caches and builds'
	@echo 'PYTHON=python3.13 make ...       the Python that creates .venv'

run: $(VENV)/.ready-to-run
	@exec $(VENV)/bin/chatstream serve --port $(PORT) $(ARGS)

test: $(VENV)/.ready-to-test
	@scripts/browser
	@scripts/lint
	@scripts/test

lint: $(VENV)/.ready-to-test
	@scripts/lint

bench: $(VENV)/.ready-to-run
	@$(PYTHON_IN_VENV) benchmarks/scheduler.py
	@$(PYTHON_IN_VENV) benchmarks/demo_model.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file records an installation; pip runs again when the pins or the ranges are newer than the stamp.
$(VENV)/.ready-to-run: pyproject.toml constraints.txt
	@scripts/venv
	@echo 'Installing ChatStream into $(VENV); this is done once.'
	@$(PIP) --editable '.[fast]'
	@touch $@

# torch is installed first and separately, so that an extra index can supply another build of it. On Linux
#   make test PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# installs the build without several gigabytes of CUDA.
$(VENV)/.ready-to-test: pyproject.toml constraints.txt
	@scripts/venv
	@echo 'Installing ChatStream, torch and the test tools into $(VENV); this is done once and takes minutes.'
	@$(PIP) '$(TORCH)'
	@$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.ready-to-run
