.DEFAULT_GOAL := help
PYTHON ?= python

.PHONY: help install check format lint types test demo llama-cpp coverage onnx-coverage onnx-genai bench clean fuzz fuzz-triton sanitize kernels-sanitized kernels-emulated zoo

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install:  ## install in editable mode with everything that the checks need
	pip install -e '.[test,lint]'

check: lint types test  ## everything that a submission must pass

format:  ## format the code
	ruff format .
	ruff check --fix .

lint:  ## formatting and lint, without changing anything
	ruff format --check .
	ruff check .

types:  ## type checks
	mypy

test:  ## the test suite
	pytest -n auto --dist worksteal

demo:  ## the main job, end to end
	irc demo

llama-cpp:  ## build llama.cpp in .llama-cpp/ and hold the GGUF target against it (minutes)
	$(PYTHON) -m tests.llama_cpp.check --write

coverage:  ## recompute docs/coverage.md
	$(PYTHON) -m tests.coverage

zoo:  ## every model of the zoo on target cpu, against its program (ten minutes)
	$(PYTHON) -m tests.zoo_on_targets cpu

onnx-genai:  ## generate with onnxruntime-genai (needs that package)
	$(PYTHON) -m pytest tests/lowering/test_onnx_genai.py

onnx-coverage:  ## recompute the table in docs/onnx.md (an hour)
	$(PYTHON) -m tests.onnx_coverage

bench:  ## all benchmarks, short
	for script in benchmarks/*.py; do $(PYTHON) $$script --quick || exit 1; done

fuzz:  ## random clusters on target cpu against the reference, 100 of them
	IRC_FUZZ_FIRST=1000 IRC_FUZZ_COUNT=100 $(PYTHON) -m pytest tests/lowering/test_clusters.py

fuzz-triton:  ## random clusters on target triton against the reference, 100 of them (without a GPU: minutes); more kernels compiled
	IRC_FUZZ_FIRST=1000 IRC_FUZZ_COUNT=100 IRC_AHEAD_ALL=1 $(PYTHON) -m pytest tests/triton/test_clusters.py tests/triton/test_ahead.py

sanitize:  ## random clusters on target cpu under the address and undefined-behaviour sanitizers, steps under the thread sanitizer
	IRC_STEP_THREADS=1 $(PYTHON) -m pytest tests/lowering/test_step_threads.py
	IRC_FUZZ_COUNT=20 IRC_FUZZ_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g" \
		ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(PYTHON) -m pytest tests/lowering/test_clusters.py

clean:  ## remove what builds and checks leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis irc-demo

kernels-sanitized:  ## kernel tests under the address, undefined-behaviour and thread sanitizers
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -Ilowering/cpp/include tests/kernels/pool_stress.cpp \
		-o $(or $(TMPDIR),/tmp)/irc-pool-stress && $(or $(TMPDIR),/tmp)/irc-pool-stress
	IRC_KERNEL_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(PYTHON) -m pytest tests/kernels

kernels-emulated:  ## kernel tests with AVX-512 computed by SIMDe (Debian: apt install libsimde-dev); about 10 minutes
	IRC_KERNEL_FLAGS="-DIRC_EMULATE_AVX512 -Wno-error -Wno-psabi" $(PYTHON) -m pytest tests/kernels
