# Every target builds its own environment in .venv with whichever of python3.11 and python3.12 exists.
PYTHON := $(shell command -v python3.11 || command -v python3.12)
BIN := .venv/bin
PIP_FLAGS ?= --quiet --disable-pip-version-check

.PHONY: help test test-slow check format peek demo clean

help:
	@echo "make peek    the whole chain at nano size: pictures over HTTP to a 1024 px image, in minutes"
	@echo "make demo    the emoji set at tiny size"
	@echo "make test    the tests      make test-slow    the slow ones      make check    format, lint, types"

ifeq ($(PYTHON),)
.venv/ready:
	@echo "Python 3.11 or 3.12 is needed and neither is on PATH. On Debian or Ubuntu: apt-get install python3.11-venv; elsewhere: uv python install 3.11"
	@exit 1
else
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[demo,dev,reference]'
	@touch .venv/ready
endif

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

peek: .venv/ready
	$(BIN)/unclip run configs/nano.yaml

demo: .venv/ready
	$(BIN)/unclip run configs/emoji.yaml

clean:
	rm -rf out build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
