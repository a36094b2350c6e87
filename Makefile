SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PY := .venv/bin/python

.venv/.installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch==2.13.0
	$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: test
test: .venv/.installed
	$(PY) -m pytest

.PHONY: demo
demo: .venv/.installed
	$(PY) examples/digits.py
