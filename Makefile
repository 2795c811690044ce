# One command each. On a fresh machine each of them first makes .venv; it needs Python 3.11 or newer, and make.

PYTHON ?= python3
# More test processes than cores: the recovery tests mostly wait.
WORKERS ?= 4
MINUTES ?= 20
ARGS ?=

INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo soak run test postgres bench lint format clean .venv

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv  ## break everything for a few minutes and count what was lost (ARGS=...)
	.venv/bin/python -m demo $(ARGS)

soak: .venv  ## break everything for MINUTES=20 on PostgreSQL, and see that nothing is lost and nothing grows (ARGS=...)
	.venv/bin/python -m soak --minutes $(MINUTES) $(ARGS)

run: .venv  ## run the whole stack until Ctrl-C, with the admin in a browser (ARGS="--port 8001")
	.venv/bin/python -m config.run $(ARGS)

test: .venv  ## run every test; they start their own servers (ARGS="-k name")
	.venv/bin/python manage.py makemigrations --check --dry-run
	.venv/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

postgres: .venv  ## run the integration and recovery tests on PostgreSQL, which they start
	.venv/bin/python -m pytest -n $(WORKERS) --dist worksteal --postgres tests/integration tests/recovery $(ARGS)

bench: .venv  ## measure speed and memory against their bars, and write benchmarks/RESULTS.md (10 minutes)
	.venv/bin/python -m benchmarks $(ARGS)

lint: .venv  ## check format, style, types and migrations
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	.venv/bin/python manage.py makemigrations --check --dry-run

format: .venv  ## put the code into the format that lint wants
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:  ## remove .venv, the caches, and what `make run` keeps in var/
	rm -rf .venv var build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(INSTALLED)  ## make the virtual environment (PYTHON=python3.12)

# Made from nothing whenever pyproject.toml changes, so that it never holds more than pyproject.toml asks for.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "This project needs Python 3.11 or newer, and '$(PYTHON)' is missing or older." >&2; \
		echo "Install one, or name one that you have: make $(or $(MAKECMDGOALS),.venv) PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[local,postgres,dev]'
	@touch $@
