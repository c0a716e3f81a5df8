# Everything a newcomer needs: `make demo` and `make test`. Both make their own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TESTS ?= tests
comma := ,
AS_USERS := XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"

.PHONY: demo web serve load test test-slow web-test peers harness tpu vllm lint setup docs wheel wheel-test notebooks clean

demo: $(VENV)/.ready-plain
	@mkdir -p out
	$(BIN)/vl2 generate --model vl2-nano --image assets/scene.png --prompt "What is written here?"
	$(BIN)/vl2 generate --model vl2-nano --image assets/scene.png --save-boxes out/demo.png \
	  --prompt "<|grounding|>What do you see?"

web: $(VENV)/.ready-demo
	$(BIN)/vl2 demo vl2-nano

serve: $(VENV)/.ready-serve
	$(BIN)/vl2 serve vl2-nano

load: $(VENV)/.ready-serve
	$(BIN)/python benchmarks/load.py

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q $(TESTS)

# These compute more than they compile, so they are compiled as users compile (tests/conftest.py).
test-slow: $(VENV)/.ready-test
	$(AS_USERS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m slow

# The page in a browser: Debian's Chromium, installed where it is missing and may be.
web-test: $(VENV)/.ready-web
	@command -v chromium >/dev/null || (apt-get update -q && apt-get install -q -y --no-install-recommends chromium)
	$(BIN)/python -m pytest -q tests/demo/browser

peers: $(VENV)/.ready-peers
	$(BIN)/python -m pytest -q -rP tests/peers

# lmms-eval brings torch and many others, 6 GB of them, and asks for older releases of some: an environment of its own.
harness:
	$(MAKE) .venv-harness/.ready-harness VENV=.venv-harness
	.venv-harness/bin/python -m pytest -q -rP tests/harness

# The TPU compiler comes as a wheel. It has an environment of its own: it writes to the terminal wherever jax starts.
tpu: LONGEST := tests/tpu/test_plans.py
tpu:
	$(MAKE) .venv-tpu/.ready-tpu VENV=.venv-tpu
	.venv-tpu/bin/python -m pytest -n $(WORKERS) --maxschedchunk 1 -q $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/tpu/test_*.py))
	.venv-tpu/bin/python benchmarks/kernels.py --targets v5e --sizes small --tokens 8 512

# vLLM pins 260 packages, 10 GB of them, and the newest JAX: an environment of its own, with Python 3.12. On a CPU.
vllm:
	$(MAKE) .venv-vllm/.ready-vllm-test VENV=.venv-vllm PYTHON=$(if $(filter python3,$(PYTHON)),python3.12,$(PYTHON))
	.venv-vllm/bin/python -m pytest -q tests/vllm

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

setup: $(VENV)/.ready-dev

# A site that is read in a browser without a server or a network: out/website/site/index.html
docs: $(VENV)/.ready-docs
	$(BIN)/python -m docs.website

# For machines that have no checkout: pip install "$(ls dist/vl2_jax-*.whl)[tpu,train]"
wheel: $(BIN)/python
	rm -rf dist
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

# The fast tests of what people install: the wheel in an environment of its own, the tests in a folder where nothing
# else lies. Those of the checkout itself (tests/project) stay here. TESTS chooses some.
wheel-test: wheel
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check "$$(ls $(CURDIR)/dist/vl2_jax-*.whl)[test]"
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cp -r tests pyproject.toml "$$folder" && \
	  rm -r "$$folder/tests/project" && cd "$$folder" && unset PYTHONPATH && \
	  $(CURDIR)/.venv-wheel/bin/python -c "import vl2_jax; assert 'site-packages' in vl2_jax.__file__" && \
	  $(CURDIR)/.venv-wheel/bin/python -m pytest -n $(WORKERS) --dist loadfile -q $(TESTS)

# As somebody who opens them from a link: each begins where nothing is installed, and installs the wheel itself.
notebooks: wheel
	rm -rf .venv-notebooks
	$(PYTHON) -m venv .venv-notebooks
	.venv-notebooks/bin/python -m pip install -q --disable-pip-version-check nbclient ipykernel
	unset PYTHONPATH && VL2_WHEEL=$$(ls $(CURDIR)/dist/vl2_jax-*.whl) .venv-notebooks/bin/python notebooks/check.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e "$(if $(filter plain,$*),.,.[$(if $(filter tpu,$*),test$(comma))$*])"
	touch $@

clean:
	rm -rf $(VENV) .venv-* out dist
