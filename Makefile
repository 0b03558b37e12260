# make quickstart   train a teacher and a distilled DeiT on real images, and look at the result
# make check        lint, types and the tests of single functions: what to run at every change
# make test         lint, types and all tests but the dear ones
# make test-slow    those: whole runs that are killed, several processes, TPU compilations
# make test-all     both
# make docs         the documentation site, in build/site
# Each makes its own virtual environment in .venv first. PYTHON=python3.12 chooses the interpreter;
# TEST_TORCH=0 leaves out PyTorch, timm and transformers, the references of the parity tests;
# TEST_TPU=0 the tests that compile for TPUs.

PYTHON ?= python3
TEST_TORCH ?= 1
BIN := .venv/bin
WORKDIR ?= runs/quickstart
# Setuptools' default mode loses to a folder of the package's name, such as this one seen from above.
# It calls the other one transitional, in a banner that whoever installs this can do nothing about.
INSTALL_EDITABLE = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet \
	--config-settings editable_mode=compat --editable
TORCH = torch==2.13.0
# torchvision and timm name torch as a dependency; --no-deps keeps them from replacing it, and
# torchax from touching jax.
TORCH_PEERS = torchvision==0.28.0 timm==1.0.31 torchax==0.0.13
# Trackio asks for an older Pillow, which the tests of decoding shall not get.
# It asks for an Orbax of another time, and uses none here.
JAX2ONNX = jax2onnx==0.17.1
# TensorFlow lies beside the others, so that no test finds it where nobody has it.
TENSORFLOW = tensorflow-cpu==2.21.0 astunparse gast google-pasta h5py keras namex optree wrapt
TRACKIO = trackio==0.43.0
TRACKIO_NEEDS = brotli "gradio_client>=2,<3" "httpx<1" "orjson>=3,<4" python-multipart "starlette<2" \
	"uvicorn<1"
# So does Gradio, the page of `deit demo`.
GRADIO = gradio==6.31.0 hf-gradio==0.4.1
GRADIO_NEEDS = "fastapi<1" gradio_client==2.7.2 groovy jinja2 "pandas<4" pydub pytz "safehttpx<0.2" semantic-version \
	"tomlkit<0.15" "typer<1" 'audioop-lts<=0.2.2; python_version >= "3.13"'

.PHONY: quickstart check test test-slow test-all lint types docs clean

quickstart: .venv/installed
	$(BIN)/deit train --config=configs/quickstart.py --workdir="$(WORKDIR)"

# Whole files go to one process, as their tests share runs and compiled programs.
PYTEST = TEST_TORCH=$(TEST_TORCH) $(BIN)/python -m pytest
INSTALLED = .venv/installed-test .venv/installed-torch-$(TEST_TORCH) .venv/browser

# What has a test of its own for every function, and trains nothing.
QUICK = $(patsubst %,tests/test_%.py,attention augment config_files distributed docs front hlo idx_source losses \
	mixing noise optim originals pixels pos_embed release sources storage style trajectory wds_source \
	workdir)

check: $(INSTALLED) lint types
	$(PYTEST) $(QUICK)

test: $(INSTALLED) lint types
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(INSTALLED) .venv/installed-tensorflow
	$(PYTEST) -n 2 --dist loadfile -m "slow and not long"

test-all: test test-slow

types: .venv/installed-test
	$(BIN)/mypy

# Its theme tells whoever builds with it of its successor; there is nothing to do about that here.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "the site: build/site/index.html"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'deit_jax needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

# The files below only record that an installation succeeded; a changed setup.cfg repeats it.
.venv/installed: setup.cfg pyproject.toml .venv/bin/python
	$(INSTALL_EDITABLE) ".[viz]"
	touch $@

.venv/installed-test: setup.cfg pyproject.toml Makefile .venv/bin/python
	$(INSTALL_EDITABLE) ".[viz,test]"
	$(BIN)/python -m pip install --quiet $(TRACKIO_NEEDS)
	$(BIN)/python -m pip install --quiet --no-deps "$(TRACKIO)" "$(JAX2ONNX)"
	$(BIN)/python -m pip install --quiet $(GRADIO_NEEDS)
	$(BIN)/python -m pip install --quiet --no-deps $(GRADIO)
	touch .venv/installed $@

.venv/installed-tensorflow: Makefile .venv/installed-test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/tensorflow $(TENSORFLOW) \
		|| echo "TensorFlow has no wheel for this Python: the test of its format is left out"
	touch $@

.venv/installed-docs: setup.cfg pyproject.toml .venv/bin/python
	$(INSTALL_EDITABLE) ".[viz,docs]"
	touch .venv/installed $@

.venv/installed-torch-1: setup.cfg Makefile .venv/installed-test
	$(BIN)/python -m pip install --quiet "$(TORCH)" transformers huggingface_hub
	$(BIN)/python -m pip install --quiet --no-deps $(TORCH_PEERS)
	touch $@

.venv/installed-torch-0: .venv/installed-test
	touch $@

# A browser for the tests of pages: the machine's own, Debian's, or playwright's. Without any, they are skipped.
BROWSERS = chromium chromium-browser google-chrome chrome microsoft-edge msedge
.venv/browser: .venv/installed-test
	@for name in $(BROWSERS); do command -v $$name >/dev/null && break; done \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update --quiet=2 \
	&& apt-get install --quiet=2 --yes --no-install-recommends chromium; } \
	|| $(BIN)/playwright install chromium-headless-shell \
	|| echo "no browser to be had: the tests of pages are skipped" >&2
	touch $@

clean:
	rm -rf .venv build *.egg-info
