# A fresh machine with Python 3.11 or newer needs nothing but `make demo` and `make test`.
PYTHON ?= $(shell for v in 3.12 3.11 3; do command -v python$$v >/dev/null 2>&1 && python$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo python$$v && break; done)
RUN := .venv/bin/python

# Python writes the bytecode of what is imported; that of everything else would be half of the time.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE  # which some images of containers set

# Tests run in two processes: most of their time is the compiler's, which uses one core.
WORKERS ?= 2
# Huge pages for large blocks: a fifth of a training step's time on a CPU (docs/performance.md).
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export GLIBC_TUNABLES

.PHONY: setup demo smoke test test-browser test-faults test-interop test-launch benchmarks accelerator quality tpu-compile scaling lint lock clean

setup: .venv/.installed

# $(call environment,DIRECTORY,LOCK FILE,ARGUMENTS OF PIP BEFORE IT): a virtual environment with this package.
define environment
$(1)/.installed: $(2) setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(1)
	$(if $(3),$(1)/bin/python $(INSTALL) $(3))
	$(1)/bin/python $(INSTALL) --requirement $(2)
	$(if $(4),$(1)/bin/python $(INSTALL) $(4))
	$(1)/bin/python $(INSTALL) --no-deps --editable .
	@touch $$@
endef
$(eval $(call environment,.venv,requirements.lock))
# PyTorch, transformers and ONNX Runtime; the CPU build of PyTorch first, the one on PyPI would bring gigabytes of CUDA.
TORCH_CPU = --no-deps --extra-index-url https://download.pytorch.org/whl/cpu $(shell grep '^torch==' requirements-interop.lock)
$(eval $(call environment,.venv-interop,requirements-interop.lock,$(TORCH_CPU)))
# SkyPilot, linters and schemas for the launch tests.
$(eval $(call environment,.venv-launch,requirements-launch.lock))
# libtpu, the compiler, is 140 MB; where it is installed JAX looks for a TPU.
$(eval $(call environment,.venv-tpu,requirements.lock,,--constraint requirements.lock 'jax[tpu]'))
$(eval $(call environment,.venv-gpu,requirements.lock,,--constraint requirements.lock 'jax[cuda12]'))
# By what this machine has.
ACCELERATED := .venv$(if $(wildcard /dev/nvidia0),-gpu,$(if $(wildcard /dev/accel0 /dev/vfio/0),-tpu))

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
test-browser: .venv/.installed-browser
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
		echo "error: no Chromium found; install it, on Debian: apt-get install chromium"; exit 1
	$(RUN) -m pytest tests/browser

.venv/.installed-browser: .venv/.installed
	$(RUN) $(INSTALL) --constraint requirements.lock --editable '.[browser]'
	@touch $@

# Weights in and out beside PyTorch, transformers and ONNX Runtime.
test-interop: .venv-interop/.installed
	.venv-interop/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/interop

# The files of launch/ without a cloud: a fake gcloud and Slurm, linters, schemas, SkyPilot.
test-launch: .venv-launch/.installed
	.venv-launch/bin/python -m pytest -n $(WORKERS) --dist worksteal --confcutdir=tests/launch tests/launch

# Ours against what it replaces, on this machine, each with a JSON object as its last line.
benchmarks: setup .venv-interop/.installed
	$(RUN) -m benchmarks.region_loss
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.input_pipeline
	$(RUN) -m benchmarks.evaluation

# What this machine's GPU or TPU does, in eight minutes; again it continues. Of a CPU it has nothing to say, but runs.
accelerator: $(ACCELERATED)/.installed
	$(ACCELERATED)/bin/python -m benchmarks.accelerator $(ACCELERATOR)

# Are CMD's features better than DINO's and EsViT's? Three methods and three seeds, nine runs as long as that of `make demo`.
# Call again after an interruption, it continues. With QUALITY=--preset=smoke it takes minutes, and shows that it runs.
quality: setup
	$(RUN) -m benchmarks.quality $(QUALITY)

# The train step compiled for TPU slices that are not here: does it fit their memory? Fails if it does not. More than ten minutes a case.
tpu-compile: .venv-tpu/.installed
	.venv-tpu/bin/python -m benchmarks.tpu_compile

# What a step computes and sends on 1 to 256 chips, read from programs compiled for simulated devices.
scaling: setup
	$(RUN) -m benchmarks.scaling --devices 1 2 4 8 256

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Pins every dependency of the CPU set-up, and of the tests beside other projects, for Python 3.11 and newer.
COMPILE := .venv/bin/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url --extra dev setup.cfg
lock: setup
	$(RUN) -m pip install --quiet uv
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --extra hf --extra interop --extra onnx --constraint requirements.lock | grep -vE '^(cuda|nvidia|triton)' > requirements-interop.lock
	.venv/bin/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
		tests/launch/requirements.in --output-file requirements-launch.lock

clean:
	rm -rf .venv .venv-interop .venv-launch .venv-tpu .venv-gpu runs
