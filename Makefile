# Two commands: `make demo` and `make test`. Each makes its own environment first if it is missing.
#
# On a machine without a GPU, PyTorch's CPU build saves several GB of downloads:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= 2
OUT ?= runs/demo

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# The exact version is asked for by itself and first: any looser request may pull other builds.
TORCH := $(shell grep '^torch==' constraints.txt)

# With two threads and a second busy process, spinning threads slow PyTorch down fiftyfold.
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1

.PHONY: demo test pytest lint format clean

demo: $(STAMP)
	$(BIN)/star-elastic demo --out $(OUT)

# Side by side: the checks of types keep one core busy.
test: $(STAMP)
	+$(MAKE) --no-print-directory -j 2 lint pytest

pytest: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),-c constraints.txt) $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
