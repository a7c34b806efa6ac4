# Every target builds its own environment in VENV with the first of these that runs: pyenv puts names on PATH that do not.
PYTHON := $(shell for p in python3.11 python3.12 python3.13; do $$p -c "import ensurepip" 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= --quiet --disable-pip-version-check
BENCHMARKS := ar_sampling diffusion_prior_step unet_step bsr dpm_solver lists pairs embeddings streaming \
  near_duplicates training_loop checkpoints reading generation tiny

.PHONY: help unit test test-browser test-slow test-pythons mutants chaos check bench gpu-check lock format peek demo \
  demo-bundle studio recording site dist clean

help:
	@echo "make peek    the whole chain at nano size: images over HTTP to a 1024 px image, in minutes"
	@echo "make demo    a world of drawings at tiny size; MINUTES=10 or 60 trains less or more than 20"
	@echo "make studio  a page to draw on with the demo's bundle, or with peek's where there is none"
	@echo "make site    these pages with the tables of the code, searchable, in build/site/index.html; a warning fails it"
	@echo "make dist    wheel and sdist of the commit in dist/, built twice, installed elsewhere and run there"
	@echo "make unit    the tests of functions and classes, in minutes      make check    format, lint, types"
	@echo "make test    these and all that start servers, clusters and commands      make test-slow    the slow ones"
	@echo "make test-browser    report, studio and site in Chromium, which has to be on PATH (Debian: apt-get install chromium)"
	@echo "make test-pythons    unit and dist on each of PYTHONS that runs here: some GB each, in build/"
	@echo "make chaos   real faults: N=50 slices of SEED=1, a minute each, OF=data or training; goes on where it stopped"
	@echo "make mutants    faults that no test notices, in FILE=models/diffusion/process.py"
	@echo "make gpu-check    does a GPU compute what a CPU does, and how fast? 12 minutes; ARGS='--preset karlo --gpus 8'"
	@echo "make bench   what the stages cost against peers and bounds, in about an hour on an idle machine"

ifeq ($(PYTHON),)
$(VENV)/ready:
	@echo "Python 3.11, 3.12 or 3.13 is needed, with venv, and none on PATH runs. On Debian or Ubuntu: apt-get install python3.11-venv; elsewhere: uv python install 3.11"
	@exit 1
else
# Without warnings: the first words that a user reads would be the build tool's remarks on editable installations.
# editable_mode=compat, because mypy and editors follow a path to this folder, and no import hook.
# bsrgan, a peer of tests and benchmarks, without its requirements: one would replace OpenCV by another build of it.
# requirements.lock has the versions that everything was tested with; other packages may come beside them, such as CUDA's.
$(VENV)/ready: pyproject.toml requirements.lock
	@echo "Installing packages into $(VENV): some minutes, without a word"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install $(PIP_FLAGS) --constraint requirements.lock --config-settings editable_mode=compat --editable '.[demo,dev,docs,reference]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps bsrgan==0.1.5
	@touch $(VENV)/ready
endif

unit: $(VENV)/ready
	$(BIN)/python -m pytest -m "not integration and not slow and not browser" -n 2 --dist loadfile

# A process that crashes ends the tests: the rest of its files would be waited for without end.
test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not browser" -n 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations 15

test-browser: $(VENV)/ready
	$(BIN)/python -m pytest -m browser -n 2 --dist loadfile $(shell grep -lr --include="*.py" "^pytestmark = pytest.mark.browser" tests)

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

# Each has an environment in build/. The other targets take the first Python that they find, which is 3.11 where it is there.
PYTHONS ?= python3.12 python3.13

test-pythons:
	@for python in $(PYTHONS); do \
	  if ! $$python -c 'import ensurepip, venv' 2> /dev/null; then \
	    echo "SKIPPED: $$python does not run here, or makes no environment (Debian: apt-get install $$(basename $$python)-venv)"; \
	  else $(MAKE) unit dist PYTHON=$$python VENV=build/$$(basename $$python) || exit 1; fi; \
	done

FILE ?= models/diffusion/process.py

mutants: $(VENV)/ready
	$(BIN)/python -m tests.mutants $(FILE)

# Slices that are done are not done again; out/chaos holds what they found.
N ?= 50
SEED ?= 1
OF ?= data

chaos: $(VENV)/ready
	$(BIN)/python -m tests.chaos --of $(OF) --slices $(N) --seed $(SEED)

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint cluster/Dockerfile cluster/efa.Dockerfile

bench: $(VENV)/ready
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

# Needs a GPU, unless ARGS="--device cpu --quick".
gpu-check: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu_check --json out/gpu-check.json $(ARGS)

# The newest versions within the bounds of pyproject.toml, without the local part (such as +cpu) that a machine decides.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install $(PIP_FLAGS) --editable '.[demo,dev,docs,reference]'
	build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort --ignore-case > requirements.lock
	rm -rf build/lock

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

peek: $(VENV)/ready
	$(BIN)/unclip peek

# At 20, which is scale 1, demo takes 20 to 30 minutes on two cores. Trainings see that much more or less.
MINUTES ?= 20

demo: $(VENV)/ready
	$(BIN)/unclip demo scale=$(shell awk "BEGIN { print $(MINUTES) / 20 }")

# The file that --from demo fetches, and its hash, by which it is known. They go with a release.
demo-bundle: demo
	rm -f out/unclip-demo.zip
	$(BIN)/unclip export out/demo --to out/unclip-demo.zip --license CC0-1.0
	cd out && sha256sum unclip-demo.zip > ../configs/demo.sha256

# Without make demo, the models of make peek draw: they are made in minutes, if need be, and draw worse.
studio: $(VENV)/ready
	@if [ -e out/demo/bundle.json ]; then exec $(BIN)/unclip serve out/demo; fi; \
	echo "out/demo has no bundle yet (make demo): the studio draws with make peek's nano models, which know little"; \
	if [ ! -e out/nano/bundle.json ]; then $(BIN)/unclip peek || exit 1; fi; exec $(BIN)/unclip serve out/nano

# docs/images/peek.svg, of a real run: minutes.
recording: $(VENV)/ready
	$(BIN)/python -m tests.recording docs/images/peek.svg

# Of the commit, not of the working tree, so that whoever builds the commit again gets the same bytes.
dist: $(VENV)/ready
	$(BIN)/python -m tests.dist dist
	$(BIN)/python -m pytest -m slow tests/test_dist.py

site: $(VENV)/ready
	$(BIN)/python -m tests.site build/docs
	$(BIN)/zensical build --clean

clean:
	rm -rf out build dist .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
