# make demo        the whole method on drawn shapes, on a CPU, with images
# make test        the test suite
# make test-fast   what of it needs no process of its own: under a minute
# make lint        ruff, by pyproject.toml
# make clean       removes what the others made
#
# Each sets up what it needs first: Python packages in .venv, once.
# PYTHON=... chooses the interpreter (3.11 or later; by default the first there is).
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
    $$python -c '$(NEW_ENOUGH)' 2> /dev/null && echo $$python && exit; done; echo python3)
PIP = .venv/bin/python -m pip install
PYTEST = .venv/bin/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

demo: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo.sh

test: .venv/installed
	$(PYTEST)

test-fast: .venv/installed
	$(PYTEST) -m "not slow"

lint: .venv/installed
	.venv/bin/python -m ruff check

.venv/installed: requirements.txt
	@$(PYTHON) -c '$(NEW_ENOUGH)' || \
	    { echo "Python 3.11 or later is needed, this is $$($(PYTHON) --version)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	$(PIP) -r requirements.txt
	touch $@

clean:
	rm -rf .venv .ruff_cache .pytest_cache runs/demo data/shapes data/shapes-held-out

.PHONY: demo test test-fast lint clean
