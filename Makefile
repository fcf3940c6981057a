# A fresh machine with Python 3.11 or newer needs nothing but `make demo` and `make test`.
PYTHON ?= $(shell for v in 3.12 3.11 3; do command -v python$$v >/dev/null 2>&1 && python$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo python$$v && break; done)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo smoke test lint lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# Trains on the embedded dataset and evaluates the teacher; a finished or interrupted runs/demo is continued.
demo: setup
	$(RUN) -m cmd_jax.main --config=configs/demo.py --workdir=runs/demo
	$(RUN) -m cmd_jax.eval --workdir=runs/demo

smoke: setup
	$(RUN) -m cmd_jax.main --config=configs/demo.py:smoke --workdir=runs/smoke
	$(RUN) -m cmd_jax.eval --workdir=runs/smoke

test: lint
	$(RUN) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Pins every dependency of the CPU set-up for Python 3.11 and newer.
lock: setup
	$(RUN) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url setup.cfg --output-file requirements.lock

clean:
	rm -rf $(VENV) runs
