# Every target sets up its own virtual environment in .venv the first time and re-uses it after.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-layout demo-molecule test lint format clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/lit-rlft fit --config configs/experiments/shapes_p_graft.yaml --name demo
	$(BIN)/lit-rlft test --config configs/experiments/shapes_p_graft.yaml --name demo \
		--ckpt_path runs/demo/checkpoints/last.ckpt

demo-layout: .venv/installed
	rm -rf runs/demo_layout
	$(BIN)/lit-rlft fit --config configs/experiments/layout_p_graft.yaml --name demo_layout
	$(BIN)/lit-rlft test --config configs/experiments/layout_p_graft.yaml --name demo_layout \
		--ckpt_path runs/demo_layout/checkpoints/last.ckpt

demo-molecule: .venv/installed
	rm -rf runs/demo_molecule
	$(BIN)/lit-rlft fit --config configs/experiments/molecule_p_graft.yaml --name demo_molecule
	$(BIN)/lit-rlft test --config configs/experiments/molecule_p_graft.yaml --name demo_molecule \
		--ckpt_path runs/demo_molecule/checkpoints/last.ckpt

# Some tests start further processes: one thread each, or they wait for each other.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lit-rlft needs Python 3.11 or newer; run make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch .venv/installed $@
