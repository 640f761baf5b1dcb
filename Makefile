# make reproduce   everything at the configured scale into results/
# make test        lint, types, unit tests, the whole workflow at smoke scale, dry runs of every scale
# make benchmark   the training loop against a bare one, batched answers against one at a time, costs of a training step
# make reference   keep the finished runs of a scale (SCALE=laptop) below results/reference/
# All create .venv first. Without a GPU, point pip at PyTorch's CPU wheels to save a download of some gigabytes:
#   PIP_EXTRA_INDEX_URL=<the CPU index from PyTorch's install page> make reproduce

comma := ,
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= workflow,language,images,test
SCALE ?= laptop
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: reproduce test env lint benchmark reference clean

reproduce: env
	$(BIN)/snakemake --cores all

test: env lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $(STAMP)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint

benchmark: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_loop.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/decoding.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cost.py --scale $(SCALE)
	$(BIN)/python -m mutor collect rebuttal_latency cost_curves --scale $(SCALE)

# keep the runs of a scale as its reference: their records and the artifacts built from them
reference: env
	mkdir -p results/reference/$(SCALE)
	find runs/$(SCALE) -name metrics.json -o -path "*/seed*/samples-last.png" -o -path "*/cost/*.json" | tar cf - -T - | tar xf - -C results/reference/$(SCALE)
	$(BIN)/python -m mutor collect --scale $(SCALE) \
	  --runs results/reference/$(SCALE)/runs --results results/reference/$(SCALE)
	$(BIN)/python -m mutor readme

clean:
	rm -rf $(VENV) .snakemake runs
