# The commands of a clone. `make VENV=elsewhere`, `make PYTHON=python3.12` and `make INSTALL="uv pip install --python
# .venv/bin/python"` change where, with what and how the environment is made.

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
INSTALL ?= $(PY) -m pip install

.PHONY: help env train test check clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

env: $(VENV)/.fdml  ## make the environment, or bring it up to date with pyproject.toml

# The stamp is touched only by an installation that went through. An environment made by hand is kept and completed.
$(VENV)/.fdml: pyproject.toml
	@py=$(PY); test -x $$py || py=$(PYTHON); \
	$$py -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "fdml needs Python 3.11 or newer, which $$py is not: make clean env PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || { rm -f $(VENV)/bin/python*; $(PYTHON) -m venv $(VENV); }
	$(INSTALL) -e ".[dev]"
	@touch $@

train: env  ## train a robust classifier on the embedded data and report how it withstands attacks
	$(VENV)/bin/fdml train

test: env  ## run the tests
	$(PY) -m pytest

check: env  ## lint, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@$(call lay-out-types,build/types)
	$(VENV)/bin/basedpyright --pythonpath $(PY)

# Every source at the place of its import name, as a link: pyright does not follow package-dir in pyproject.toml.
define lay-out-types
rm -rf $(1) && \
find $(wildcard fdml export serve demo tests benchmarks) -name '*.py' | while read -r file; do \
	case $$file in export/*|serve/*|demo/*) to=$(1)/fdml/$$file;; *) to=$(1)/$$file;; esac; \
	mkdir -p "$$(dirname "$$to")" && ln -s "$(CURDIR)/$$file" "$$to" || exit 1; \
done
endef

clean:  ## remove the environment, what was built and the caches; runs/ is kept
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
