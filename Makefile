# Everything a developer or CI calls. `make` alone lists it.

PYTHON ?= python3.11
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.4.0
LOCK   ?= requirements.lock
VLLM_VENV ?= .venv-vllm
PYTEST_ARGS ?=
BASE ?= origin/main
GATE_ARGS ?=
PARALLEL ?= -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

bin := $(VENV)/bin
stamp := $(VENV)/.installed
triton := $(VENV)/.triton
patched := $(VENV)/.patched
kernels := $(VENV)/.kernels
csrc := sagellm_common/engines/lmdeploy/kernels/csrc
pieces := sagellm_common/comm_backend/native
index := sagellm_common/prefix_reuse/native

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm system-deps run demo proto fmt lint type test test-unit test-integration test-faults \
        test-long test-states test-vllm cov bench gate gate-check chart-check clean

help: ## this table
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(stamp) $(patched) $(kernels) ## virtual environment in .venv from requirements.lock, patched LMDeploy, CPU kernels

# torch first and with its own dependencies: a CUDA build needs them, and pip takes the CPU build where an index offers it.
# The rest without: see requirements.lock. pip talks on a terminal only.
pip_install = $(bin)/pip --disable-pip-version-check install
$(stamp): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or set PYTHON=…" >&2; exit 1; }
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] $(TORCH) (200 MB; some GB where pip finds only the CUDA build)"
	@if [ -t 1 ]; then $(pip_install) $(TORCH); else $(pip_install) -qq $(TORCH); fi
	@echo "[3/4] the $$(grep -c == $(LOCK)) packages of $(LOCK) (550 MB, a minute or two)"
	@$(pip_install) -qq --no-deps -r $(LOCK)
	@echo "[4/4] sagellm itself"
	@$(pip_install) -qq --no-deps --no-build-isolation -e .
	@touch $@

# Tests run LMDeploy's GPU kernels through it, on CPU tensors. A CUDA build of torch has brought its own.
$(triton): $(stamp)
	@$(bin)/python -c 'import triton' 2>/dev/null || { echo "[+] $(TRITON) (160 MB)"; $(pip_install) -qq --no-deps $(TRITON); } \
	  && touch $@ || echo "make: no $(TRITON) for this machine; tests of LMDeploy's GPU kernels are skipped" >&2

# pip's LMDeploy stays as it is; the engine says what it lacks where the copy cannot be made (no patch command).
$(patched): $(stamp) $(wildcard third_party/patches/lmdeploy/*.patch) third_party/apply_patches.sh
	@$(bin)/python -m services.cli engine patches --build >/dev/null && touch $@ || \
	  echo "make: the engine runs without our patches" >&2

setup-vllm: ## vLLM, the second engine, in .venv-vllm (2.4 GB)
	@$(MAKE) --no-print-directory $(VLLM_VENV)/.installed VENV=$(VLLM_VENV) LOCK=requirements-vllm.lock

# Without a compiler torch computes, and Python copies and digests KV and keeps the prefix index, instead; logs say so.
$(kernels): $(stamp) $(wildcard $(csrc)/*) $(csrc)/../build.py $(pieces)/pieces.cpp $(wildcard $(index)/*)
	@echo "CPU kernels: half a minute, once"
	@$(bin)/python -m sagellm_common.engines.lmdeploy.kernels.build --optional >/dev/null && \
	  $(bin)/python -m sagellm_common.comm_backend.native --optional >/dev/null && \
	  $(bin)/python -m sagellm_common.prefix_reuse.native --optional >/dev/null && touch $@

system-deps: ## etcd and what Mooncake links to from apt (root); `make test` skips what needs them otherwise
	@test "$$(id -u)" = 0 || { echo "make system-deps: needs root (sudo make system-deps)" >&2; exit 1; }
	@command -v etcd >/dev/null && ldconfig -p | grep -q libibverbs.so.1 && ldconfig -p | grep -q libnuma.so.1 && \
	  ldconfig -p | grep -q libcurl.so.4 || \
	  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
	    etcd-server etcd-client libibverbs1 libnuma1 libcurl4; }

run: setup ## a cluster in the foreground: 1 prefill, 1 decode, kv_store, router, gateway
	@$(bin)/sagellm up

demo: setup ## from nothing to an answered chat, with what happened on the way
	@$(bin)/sagellm demo

proto: setup ## generate code from protos/ and record additions to the contract
	@$(bin)/python protos/generate.py
	@$(bin)/python protos/lint.py --update

fmt: setup ## format, and fix what can be fixed
	@$(bin)/ruff check --fix-only --quiet .
	@$(bin)/ruff format --quiet .

lint: setup ## ruff, import rules, proto rules, drift of generated code
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/lint-imports --no-logo --no-cache
	@$(bin)/python protos/lint.py
	@$(bin)/python protos/generate.py --check

type: setup ## mypy --strict
	@$(bin)/mypy

test: setup $(triton) ## everything that runs on two cores without root, GPU or Docker
	@$(bin)/pytest $(PARALLEL) $(PYTEST_ARGS)

test-unit: setup $(triton) ## unit and contract tests
	@$(bin)/pytest $(PARALLEL) tests/unit tests/contract tests/property $(PYTEST_ARGS)

test-integration: setup ## real processes
	@$(bin)/pytest $(PARALLEL) tests/integration $(PYTEST_ARGS)

test-faults: setup ## kill -9 at every stage
	@$(bin)/pytest $(PARALLEL) tests/faults $(PYTEST_ARGS)

test-faults-long: setup ## every fault at every state of a handoff, 3400 seeded runs; ten minutes
	@SAGELLM_TEST_FAULT_TIMES=10 $(bin)/pytest $(PARALLEL) tests/faults/test_conformance.py $(PYTEST_ARGS)

soak: setup ## 10,000 handoffs of random sizes through a cluster: memory and descriptors stay
	@$(bin)/python -m bench.soak

test-long: setup ## prompts of 32K, 64K and 128K tokens, minutes each; a chat whose cluster is killed part by part
	@SAGELLM_TEST_LONG=1 $(bin)/pytest tests/integration/test_long_context.py tests/integration/test_life.py \
	    tests/unit/bench/test_chat.py $(PYTEST_ARGS)

test-states: setup ## the handoff in all interleavings, deeper than `make test` goes; minutes
	@HANDOFF_STATES=deep $(bin)/pytest -s tests/property/test_handoff_states.py $(PYTEST_ARGS)

test-vllm: setup setup-vllm ## vLLM: the contract of engines, 1P1D, and with LMDeploy on the other side
	@LMDEPLOY_PYTHON=$(abspath $(bin))/python $(VLLM_VENV)/bin/pytest tests/contract/test_engine.py \
	  tests/unit/engines/test_vllm.py tests/integration/test_vllm_cluster.py $(PYTEST_ARGS)

cov: setup $(triton) ## the whole suite; fails below 85 % of sagellm_common
	@$(bin)/pytest $(PARALLEL) --cov=sagellm_common --cov-report=term-missing:skip-covered --cov-fail-under=85 $(PYTEST_ARGS)

bench: setup ## TTFT, TPOT and tokens/s side by side
	@$(bin)/python -m bench

gate: setup ## is this tree slower than BASE? Both take turns; a quarter of an hour
	@$(bin)/python -m bench.ci_gate --baseline $(BASE) --current . $(GATE_ARGS)

gate-check: setup ## the gate fails where each token is held up by 5 ms
	@planted=$$(mktemp -d) && echo delay_ms=5 >$$planted/decode.streaming && \
	  { $(bin)/python -m bench.ci_gate --baseline . --current . --current-env SAGELLM_FAILPOINTS=$$planted $(GATE_ARGS); \
	    found=$$?; rm -r $$planted; test $$found = 1; }

chart-check: setup ## helm 3 and 4 (fetched, 80 MB once) and the Kubernetes API schemas over helm/sagellm with all of its ci values
	@$(bin)/python -m helm.check
	@$(bin)/pytest tests/k8s $(PYTEST_ARGS)

clean: ## remove the environment and caches (prepared models stay)
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
