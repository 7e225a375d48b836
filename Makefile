# Every target sets up .venv if it is not there. PYTHON picks the interpreter, ARGS goes to train.py.
PYTHON ?= python3
ARGS ?=
# Processes that run tests, and threads of each.
WORKERS ?= 2
THREADS ?= 1
# What `make sanitize` runs, with the C++ kernels built for it: numbers at ragged sizes, every dtype, mode and option.
SANITIZED ?= $(wildcard tests/backends/test_cpp*.py) tests/test_fuzz.py \
	$(addprefix tests/conformance/test_,numbers.py modes.py edges.py unusual_calls.py) -k cpp
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install train test coverage thorough lint fuzz breadth faults ranks scale endings sanitize bench lowest docs wheel clean

install: $(STAMP)

# torch comes first, by its exact version: asked for by a range, an index may serve a build many times the size.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: $(STAMP)
	$(BIN)/python train.py $(ARGS)

test: lint
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest --numprocesses $(WORKERS)

# The same with the lines that no test runs.
coverage: lint
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest --numprocesses $(WORKERS) --cov --cov-report=term

# What the suite leaves out because it has cases like it, and what takes long: a quarter of an hour on 2 cores.
thorough: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest --numprocesses $(WORKERS) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Lines of preference data mutated at random, 1,000 of a seed, and random calls of the kernels against float64, CALLS of
# each implementation (a tenth in Triton's interpreter). The suite has a short fixed part of both.
FUZZ ?= 1000
CALLS ?= 1000
SEED ?= 1
fuzz: $(STAMP)
	DPO_KERNELS_FUZZ=$(FUZZ) DPO_KERNELS_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest tests/training/test_data_fuzz.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python tests/fuzz.py --impl cpp --calls $(CALLS) --seed $(SEED)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python tests/fuzz.py --impl torch --calls $(CALLS) --seed $(SEED)
	TRITON_INTERPRET=1 $(BIN)/python tests/fuzz.py --impl triton --calls $$(($(CALLS) / 10)) --seed $(SEED)

# A tiny instance of every causal class of transformers through the fused head; writes docs/models.md.
breadth: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python tests/breadth.py --write

# What can go wrong around a run, done to small ones: KILLS of them killed with -9 at moments that SEED draws and resumed,
# signals, full disks, read-only folders, damaged checkpoints, changed data. Ten minutes on 2 cores; writes docs/faults.md.
KILLS ?= 50
faults: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python tests/faults.py --kills $(KILLS) --seed $(SEED) --write docs/faults.md

# A vocabulary over 1 to 4 processes against one: differences, bits, bytes held and sent; a small part in Triton's
# interpreter. A quarter of an hour on 2 cores. The suite has a fixed part of it on 2 processes.
ranks: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python tests/vocab_parallel.py
	OMP_NUM_THREADS=$(THREADS) TRITON_INTERPRET=1 $(BIN)/python tests/vocab_parallel.py --impls triton --ranks 2

# The recipes of examples/scale on CPUs against one process, and gone on from with other numbers of processes; those of
# DeepSpeed where it is installed. A quarter of an hour on 2 cores.
scale: $(STAMP)
	$(BIN)/python tests/scale_runs.py

# RUNS of two processes to their end: status 0 and a saved model in all. Ten minutes on 2 cores.
RUNS ?= 50
endings: $(STAMP)
	$(BIN)/python tests/endings.py --runs $(RUNS)

# The threads alone under the thread sanitizer, all kernels under those of addresses and undefined behaviour.
# A report of any ends the run, and so does a fall-back to other kernels. Exceptions need libstdc++ from the
# start.
SANITIZERS = CXX="$(CXX)" DPO_KERNELS_CACHE=build/sanitize \
	DPO_KERNELS_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"
sanitize: $(STAMP)
	mkdir -p build/sanitize
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -Itests/csrc -Icsrc tests/csrc/threads_stress.cpp csrc/threads.cpp \
		-pthread -o build/sanitize/threads_stress && build/sanitize/threads_stress
	$(SANITIZERS) $(BIN)/python -m dpo_kernels.build
	$(SANITIZERS) $(BIN)/python -m pytest -W "error:dpo_kernels falls back" --capture=sys $(SANITIZED)

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pytest benchmarks --benchmark-json results.json

# The oldest versions that pyproject.toml allows, in an environment of their own.
lowest:
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	OMP_NUM_THREADS=$(THREADS) build/lowest/bin/python -m pytest --numprocesses $(WORKERS)

# The site of docs/, into build/site; what warns (a broken link, an argument that no signature has) is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# sdist and wheel into dist/, the wheel made from the sdist; checked, installed in a clean environment and imported.
wheel: $(STAMP)
	rm -rf dist build/lib build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/wheel/bin/python -m build
	build/wheel/bin/python -m twine check --strict dist/*
	$(BIN)/python tests/release.py dist

clean:
	rm -rf .venv output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
