SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test
MAKEFLAGS += --no-builtin-rules

PY := .venv/bin/python
INSTALLED := .venv/.installed
BENCH_INSTALLED := .venv/.installed-bench
FUZZ_INSTALLED := .venv/.installed-fuzz
DOCS_INSTALLED := .venv/.installed-docs
# Where Debian's package dataset-fashion-mnist puts it.
FASHION_MNIST := /usr/share/datasets/fashion-mnist

.PHONY: demo test test-slow lint types browser docs bench bench-quick clean

# The stamp is written last: an installation that broke off is begun again.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt torch==2.13.0
	.venv/bin/pip install -c constraints.txt -e ".[dev]"
	touch $@

# The browser in which the report is tested: from Debian, where we may install it. Without one its tests are skipped.
browser:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then echo "Chromium is there."; \
	elif test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium; } \
	    || echo "Chromium could not be installed: the report is not tested in a browser"; \
	else echo "No Chromium, and no right to install it: apt-get install chromium"; fi

demo: $(INSTALLED)
	$(PY) examples/digits.py

test: $(INSTALLED)
	$(PY) -m pytest -n auto

# Every campaign of docs/reliability.md at its full count, one after another. Some hours.
test-slow: $(FUZZ_INSTALLED)
	$(PY) -m pytest -m slow

$(FUZZ_INSTALLED): $(INSTALLED)
	.venv/bin/pip install -c constraints.txt -e ".[fuzz]"
	touch $@

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED)
	$(PY) -m mypy

$(DOCS_INSTALLED): $(INSTALLED)
	.venv/bin/pip install -c constraints.txt -e ".[docs]"
	touch $@

# The site, in build/site. Its pictures are those that the examples draw: one that is not there is drawn now.
docs: $(DOCS_INSTALLED)
	for name in digits diabetes text label_errors kernels; do \
	  test -f examples/out/$$name/$$name.png || $(PY) examples/$$name.py; \
	done
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

$(BENCH_INSTALLED): $(INSTALLED)
	.venv/bin/pip install -c constraints.txt -e ".[bench]"
	.venv/bin/pip install -c constraints.txt --no-deps backpack-for-pytorch
	touch $@

# The figures of docs/peers.md, docs/growth.md and of questions in docs/benchmarks.md are written anew, and what else is measured is printed. Some hours.
bench: $(BENCH_INSTALLED)
	$(PY) -m benchmarks.step_time
	$(PY) -m benchmarks.trainer_time
	$(PY) -m benchmarks.memory
	$(PY) -m benchmarks.queries --threads 1 --repeats 5 --docs docs/benchmarks.md
	$(PY) -m benchmarks.peers --docs docs/peers.md
	mkdir -p build
	$(PY) -m benchmarks.growth --docs docs/growth.md --json build/growth.jsonl
	$(PY) -m benchmarks.plots growth build/growth.jsonl docs/plots
	if test -d "$(FASHION_MNIST)"; then \
	  $(PY) -m benchmarks.faithfulness "$(FASHION_MNIST)"; \
	  $(PY) -m benchmarks.sketches "$(FASHION_MNIST)" build/sketches; \
	  $(PY) -m benchmarks.grid "$(FASHION_MNIST)" build/sketches; \
	  $(PY) -m benchmarks.plots grid build/sketches/grid.jsonl docs/plots; \
	  for m in "cnn 16-32" "cnn 8-16"; do $(PY) -m benchmarks.bytes "$(FASHION_MNIST)" --model "$$m"; done; \
	  $(PY) -m benchmarks.attribution "$(FASHION_MNIST)" --docs docs/peers.md; \
	  $(PY) -m benchmarks.literal "$(FASHION_MNIST)" --docs docs/peers.md; \
	  $(PY) -m benchmarks.label_errors "$(FASHION_MNIST)" --json build/label-errors.jsonl; \
	  $(PY) -m benchmarks.label_errors "$(FASHION_MNIST)" --json build/label-errors.jsonl --docs docs; \
	else echo "contributions not measured: make bench FASHION_MNIST=DIRECTORY of the *-ubyte.gz files"; fi

# Whether all of it runs: minutes, and nothing is written.
bench-quick: $(BENCH_INSTALLED)
	$(PY) -m benchmarks.peers --quick
	$(PY) -m benchmarks.growth --quick
	$(PY) -m benchmarks.queries --examples 2000 --nodes 4 --sketch-dim 64 --repeats 1
	if test -d "$(FASHION_MNIST)"; then \
	  $(PY) -m benchmarks.attribution "$(FASHION_MNIST)" --quick; \
	  $(PY) -m benchmarks.literal "$(FASHION_MNIST)" --quick; \
	  $(PY) -m benchmarks.label_errors "$(FASHION_MNIST)" --json build/label-errors-quick.jsonl --quick; \
	else echo "contributions not measured: make bench-quick FASHION_MNIST=DIRECTORY of the *-ubyte.gz files"; fi

# What was made, but not the environment, which takes minutes: remove .venv by hand.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache examples/out runs lightning_logs
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
