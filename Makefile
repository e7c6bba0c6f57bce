# `make venv` builds .venv, `make test` runs every test and one of Ray's, `make test-ray` the others, `make test-gpu` those
# that need a GPU, `make demo` the demo,
# `make lint` the style check.
# Which vLLM: the CUDA build on a host with an NVIDIA GPU, else the CPU build; VARIANT=cpu overrides.

PYTHON  ?= python3.11
VENV    := .venv
BIN     := $(VENV)/bin
VARIANT ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
STAMP   := $(VENV)/.stamp-$(VARIANT)

.PHONY: venv browser test test-ray test-gpu demo lint clean

venv: $(STAMP)

# Rebuilt only when the dependencies may have changed; the package itself is installed editable.
# CPU: torch goes first and alone, so that the resolver keeps it instead of a build for another device.
# vLLM asks for torchvision, torchaudio and torchcodec without a version, and builds for another torch
# break every import of transformers ("operator torchvision::nms does not exist"). Nothing here needs
# them, so those that do not import go.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(VARIANT),cpu)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
endif
	$(BIN)/python -m pip install --quiet --editable ".[$(VARIANT),dev]"
ifeq ($(VARIANT),cpu)
	for package in torchvision torchaudio torchcodec; do \
		$(BIN)/python -c "import torch, $$package" >/dev/null 2>&1 \
		|| $(BIN)/python -m pip uninstall --quiet --yes $$package; \
	done
endif
	rm -f $(VENV)/.stamp-*
	touch $@

# Debian's Chromium and its driver, for the tests of the page.
browser:
	@test -x /usr/bin/chromium -a -x /usr/bin/chromedriver \
	|| (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver) \
	|| (echo "the tests of the page need /usr/bin/chromium and /usr/bin/chromedriver" && false)

# Two processes of one thread each, a file at a time in the order of tests/conftest.py; tests whose own processes wait
# busily for each other run alone afterwards.
test: venv browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not exclusive and not ray and not gpu"
	$(BIN)/python -m pytest -m "exclusive and not ray and not gpu"

# One after another: each test starts engines on both cores.
test-ray: venv
	$(BIN)/python -m pytest -m ray

# On a host with an NVIDIA GPU.
test-gpu: venv
	$(BIN)/python -m pytest -m gpu

demo: venv
	$(BIN)/vllm-dvlm demo

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
