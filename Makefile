# make demo   the whole method on drawn shapes, on a CPU, with pictures
# make test   the test suite
# Both set up what they need first: Python packages in .venv, once. PYTHON=... chooses the interpreter (3.11 or later; by default the first there is).
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$python && exit; done; echo python3)
PIP = .venv/bin/python -m pip install

demo: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo.sh

test: .venv/installed
	.venv/bin/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

.venv/installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	$(PIP) -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs/demo data/shapes data/shapes-held-out

.PHONY: demo test clean
