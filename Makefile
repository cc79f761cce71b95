# One way to build, one way to test. `make help` lists the targets.
#
# The virtual environment that is active is used; where none is, .venv is made and used. A torch that
# is importable in it stays as it is.
#
#   TORCH_INSTALL   what `pip install` is given where no torch is importable
#                   (default: the CPU build of torch 2.13.0)
#   BENCH_ARGS      more arguments for the benchmarks, as in: make bench BENCH_ARGS="--threads 1"
#   PYTEST_ARGS     more arguments for pytest, as in: make test PYTEST_ARGS="-k shift -x"
#   PYTEST_JOBS     processes that share the tests, a file at a time (default: one a core, at most 8)
#   MAX_JOBS, SR_KERNELS_*   see setup.py

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON_FOR_VENV ?= python3
ENV := $(abspath $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv))
PYTHON := $(ENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
PYTEST_ARGS ?=
PYTEST_JOBS ?= auto
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=
TORCH_VERSION := 2.13.0
# The plain version first: it is found where pip's own index or wheel folder has the CPU build. PyTorch's
# index has it for everyone else (PyPI's Linux wheel is a CUDA build of gigabytes).
TORCH_INSTALL ?=
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TRITON_VERSION := 3.6.0
# The ends of the range that is supported: requirements-triton.txt, docs/triton.md.
TRITON_ENDS := 3.4.0 3.9.0

STAMPS := build/stamps/$(subst /,_,$(ENV))
SOURCES := setup.py pyproject.toml sr_kernels/_version.py \
	$(wildcard csrc/*.cpp csrc/*.h csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)
PYTHON_FILES := setup.py sr_kernels_cli.py sr_kernels models benchmarks tests tools
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help bench demo gpu-check test test-abi test-asan test-triton-versions lint format wheel setup setup-dev clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

demo: setup  ## upscale the photograph that the package ships
	@$(ENV)/bin/sr-kernels demo

bench: $(STAMPS)/bench setup  ## the quick set of benchmarks (about 7 minutes on 2 cores); rows and charts in benchmarks/results
	@$(ENV)/bin/sr-kernels bench --quick --plot $(BENCH_ARGS)

test: setup-dev  ## all tests that this machine can run
	$(PYTHON) -m pytest -q -n $(PYTEST_JOBS) --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

# No set-up: a GPU machine may have no network. What is missing there is named.
gpu-check:  ## what only a GPU can tell: tests, compute-sanitizer, benchmarks (GPU_CHECK_ARGS="--built --only STEP")
	@$(or $(wildcard $(PYTHON)),$(PYTHON_FOR_VENV)) tools/gpu_check.py $(GPU_CHECK_ARGS)

lint: setup-dev  ## ruff, mypy, clang-format: changes nothing
	$(PYTHON) -m ruff check $(PYTHON_FILES)
	$(PYTHON) -m ruff format --check $(PYTHON_FILES)
	$(PYTHON) -m mypy sr_kernels_cli.py sr_kernels models benchmarks
	$(ENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: setup-dev  ## what lint can repair, repaired
	$(PYTHON) -m ruff check --fix $(PYTHON_FILES)
	$(PYTHON) -m ruff format $(PYTHON_FILES)
	$(ENV)/bin/clang-format -i $(CXX_FILES)

wheel: setup  ## dist/sr_kernels-*-cp310-abi3-*.whl
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

# --- set-up -------------------------------------------------------------------------------------
# pip asks no index for what is there already, so that all of this works offline once it has run.

setup: $(STAMPS)/installed  ## the package, in the virtual environment, in editable form

setup-dev: $(STAMPS)/dev setup

$(ENV)/pyvenv.cfg:
	@if [ "$(ENV)" != "$(abspath .venv)" ]; then \
		[ -x "$(PYTHON)" ] && exit 0; \
		echo "the active environment $(ENV) has no bin/python: deactivate or repair it" >&2; exit 1; \
	fi
	$(PYTHON_FOR_VENV) -m venv .venv

$(STAMPS)/build: requirements-build.txt | $(ENV)/pyvenv.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sr_kernels needs Python >= 3.10")'
	@echo "installing what is missing (a minute or two, once)"
	@$(PIP) install -q -r requirements-build.txt
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(PYTHON) -c 'import torch; print("torch", torch.__version__, "is there and stays")'; \
	elif [ -n "$(TORCH_INSTALL)" ]; then \
		$(PIP) install $(TORCH_INSTALL); \
	else \
		echo "installing the CPU build of torch $(TORCH_VERSION)"; \
		$(PIP) install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
		$(PIP) install "torch==$(TORCH_VERSION)" --index-url $(PYTORCH_CPU_INDEX); \
	fi
	@mkdir -p $(@D) && touch $@

$(STAMPS)/bench: requirements-bench.txt $(STAMPS)/build
	$(PIP) install -q -r requirements-bench.txt
	@mkdir -p $(@D) && touch $@

$(STAMPS)/dev: requirements-dev.txt requirements-bench.txt $(STAMPS)/build
	$(PIP) install -q -r requirements-dev.txt
	@$(PYTHON) -c 'import triton' 2>/dev/null || $(PIP) install -q triton==$(TRITON_VERSION)
	@mkdir -p $(@D) && touch $@

$(STAMPS)/installed: $(SOURCES) $(STAMPS)/build
	@echo "compiling the kernels (a minute or two; again only when a source changes)"
	@$(PIP) install -q --no-build-isolation --no-deps -e .
	@mkdir -p $(@D) && touch $@

# --- sanitizers ---------------------------------------------------------------------------------
# Python itself is not instrumented: the sanitizers' runtimes are loaded before it, and leaks are not
# looked for. torch.compile and its like add nothing here, and take very long.

SANITIZE := address,undefined
ASAN_SITE := build/asan-site
ASAN_TESTS ?= tests/test_shift_conv.py tests/test_window_attention.py tests/test_attention_gates.py \
	tests/test_attention_block.py tests/test_conv3x3.py tests/test_linear_attention.py
ASAN_SELECT ?= -m "not slow and not gpu and not large" -k "not compile and not export and not opcheck"

$(ASAN_SITE)/.stamp: $(SOURCES) $(STAMPS)/dev $(shell find sr_kernels models benchmarks -name '*.py')
	rm -rf $(ASAN_SITE)
	SR_KERNELS_SANITIZE=$(SANITIZE) $(PIP) install -q --no-build-isolation --no-deps \
		--target $(ASAN_SITE) .
	@touch $@

test-asan: $(ASAN_SITE)/.stamp  ## the CPU kernels' tests under AddressSanitizer and UBSan
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	PYTHONPATH=$(abspath $(ASAN_SITE)) PYTHONSAFEPATH=1 SR_KERNELS_EXPECT_SANITIZERS=$(SANITIZE) \
	$(ENV)/bin/pytest -q -p no:cacheprovider $(wildcard $(ASAN_TESTS)) $(ASAN_SELECT) $(PYTEST_ARGS)

# --- the stable ABI -----------------------------------------------------------------------------
# The wheel built here, against this environment's torch, must work under the newest torch from PyPI
# (a CUDA build: about 6 GB). Run before a release. The tests of spandrel run there as well: it needs
# torchvision, which PyPI has for that torch alone.

ABI_ENV := $(abspath .venv-abi)

$(ABI_ENV)/.stamp: requirements-dev.txt requirements-build.txt requirements-spandrel.txt
	[ -d $(ABI_ENV) ] || $(PYTHON_FOR_VENV) -m venv $(ABI_ENV)
	$(ABI_ENV)/bin/pip install -q torch
	$(ABI_ENV)/bin/pip install -q -r requirements-dev.txt -r requirements-spandrel.txt
	@touch $@

test-abi: setup-dev $(ABI_ENV)/.stamp  ## one wheel under the newest torch from PyPI (6 GB)
	rm -rf build/abi-wheel
	SR_KERNELS_BUILD_CUDA=1 $(PIP) wheel -q --no-build-isolation --no-deps -w build/abi-wheel .
	$(ABI_ENV)/bin/pip install -q --no-deps --force-reinstall build/abi-wheel/*.whl
	cd build/abi-wheel && $(ABI_ENV)/bin/python $(abspath tools/check_abi.py)
	cd build/abi-wheel && PYTHONSAFEPATH=1 $(ABI_ENV)/bin/pytest -q -p no:cacheprovider \
		-c $(abspath pyproject.toml) --rootdir $(abspath .) -m smoke $(abspath tests)
	cd build/abi-wheel && PYTHONSAFEPATH=1 $(ABI_ENV)/bin/pytest -q -p no:cacheprovider \
		-c $(abspath pyproject.toml) --rootdir $(abspath .) $(abspath tests/models/test_spandrel.py)

# --- Triton's versions --------------------------------------------------------------------------
# Environments that hold another Triton and see everything else of this one. The whole interpreter
# suite and the gate of compiled code run in each: ten to twenty minutes of one core a version.

$(abspath .venv-triton-)%/.stamp: requirements-triton.txt $(STAMPS)/dev
	$(PYTHON) -m venv --without-pip $(@D)
	site="$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	$(PIP) install -q --no-deps --upgrade --target "$$site" triton==$*; \
	$(PYTHON) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$site/environment.pth"
	@touch $@

test-triton-versions: setup-dev $(TRITON_ENDS:%=$(abspath .venv-triton-)%/.stamp)  ## the Triton kernels with the oldest and newest Triton supported
	for version in $(TRITON_ENDS); do \
		OMP_NUM_THREADS=1 $(abspath .venv-triton-)$$version/bin/python -m pytest -q -p no:cacheprovider \
			tests/test_triton.py -k "interpreter or every_kernel" $(PYTEST_ARGS); \
	done

clean:  ## removes what was built; environments stay
	rm -rf build dist *.egg-info sr_kernels/*.so sr_kernels/_build.json
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and the environments that this Makefile made
	rm -rf .venv .venv-abi .venv-triton-*
