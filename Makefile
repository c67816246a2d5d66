# Every target sets up its own virtual environment in .venv the first time and re-uses it after.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-layout demo-molecule test test-all test-lowest lint format docs clean

demo: CONFIG = shapes_p_graft
demo-layout: CONFIG = layout_p_graft
demo-molecule: CONFIG = molecule_p_graft
demo demo-layout demo-molecule: NAME = $(subst -,_,$@)
demo demo-layout demo-molecule: .venv/installed
	rm -rf runs/$(NAME)
	$(BIN)/lit-rlft fit --config configs/experiments/$(CONFIG).yaml --name $(NAME)
	$(BIN)/lit-rlft test --config configs/experiments/$(CONFIG).yaml --name $(NAME) \
		--ckpt_path runs/$(NAME)/checkpoints/last.ckpt

# Some tests start further processes: one thread each, or they wait for each other.
test-all: SLOW = -m "slow or not slow"
test test-all: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(SLOW)

# The tests at the lowest versions that pyproject.toml admits, of all but torch, in .venv-lowest.
test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/, the reference and the executed notebooks, in site/; a warning is an error.
docs: .venv/installed-docs
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

clean:
	rm -rf .venv .venv-lowest runs build site *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lit-rlft needs Python 3.11 or newer; run make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch .venv/installed $@

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch .venv/installed $@

.venv-lowest/installed: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv --clear .venv-lowest
	$(PYTHON) tests/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python -m pip install --quiet -e ".[dev]" -c .venv-lowest/lowest.txt
	touch $@
