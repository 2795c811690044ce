# One command each. On a fresh machine each of them first makes .venv; it needs Python 3.11 or newer, and make.

PYTHON ?= python3
# More test processes than cores: the recovery tests mostly wait.
WORKERS ?= 5
MINUTES ?= 20
ARGS ?=
# Where the tests run: here, or in one of the two that `make matrix` makes.
VENV ?= .venv

# Demo, soak and tests start hundreds of processes: none of them is to compile everything again.
unexport PYTHONDONTWRITEBYTECODE

INSTALLED := .venv/.installed
EXTRAS := local,postgres,prometheus,docs,dev

.DEFAULT_GOAL := help
.PHONY: help demo soak run test versions browser matrix chaos bench docs lint format clean .venv

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv  ## break everything for a few minutes and count what was lost (ARGS=...)
	.venv/bin/python -m demo $(ARGS)

soak: .venv  ## break everything for MINUTES=20 on PostgreSQL, and see that nothing is lost and nothing grows (ARGS=...)
	.venv/bin/python -m soak --minutes $(MINUTES) $(ARGS)

run: .venv  ## run the whole stack until Ctrl-C, with the admin in a browser (ARGS="--port 8001")
	.venv/bin/python -m config.run $(ARGS)

# With ARGS, what is left may be about one of the databases alone; pytest then ends with 5 on the other. So it does beside
# others when there is no such file, where it ends with 4 by itself. A machine that is too busy fails tests of real
# processes: what failed beside the others is run once more by itself, and fails for good.
define pytest
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(1) $(ARGS) || case $$? in \
		1) $(VENV)/bin/python -m pytest --last-failed --last-failed-no-failures none --exitfirst $(1) $(ARGS) ;; \
		5) $(if $(ARGS),$(VENV)/bin/python -m pytest --collect-only --quiet $(1) $(ARGS) || [ $$? = 5 ],false) ;; \
		*) false ;; \
	esac
endef

test: $(VENV)/.installed browser  ## see whether a change holds, on SQLite and PostgreSQL, in minutes (ARGS="-k name")
	$(VENV)/bin/python manage.py makemigrations --check --dry-run
	$(call pytest)
	$(call pytest,--postgres)

versions: $(VENV)/.installed browser
	$(call pytest,--postgres --versions --long)

# What is there is taken. Else Debian's, where that can be installed, or the one that Playwright downloads.
browser: $(VENV)/.installed  ## see that there is a Chromium for the tests in tests/browser
	@[ -n "$$(which chromium chromium-browser google-chrome 2>/dev/null)" ] \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends chromium; } \
		|| $(VENV)/bin/python -m playwright install chromium

matrix:  ## run all tests with the newest versions, the long ones too, and with the oldest what depends on them
	$(MAKE) test VENV=.venv-newest ARGS=--long
	$(MAKE) versions VENV=.venv-oldest

bench: .venv  ## measure speed and memory against their bars, and write benchmarks/RESULTS.md (10 minutes)
	.venv/bin/python -m benchmarks $(ARGS)

docs: .venv  ## make the pages in docs/ into HTML, and say where it is
	.venv/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	@echo "Open file://$(CURDIR)/build/docs/index.html"

chaos: .venv  ## explore seeded schedules of faults (SEED=... RUNS=1000 ARGS="--postgres --log --plant no_fence")
	.venv/bin/python -m tests.recovery.explorer $(if $(SEED),--seed $(SEED)) $(if $(RUNS),--runs $(RUNS)) $(ARGS)

lint: .venv  ## check format, style, types and migrations
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	.venv/bin/python manage.py makemigrations --check --dry-run

format: .venv  ## put the code into the format that lint wants
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:  ## remove .venv, the caches, and what `make run` keeps in var/
	rm -rf .venv .venv-oldest .venv-newest var build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(INSTALLED)  ## make the virtual environment (PYTHON=python3.12)

# Made from nothing whenever pyproject.toml changes, so that it never holds more than pyproject.toml asks for.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "This project needs Python 3.11 or newer, and '$(PYTHON)' is missing or older." >&2; \
		echo "Install one, or name one that you have: make $(or $(MAKECMDGOALS),.venv) PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

# Every Python that is new enough, newest first: on PATH, and pyenv's, which its commands on PATH do not start by
# themselves. With one Python alone, both ends have that.
PYTHONS = PATH=".venv/bin:$$PATH:$$(printf %s: "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin)" \
	.venv/bin/uv python list --no-python-downloads --only-installed '>=3.11' 2>/dev/null | awk '{ print $$2 }'

.venv-oldest/.installed: CHOICE = $(PYTHONS) | tail -1
.venv-oldest/.installed: RESOLUTION = lowest-direct
.venv-newest/.installed: CHOICE = $(PYTHONS) | head -1
.venv-newest/.installed: RESOLUTION = highest
.venv-oldest/.installed .venv-newest/.installed: $(INSTALLED)
	.venv/bin/uv venv --quiet --clear --seed --python "$$($(CHOICE))" $(@D)
	.venv/bin/uv pip install --quiet --python $(@D) --resolution $(RESOLUTION) --editable '.[$(EXTRAS)]'
	@touch $@
