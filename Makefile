# make search | make test: both make the environment first. PYTHON=python3.12 make ... picks another interpreter.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(if $(shell $(name) -c 'import sys; print(sys.version_info[:2] in ((3, 11), (3, 12)) or "")' 2>/dev/null | grep True),$(name))))

.PHONY: help search test test-slow coverage lint docs clean
help:
	@echo "make search     find the visual groups of the handwritten digits (--dataset digits)"
	@echo "make test       linters and the quick tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make coverage   which lines of the rooms without Ray the quick tests run"
	@echo "make docs       the API reference, from the docstrings, into site/"
	@echo "make clean      remove the environment"

$(VENV)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; name one: PYTHON=/path/to/python3.11 make" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	@echo "installing (some minutes, about 8 GB)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

search: $(VENV)/ready
	$(BIN)/python -m cedm_ray.search --dataset digits

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Side by side, each on one thread, but for the tests that start Ray: that has the machine to itself.
QUICK = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow and not gpu"
test: lint
	$(QUICK)
	$(BIN)/python -m pytest -m "ray and not slow and not gpu"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

ROOMS := data features clustering granularity diffusion metrics report weights
coverage: $(VENV)/ready
	$(QUICK) $(ROOMS:%=--cov=cedm_ray.%) --cov-branch --cov-report=term:skip-covered --cov-fail-under=90

docs: $(VENV)/ready
	$(BIN)/python -m pdoc --docformat google --output-directory site cedm_ray

clean:
	rm -rf $(VENV)
