# make demo    train a small language model to answer questions about video: 9 to 17 minutes on 2 CPU cores
# make test    run all tests with coverage, in two processes
# make check   check formatting, linting and types
# make env     create the environment in .venv
# make clean   remove the environment, caches and outputs

PYTHON ?= python3
BIN := .venv/bin
TEST_PROCESSES ?= 2

.PHONY: demo test check env clean

demo: env
	@echo "== download: trained weights and footage, 150 MB the first time"
	@$(BIN)/merv download
	@$(BIN)/merv demo

test: env
	@echo "== test: all tests and every example in the documentation"
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal \
		--cov --cov-report=term:skip-covered --cov-fail-under=90

check: env
	@echo "== formatting"
	@$(BIN)/ruff format --check .
	@echo "== linting"
	@$(BIN)/ruff check .
	@echo "== types"
	@$(BIN)/mypy

env: .venv/ready

# Created again only if the dependencies have changed.
.venv/ready: pyproject.toml setup.cfg constraints.txt
	@echo "== env: installing packages into .venv, 6 GB, a few minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
		--config-setting editable_mode=compat --editable ".[dev]"
	@touch $@

clean:
	@rm -rf .venv build dist outputs lightning_logs *.egg-info .coverage .*_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
