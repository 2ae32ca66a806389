# Law: every target works from a fresh clone and does its own set-up; a second run finds it done.
# Nothing is installed outside .venv, and only files whose hashes are in deploy/requirements.
#
#   PYTHON=/path/to/python3.10   take this interpreter (.venv made with another: `make clean` first)
#   DEV=1                        with `setup`: rebuild the C library at import whenever it changed
#   FUZZ_S=600                   with `check`: feed the fuzzer for so many seconds instead of 5
#   ARGS=...                     more arguments for pytest, `metisfl demo` or `make lock`

BIN      := .venv/bin
PACKAGES := broker controller deploy learner native_c proto
LOCKED   := .venv/.locked
BUILT    := .venv/.built$(if $(DEV),-dev)
VIEW     := .view/metisfl
LINKS    := $(VIEW)/__init__.py $(PACKAGES:%=$(VIEW)/%)
PROTOS   := events model
SAY      := printf '%-14s %s\n'
NEED_CC  := printf '\043include <stdio.h>\nint main(void) { return 0; }\n' | \
	"$${CC:-cc}" -x c -o /dev/null - 2>/dev/null || \
	{ echo 'a C compiler is missing: apt-get install build-essential' >&2; exit 2; }

FUZZ_S   := 30
SEEDS    := 10000
FIRST    := 0
NEED_FUZZER := echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' | \
	clang -x c -fsanitize=fuzzer -o /dev/null - 2>/dev/null || \
	{ echo 'libFuzzer is missing: apt-get install clang' >&2; exit 2; }

# An interpreter is never downloaded; certificates are the system's, as apt's are.
export UV_PYTHON_DOWNLOADS := never
export UV_SYSTEM_CERTS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON
# Nor does Python behave here as your shell wishes: tests see what every user sees.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all simulate check bench lock proto clean \
	check-format check-types check-rules check-proto check-lock check-units check-c check-fuzz

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(BUILT) ## make .venv with everything in it (the other targets do this by themselves)
	@$(SAY) setup 'ready: .venv/bin/metisfl'

demo: $(BUILT) ## run a whole federation on this machine: broker, controller, learners
	@$(BIN)/metisfl demo $(ARGS)

test: $(BUILT) $(LINKS) ## run the tests, but for those that kill, cut and fill what is real
	@$(if $(ARGS),$(BIN)/pytest -m 'not chaos' $(ARGS),\
		$(BIN)/pytest -m 'not chaos' --ignore tests/services && \
		$(BIN)/pytest -m 'not chaos' tests/services)

test-all: test ## run all tests, those included, and a federation under attack
	@$(BIN)/pytest -m chaos --ignore tests/hostile
	@$(BIN)/pytest -m chaos tests/hostile

simulate: $(BUILT) ## run the cores in a bad world of their own (SEEDS=10000 from FIRST=0)
	@$(BIN)/python -I tests/simulation --seeds $(SEEDS) --first $(FIRST)

check: check-lock check-format check-types check-rules check-proto check-units check-c check-fuzz ## everything else that must hold before a commit
	@$(SAY) check 'all good'

bench: $(BUILT) ## measure events, bytes, fold and rounds here; one JSON document each
	@for bench in events bulk fold 'fold --scheme ckks --params 1000000 --peers' crypto \
		'crypto --profile wide --threshold 3' round 'round --privacy ckks' recovery; do $(BIN)/metisfl bench $$bench --json || exit; done

lock: $(LOCKED) ## resolve pyproject.toml into deploy/requirements anew (ARGS=--upgrade: newest)
	@$(SAY) lock 'resolving for Python 3.10 and 3.12'
	@$(BIN)/python -I deploy/requirements/lock.py write $(ARGS)

proto: $(LOCKED) $(LINKS) ## generate the protobuf modules from the .proto files
	@$(BIN)/python -Im grpc_tools.protoc -I.view --python_out=.view --pyi_out=.view \
		$(PROTOS:%=metisfl/proto/%.proto)

clean: ## remove everything that was made here, .venv too
	rm -rf build dist .venv .view .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -prune -exec rm -rf {} +

# --- set-up -----------------------------------------------------------------------------------

# A .venv without uv broke off half-way and is made anew. An index of your own that pip knows serves
# uv too.
$(LOCKED): deploy/requirements/uv.txt deploy/requirements/py310.txt deploy/requirements/py312.txt
	@$(NEED_CC)
	@set -e; \
	if [ ! -x $(BIN)/uv ]; then \
		python=$$(sh deploy/requirements/python.sh) || exit 2; \
		rm -rf .venv; "$$python" -m venv .venv; \
		$(BIN)/python -m pip install -qq --no-input --require-hashes \
			-r deploy/requirements/uv.txt; \
	fi; \
	lock=$$($(BIN)/python -c 'import sys; print("py%d%d.txt" % sys.version_info[:2])'); \
	index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$( \
		$(BIN)/python -m pip config get global.index-url 2>/dev/null || true)}}; \
	[ -z "$$index" ] || export UV_DEFAULT_INDEX="$$index"; \
	$(SAY) setup "packages of deploy/requirements/$$lock (about 1.5 GB)"; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode \
		-r deploy/requirements/$$lock
	@touch $@

# The C library and the editable install around it. Every C source is a prerequisite, so `make
# test` never runs against an old build.
$(BUILT): $(LOCKED) pyproject.toml $(wildcard native_c/CMakeLists.txt native_c/*.[ch] native_c/_ffi.*)
	@$(NEED_CC)
	@$(SAY) setup 'C library and metisfl itself'
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation \
		--reinstall-package metisfl $(if $(DEV),-Ceditable.rebuild=true -Ceditable.verbose=false) \
		--editable .
	@rm -f .venv/.built* && touch $@

# mypy and protoc run no import hooks: they see the tree as metisfl.* through links.
$(VIEW)/__init__.py:
	@mkdir -p $(VIEW) && echo '__version__: str' >$@

$(PACKAGES:%=$(VIEW)/%): $(VIEW)/%: | $(VIEW)/__init__.py
	@ln -sfn ../../$* $@

# --- check ------------------------------------------------------------------------------------

check-lock: $(BUILT)
	@$(SAY) check 'locks belong to pyproject.toml'
	@$(BIN)/python -I deploy/requirements/lock.py check

check-format: $(BUILT)
	@$(SAY) check 'ruff'
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .

check-types: $(BUILT) $(LINKS)
	@$(SAY) check 'mypy strict'
	@$(BIN)/mypy --no-error-summary

check-rules: $(BUILT)
	@$(SAY) check 'import rules and sources'
	@$(BIN)/python -Im pytest --quiet --no-header tests/test_layers.py tests/test_sources.py

check-proto: $(BUILT) $(LINKS)
	@$(SAY) check 'generated protobuf modules'
	@rm -rf build/proto && mkdir -p build/proto
	@$(BIN)/python -Im grpc_tools.protoc -I.view --python_out=build/proto --pyi_out=build/proto \
		$(PROTOS:%=metisfl/proto/%.proto)
	@for file in $(PROTOS:%=%_pb2.py) $(PROTOS:%=%_pb2.pyi); do \
		cmp -s "build/proto/metisfl/proto/$$file" "proto/$$file" || \
		{ echo "proto/$$file is not what its .proto gives: run \`make proto\`" >&2; exit 1; }; done

check-units: $(BUILT)
	@$(SAY) check 'systemd units'
	@sh deploy/systemd/verify.sh

check-c: $(BUILT)
	@$(SAY) check 'C tests under ASan and UBSan'
	@mkdir -p build/native && PATH="$$PWD/$(BIN):$$PATH" && export PATH && \
		{ cmake -S native_c -B build/native -G Ninja -DMETIS_TESTS=ON -DMETIS_SANITIZE=ON && \
		cmake --build build/native && \
		ctest --test-dir build/native --output-on-failure; } >build/native/log 2>&1 || \
		{ cat build/native/log >&2; exit 1; }

# Corpora stay in build/, so that a longer run goes on from what the shorter ones found. A fifth of
# the time is for C.
check-fuzz: $(BUILT)
	@$(SAY) check 'blocks and values from a fuzzer'
	@$(NEED_FUZZER)
	@mkdir -p build/fuzz/found/c build/fuzz/c-block build/fuzz/c-values && \
		PATH="$$PWD/$(BIN):$$PATH" && export PATH && \
		{ cmake -S native_c -B build/fuzz/c -G Ninja -DMETIS_FUZZ=ON -DCMAKE_C_COMPILER=clang && \
		cmake --build build/fuzz/c && \
		for target in block values; do build/fuzz/c/fuzz_$$target -max_len=2200 \
			-max_total_time=$$(($(FUZZ_S) / 10 + 1)) -print_final_stats=1 \
			-artifact_prefix=build/fuzz/found/c/$$target- build/fuzz/c-$$target || exit; done; \
		} >build/fuzz/c.log 2>&1 || { tail -n 100 build/fuzz/c.log >&2; exit 1; }
	@$(SAY) check 'parsers of foreign bytes from a fuzzer'
	@$(BIN)/python -I tests/fuzz --total $$(($(FUZZ_S) * 8 / 10))
