# Two commands for a newcomer: `make demo` and `make test`. Each sets up the virtual environment
# on its first run. PYTHON picks the interpreter (3.11 or newer), VENV the folder.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo downstream ablation test test-slow soak docs gpu lint format install clean

help:
	@echo "make demo    make synthetic clips, pretrain on them for some minutes, write a report"
	@echo "make test    run the tests"
	@echo "make docs    build the documentation into build/docs"
	@echo "make downstream   pretrain, fine-tune for sound, video and both, print a table"
	@echo "make ablation     compare fusions and objectives of pretraining in the same way"
	@echo "make gpu     test the kernels on this machine's GPU, then measure; STAGE=tests: test alone"
	@echo "make soak    kill runs 200 times, train with several processes, feed 10,000 damaged files of"
	@echo "             each kind; at most 20 minutes on two idle cores"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove the virtual environment, build products and the demo's files"

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is incomplete:" \
	  "install your system's package for it (Debian and Ubuntu: python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,dev,docs]'
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/avmae synth $(DEMO)/clips --preset demo
	$(BIN)/avmae pretrain demo --set data.manifest=$(DEMO)/clips/manifest.csv --set train.out=$(DEMO)/run --restart $(DEMO_ARGS)

downstream: $(STAMP)
	mkdir -p downstream
	$(BIN)/python -m benchmarks.downstream --folder downstream $(DOWNSTREAM_ARGS)

ablation: $(STAMP)
	mkdir -p downstream
	$(BIN)/python -m benchmarks.ablation --folder downstream $(DOWNSTREAM_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(TEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(TEST_ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/docs/index.html"

# The wheel holds no soak/, so the modules are found through the checkout.
soak: $(STAMP)
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(BIN)/python -m soak $(SOAK_ARGS)

# Runs in the environment of PYTHON as it is: a GPU machine brings its own torch and Triton.
# STAGE names stages (tests rivals step curve kernels peers largest ablation), each of at most eight
# minutes; without it all run, in this order, and those that have finished are not run again.
gpu:
	@PYTHONPATH=kernels $(PYTHON) -c 'import avmae_kernels._C' 2>/dev/null || \
	  $(PYTHON) setup.py -q build_ext --inplace || true
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.stages $(if $(STAGE),--stage $(STAGE)) \
	  $(if $(RESULTS),--results $(RESULTS)) $(GPU_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) downstream build *.egg-info kernels/avmae_kernels/_C*.so
