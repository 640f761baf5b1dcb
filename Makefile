# `make` lists the targets. All but help and clean create .venv first, from the versions of constraints.txt.
# Without a GPU, point pip at PyTorch's CPU wheels to save a download of some gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make reproduce

comma := ,
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= workflow,language,images,test
SCALE ?= laptop
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
export OMP_WAIT_POLICY ?= PASSIVE
unexport PYTHONDONTWRITEBYTECODE  # else every process, of some 150, compiles torch and transformers anew

.DEFAULT_GOAL := help
.PHONY: help smoke reproduce test test-long mutants faults check format benchmark reference clean env

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

smoke: env  ## everything with tiny models into results/smoke: two minutes, the numbers mean nothing
	$(BIN)/snakemake --cores all --config scale=smoke

reproduce: env  ## everything at the scale of config/config.yaml into results: hours
	$(BIN)/snakemake --cores all

test: env check  ## check, then the tests: units, the workflow at smoke scale, dry runs of every scale
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: env  ## the tests that are too long for `make test`: every family of models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses 2

mutants:  ## small bugs put into the library, statistics and scoring, which tests should notice: about an hour
	@$(MAKE) --no-print-directory env EXTRAS=$(EXTRAS),mutants
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

faults: env  ## kills, full disks, damaged files, bad records, SLURM; into results/reference/faults.md: half an hour
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/faults

check: env  ## lint, formatting, types: changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint

format: env  ## write files as check wants them, where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

benchmark: env  ## what steps at SCALE, the training loop, decoding and many records cost
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_loop.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/decoding.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ahead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cost.py --scale $(SCALE)
	$(BIN)/python benchmarks/records.py
	$(BIN)/python -m mutor collect rebuttal_latency cost_curves --scale $(SCALE)

reference: env  ## keep SCALE's finished runs and their artifacts in results/reference, for a commit
	mkdir -p results/reference/$(SCALE)
	find runs/$(SCALE) -name metrics.json -o -path "*/seed*/samples-last.png" -o -path "*/cost/*.json" | tar cf - -T - | tar xf - -C results/reference/$(SCALE)
	$(BIN)/python -m mutor collect --scale $(SCALE) \
	  --runs results/reference/$(SCALE)/runs --results results/reference/$(SCALE)
	$(BIN)/python -m mutor readme

clean:  ## delete .venv, runs, mutants and Snakemake's notes; results stay
	rm -rf $(VENV) .snakemake runs mutants

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@# bytecode is made of what is imported, when it is: of 20,000 files most never are
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $(STAMP)
