# make demo | make test | make check      each creates what it needs in a fresh clone
# make demo FAST=1                        the demo's short form
# make demo STRUCTURED=1                  the demo with a pruned network for this machine
# make proto                              compile open_inference.proto, after a change of it
# make test-long                          the tests that take minutes: clean installs, every interpreter,
#                                         the real neural-compressor, all test models of the ONNX backend,
#                                         the real onnxruntime-gpu without a GPU (in .venv-gpu)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_VENV := .venv-gpu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-cpu.txt
INPUTS := pyproject.toml constraints.txt constraints-cpu.txt
OUT ?= demo-out

.PHONY: help demo test test-long check format proto clean

help:
	@sed -n 's/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "AIOS Edge needs Python 3.10 or newer; name one with: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	@echo "installing aios-edge[demo] into $(VENV) (a few minutes the first time)"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(INPUTS) | $(VENV)/.demo
	@echo "installing aios-edge[dev] into $(VENV)"
	@$(PIP) -e '.[demo,dev]'
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/aios-edge demo --out $(OUT) $(if $(FAST),--fast) $(if $(STRUCTURED),--structured)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest

## onnxruntime-gpu and onnxruntime lie in the same folder, so they can't share an environment.
$(GPU_VENV)/.installed: $(INPUTS)
	@echo "installing aios-edge[gpu,text] into $(GPU_VENV)"
	@$(PYTHON) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[gpu,text]' onnx pytest pytest-timeout
	@touch $@

test-long: $(VENV)/.dev $(GPU_VENV)/.installed
	@$(PIP) -e '.[demo,dev,neural-compressor]'
	@$(BIN)/python -m pytest -m long --timeout 1800
	@$(GPU_VENV)/bin/python -m pytest tests/device_agent/test_onnxruntime_gpu.py

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: $(VENV)/.dev
	@cd device_agent/grpc_door && $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I. \
	  --descriptor_set_out=open_inference.binpb open_inference.proto

clean:
	rm -rf $(VENV) $(GPU_VENV) $(OUT) build dist
