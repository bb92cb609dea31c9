# demo and test need no other step before them; setup is what they share. `make demo PYTHON=python3.12` picks a Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Which tests: `make check PYTEST_MARK='not gpu'` adds the slow ones.
PYTEST_MARK ?= not slow and not gpu
DEMO_OUT ?= demo
# Two processes of one thread each, a file of tests in one of them: its fixtures are made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m '$(PYTEST_MARK)'

.PHONY: setup demo test check browser bench label setup-label clean

setup: $(VENV)/.installed-test

demo: $(VENV)/.installed
	$(BIN)/ich-pipeline demo --out $(DEMO_OUT)

test: setup
	$(PYTEST)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) --cov --cov-report=term

# A real browser for the tests marked `browser`, which are skipped without one. Only root can install it.
browser:
	@if command -v chromium && command -v chromedriver; then :; \
	elif command -v apt-get && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && apt-get install -qq --no-install-recommends chromium chromium-driver; \
	else echo "install chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"; fi

# MONAI Label's pins (numpy 1, pydicom 2) are not ours: an environment of its own, and the tests of its live server.
setup-label: .venv-label/.installed

label: setup-label
	OMP_NUM_THREADS=1 .venv-label/bin/pytest -m label tests/test_label_server.py

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/run.py

# Environments and caches; what demo and training made stays.
clean:
	rm -rf $(VENV) .venv-label build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* coverage.xml
	find ich_pipeline tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv-label/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-label
	.venv-label/bin/pip install --quiet --editable '.[label]' 'pytest>=8' 'pytest-timeout>=2.3' 'selenium>=4.20,<5'
	touch $@

# A stamp is written when its installation is whole, and is old when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@
