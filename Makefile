# Every target works on a fresh clone with nothing installed but Python 3.11 or later and a C compiler: it makes .venv itself.
PYTHON ?= python3
DEVICE ?= cpu
KEY_DTYPE ?= bf16
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed
RELEASE := $(VENV)/.release
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
NATIVE := service/blockdex/_native.abi3.so
FORMATTED_C := $(wildcard service/blockdex/csrc/*.[ch] service/blockdex/csrc/*/*.[ch] service/blockdex/ring/include/*.h tests/csrc/*.[ch] tests/fuzz/*.c benchmarks/colocated/*.c examples/cpp_engine/*.cpp)

# A torch that the machine already has (a CUDA build, say) is used as it is; otherwise exactly the constrained one comes.
HAS_TORCH := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo yes)
VENV_FLAGS := $(if $(HAS_TORCH),--system-site-packages,)
CONSTRAINTS := $(if $(HAS_TORCH),,--constraint constraints.txt)

# Programs of the tests that pip does not bring, each with the Debian package that does.
TOOLS := prometheus=prometheus promtool=prometheus amtool=prometheus-alertmanager kubectl=kubernetes-client chromium=chromium \
	gcc=build-essential cmake=cmake
CROSS_TOOLS := aarch64-linux-gnu-gcc=gcc-aarch64-linux-gnu qemu-aarch64=qemu-user \
	/usr/aarch64-linux-gnu/lib/ld-linux-aarch64.so.1=libc6-dev-arm64-cross
FUZZ_TOOLS := clang=clang clang=libclang-rt-dev
IMAGE_TOOLS := buildah=buildah debootstrap=debootstrap runc=runc

.PHONY: help install tools demo demo-paged test test-all test-vllm mutants lint format proto wheels sbom audit lock bench bench-gpu bench-service docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

install: $(STAMP) ## Make .venv with the server, the examples and the tools

# What runs: the server and the examples, a third of what the tools take.
$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[server,examples]'
	touch $@

$(STAMP): $(RUNS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[server,examples,dev]'
	# What engines pin today, for the test that the generated code loads with it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/protobuf-5.29 'protobuf==5.29.6' 'googleapis-common-protos==1.66.0'
	touch $@

# Installing compiles it; from then on it follows its sources.
$(NATIVE): $(RUNS) $(wildcard service/blockdex/csrc/* service/blockdex/csrc/*/* service/blockdex/ring/include/*.h)
	$(BIN)/python service/blockdex/csrc/compile.py
	touch $@

tools: ## Install what the tests run beside Python, where it is missing (as root on Debian)
	@tests/tools.sh $(TOOLS)

demo: $(NATIVE) ## A MiniMax-M3 model from transformers served by blockdex, checked against its own indexer (DEVICE=cpu|cuda, KEY_DTYPE=bf16|fp8_e4m3)
	$(BIN)/python -m examples.transformers_engine --device $(DEVICE) --key-dtype $(KEY_DTYPE)

demo-paged: $(NATIVE) ## An engine with block tables of its own on a pool of blockdex, checked against its own indexer (DEVICE=cpu|cuda)
	$(BIN)/python -m examples.paged_engine --device $(DEVICE)

# Tests share the processors; one that is marked so has them to itself.
TOGETHER := --numprocesses 2 --dist worksteal -m

test: $(STAMP) $(NATIVE) tools ## The tests (two cores, no GPU, minutes)
	$(BIN)/python -m pytest $(TOGETHER) 'not slow and not alone'
	$(BIN)/python -m pytest -m 'not slow and alone'

test-all: test $(RELEASE) ## The tests, and those that take longer: images are built and run, as root
	@tests/tools.sh $(IMAGE_TOOLS) $(CROSS_TOOLS) $(FUZZ_TOOLS)
	$(BIN)/python -m pytest -m slow
	$(MAKE) test-vllm

# An environment of its own: vLLM without its needs, which name torch's CUDA build; torch and the tools are those of .venv.
$(VLLM_STAMP): $(STAMP) integrations/vllm/tests/environment/requirements.txt
	$(PYTHON) -m venv --without-pip $(VENV_FLAGS) $(VLLM_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > $$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement integrations/vllm/tests/environment/requirements.txt
	touch $@

test-vllm: $(VLLM_STAMP) ## The plugin in vLLM's real package, installed as a user does (a part of test-all)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check ./integrations/vllm
	PYTHONPATH=integrations/vllm/tests/environment $(VLLM_VENV)/bin/python -m pytest -c integrations/vllm/pyproject.toml integrations/vllm/tests

mutants: $(STAMP) $(NATIVE) ## Small faults put into the C, one at a time: each is seen by some test of make test
	cd tests && ../$(BIN)/python -m mutants

lint: $(STAMP) ## Formatting, lints, types, the protobuf style rules
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_C)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --lint

format: $(STAMP) ## Reformat and fix what can be fixed by itself
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED_C)
	$(BIN)/ruff check --fix .

proto: $(STAMP) ## Generate service/blockdex/v1 from proto/
	$(BIN)/python proto/generate.py

$(RELEASE): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[release]'
	touch $@

wheels: $(RELEASE) ## Make the wheels and the sources of the last commit in dist/, twice, and check them
	$(BIN)/python deploy/wheels.py

sbom: $(RELEASE) ## Say what the images hold, as CycloneDX in dist/
	mkdir -p dist
	for image in server cpu engine; do $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/$$image.cdx.json deploy/requirements/$$image.txt || exit; done

audit: $(RELEASE) ## Look for what is known to be wrong with the packages in the images (asks the package index: a mirror may not know)
	for image in build server engine; do $(BIN)/pip-audit --strict --disable-pip --no-deps \
		--requirement deploy/requirements/$$image.txt || exit; done

lock: $(STAMP) ## Pin what the images hold: deploy/requirements
	$(BIN)/python deploy/requirements/lock.py

bench: $(STAMP) $(NATIVE) ## Client latency beside a bare gRPC echo, several processes beside one; writes JSON and PNG to benchmarks/results
	$(BIN)/python -m benchmarks.client
	$(BIN)/python -m benchmarks.ring
	$(BIN)/python -m benchmarks.tables

bench-gpu: $(STAMP) $(NATIVE) ## GPU kernels beside the chip's best, and a peer (PEER=vllm=DIR, an unpacked wheel); JSON and PNG likewise
	$(BIN)/python -m benchmarks.kernels $(if $(PEER),--peer $(PEER))
	$(BIN)/python -m benchmarks.tables

bench-service: $(STAMP) $(NATIVE) ## A server of several processes beside bare gRPC echoes: latency, throughput, memory (DEVICE=cpu|cuda); JSON and PNG likewise
	$(BIN)/python -m benchmarks.service --device $(DEVICE)
	$(BIN)/python -m benchmarks.tables

docs: $(STAMP) ## Build the documentation into site/
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m zensical build --strict

clean: ## Remove the virtual environments and caches
	rm -rf $(VENV) $(VLLM_VENV) .venv-proto dist site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
