# The two commands of the README are `make demo` and `make test`; each sets up all it needs.
PY := .venv/bin/python
ONLY ?=
KEEP ?=
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help setup demo test check bench clean lock

help:
	@echo "make demo [KEEP=1]        a small shop on two nodes; shows what a mesh does"
	@echo "make test [ONLY=tests/…]  checks and tests"
	@echo "make check                ruff and mypy alone"
	@echo "make bench [ONLY=a,b]     the benchmarks; writes bench/results/latest.json"
	@echo "make clean                remove what was made here, the lab included"

setup:
	@deploy/setup.sh

demo: setup
	@$(PY) -m lab.demo $(if $(KEEP),--keep)

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

test: $(if $(ONLY),setup,check)
	@$(PY) -m pytest $(or $(ONLY),tests)

bench: setup
	@$(PY) -m bench $(if $(ONLY),--only $(ONLY))

lock: setup
	@.venv/bin/pip install -q pip-tools
	@.venv/bin/pip-compile -q --all-extras --generate-hashes --strip-extras --allow-unsafe --no-header \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o requirements.lock pyproject.toml
	@sed -i '1i # Made by `make lock` from pyproject.toml; every package pinned with its hashes. Not edited by hand.' requirements.lock

clean:
	@if [ -x $(PY) ]; then $(PY) -m pillion lab down --all; fi
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
