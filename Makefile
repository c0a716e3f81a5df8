# Everything a newcomer needs: `make demo` and `make test`. Both make their own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
comma := ,

.PHONY: demo test test-slow peers tpu lint setup clean

demo: $(VENV)/.ready-demo
	@test -d out/nano || $(BIN)/python -m convert.random_checkpoint vl2-nano out/nano
	@echo "The model below is vl2-nano with RANDOM weights: its answer shows that everything runs, and means nothing."
	$(BIN)/vl2 generate --model out/nano --image assets/grace_hopper.jpg \
	  --prompt "Who is this?" --max-tokens 40 --save-boxes out/demo.png

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n $(WORKERS) -q

test-slow: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n $(WORKERS) -q -m slow

peers: $(VENV)/.ready-peers
	$(BIN)/python -m pytest -q -rP tests/peers

# The TPU compiler comes as a wheel. It has an environment of its own: it writes to the terminal wherever jax starts.
tpu:
	$(MAKE) .venv-tpu/.ready-tpu VENV=.venv-tpu
	.venv-tpu/bin/python -m pytest -n $(WORKERS) -q tests/tpu
	.venv-tpu/bin/python benchmarks/kernels.py --sizes small --tokens 8 512

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready-dev

$(VENV)/.ready-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e "$(if $(filter demo,$*),.,.[$(if $(filter tpu,$*),test$(comma))$*])"
	touch $@

clean:
	rm -rf $(VENV) out dist
