# Everything from a fresh clone with python3, pip and make: `make demo`, `make logits`, `make test`.
# `make test-all` adds the sweeps marked slow: more cases, more kills, every TPU generation (an hour).
# The work is in tools/setup.sh, which makes .venv once and only again when its inputs change.

.PHONY: setup demo logits test test-all transformers lint clean
.DEFAULT_GOAL := setup

STAMP := .venv/.installed
# libtpu compiles for TPUs without one. Beside the environment, not in it: jax would look for a TPU.
TPU_COMPILER := .venv/libtpu/.installed

# torch and transformers, which read what mmx convert writes; never in the same environment.
TRANSFORMERS := .venv-transformers/.installed

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	sh tools/setup.sh
	touch $@

$(TPU_COMPILER): $(STAMP)
	sh tools/setup.sh tpu-compiler
	touch $@

$(TRANSFORMERS): $(STAMP)
	sh tools/setup.sh transformers
	touch $@

demo: $(STAMP)
	.venv/bin/mmx train demo

logits: $(STAMP)
	.venv/bin/python -m recipes.logits

test: $(STAMP) $(TPU_COMPILER)
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(STAMP) $(TPU_COMPILER)
	.venv/bin/python -m pytest -n auto --dist worksteal

transformers: $(STAMP) $(TRANSFORMERS)
	.venv/bin/python -m pytest tests/test_convert_transformers.py

lint: $(STAMP)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

clean:
	rm -rf .venv .venv-transformers .uv
