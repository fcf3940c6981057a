# A fresh machine with Python 3.11 or newer needs nothing but `make demo` and `make test`.
PYTHON ?= $(shell for v in 3.12 3.11 3; do command -v python$$v >/dev/null 2>&1 && python$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo python$$v && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
VENV_INTEROP := .venv-interop
RUN_INTEROP := $(VENV_INTEROP)/bin/python
VENV_LAUNCH := .venv-launch
RUN_LAUNCH := $(VENV_LAUNCH)/bin/python
VENV_TPU := .venv-tpu
RUN_TPU := $(VENV_TPU)/bin/python

# Python writes the bytecode of what is imported; that of everything else would be half of the time.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

# Tests run in two processes: most of their time is the compiler's, which uses one core.
WORKERS ?= 2
# Huge pages for large blocks: a fifth of a training step's time on a CPU (docs/performance.md).
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export GLIBC_TUNABLES

.PHONY: setup demo smoke test test-browser test-faults test-interop test-launch benchmarks quality tpu-compile scaling lint lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(INSTALL) --requirement requirements.lock
	$(RUN) $(INSTALL) --no-deps --editable .
	@touch $@

# Trains on the embedded dataset and evaluates the teacher; a finished or interrupted runs/demo is continued.
demo: setup
	$(RUN) -m cmd_jax.main --config=configs/demo.py --workdir=runs/demo
	$(RUN) -m cmd_jax.eval --workdir=runs/demo

smoke: setup
	$(RUN) -m cmd_jax.main --config=configs/demo.py:smoke --workdir=runs/smoke
	$(RUN) -m cmd_jax.eval --workdir=runs/smoke

test: lint
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

# Runs that are killed, asked to stop, short of disk or given damaged checkpoints: minutes (docs/reliability.md).
test-faults: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal tests/faults

# The report in a headless Chromium, which the system provides; the package that drives it goes into the same environment.
test-browser: $(VENV)/.installed-browser
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
		echo "error: no Chromium found; install it, on Debian: apt-get install chromium"; exit 1
	$(RUN) -m pytest tests/browser

$(VENV)/.installed-browser: $(VENV)/.installed
	$(RUN) $(INSTALL) --constraint requirements.lock --editable '.[browser]'
	@touch $@

# Weights in and out beside PyTorch, transformers and ONNX Runtime, in an environment of their own.
test-interop: $(VENV_INTEROP)/.installed
	$(RUN_INTEROP) -m pytest -n $(WORKERS) --dist worksteal tests/interop

# The CPU build of PyTorch first and alone: the one on PyPI would bring gigabytes of CUDA.
$(VENV_INTEROP)/.installed: requirements-interop.lock setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV_INTEROP)
	$(RUN_INTEROP) $(INSTALL) --no-deps --extra-index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' requirements-interop.lock)
	$(RUN_INTEROP) $(INSTALL) --requirement requirements-interop.lock
	$(RUN_INTEROP) $(INSTALL) --no-deps --editable .
	@touch $@

# The files of launch/ without a cloud: a fake gcloud and Slurm, linters, schemas, SkyPilot; in an environment of their own.
test-launch: $(VENV_LAUNCH)/.installed
	$(RUN_LAUNCH) -m pytest -n $(WORKERS) --dist worksteal --confcutdir=tests/launch tests/launch

$(VENV_LAUNCH)/.installed: requirements-launch.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV_LAUNCH)
	$(RUN_LAUNCH) $(INSTALL) --requirement requirements-launch.lock
	@touch $@

# Ours against what it replaces, on this machine, each with a JSON object as its last line.
benchmarks: setup $(VENV_INTEROP)/.installed
	$(RUN) -m benchmarks.region_loss
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.input_pipeline
	$(RUN) -m benchmarks.evaluation

# Are CMD's features better than DINO's and EsViT's? Three methods and three seeds, nine runs as long as that of `make demo`.
# Call again after an interruption, it continues. With QUALITY=--preset=smoke it takes minutes, and shows that it runs.
quality: setup
	$(RUN) -m benchmarks.quality $(QUALITY)

# The train step compiled for TPU slices that are not here: does it fit their memory? Fails if it does not. More than ten minutes a case.
tpu-compile: $(VENV_TPU)/.installed
	$(RUN_TPU) -m benchmarks.tpu_compile

# What a step computes and sends on 1 to 256 chips, read from the compiled programs.
scaling: $(VENV_TPU)/.installed
	$(RUN_TPU) -m benchmarks.scaling --meshes cpu:1 cpu:2 cpu:4 cpu:8 v5e:1x1 v5e:2x2 v5e:2x4 v5e:16x16

# libtpu, the compiler, is 140 MB; where it is installed JAX looks for a TPU, so it has an environment of its own.
$(VENV_TPU)/.installed: requirements.lock setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV_TPU)
	$(RUN_TPU) $(INSTALL) --requirement requirements.lock
	$(RUN_TPU) $(INSTALL) --constraint requirements.lock 'jax[tpu]'
	$(RUN_TPU) $(INSTALL) --no-deps --editable .
	@touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Pins every dependency of the CPU set-up, and of the tests beside other projects, for Python 3.11 and newer.
COMPILE := $(VENV)/bin/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url --extra dev setup.cfg
lock: setup
	$(RUN) -m pip install --quiet uv
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --extra hf --extra interop --extra onnx --constraint requirements.lock | grep -vE '^(cuda|nvidia|triton)' > requirements-interop.lock
	$(VENV)/bin/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
		tests/launch/requirements.in --output-file requirements-launch.lock

clean:
	rm -rf $(VENV) $(VENV_INTEROP) $(VENV_LAUNCH) $(VENV_TPU) runs
