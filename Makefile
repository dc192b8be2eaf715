# Everything from a fresh clone with python3, pip and make: `make demo`, `make test`.
# The work is in tools/setup.sh, which makes .venv once and only again when its inputs change.

.PHONY: setup demo test lint clean
.DEFAULT_GOAL := setup

STAMP := .venv/.installed

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	sh tools/setup.sh
	touch $@

demo: $(STAMP)
	.venv/bin/python -m recipes.demo

test: $(STAMP)
	.venv/bin/python -m pytest -n auto

lint: $(STAMP)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

clean:
	rm -rf .venv .uv
