# Everything sets up what it needs: a machine with Python 3.11, 3.12 or 3.13 and make is enough.
# The newest of them that runs here is taken. PYTHON=python3.12 names another, which gets an
# environment of its own.
VENV := .venv$(addprefix -,$(notdir $(PYTHON)))
BIN := $(VENV)/bin
RUN := $(BIN)/python main.py
COMPARED := digits/avb_ac four_points/avb digits/vae four_points/vae
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup demo test test-fast test-long coverage test-browser test-gpu load board lint seeds mnist \
  posteriors verdicts amortised tables keras-ways faults durability bench bench-ais bench-replicas release-check docs clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	python=$$(.ci/python $(PYTHON)) && $$python -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

# The paper's four points and handwritten digits: AVB beside a Gaussian VAE, with exact numbers.
# Two runs at a time, a core each.
demo seeds mnist posteriors verdicts amortised: export TF_NUM_INTEROP_THREADS = 1
demo seeds mnist posteriors verdicts amortised: export OPENBLAS_NUM_THREADS = 1
demo: setup
	@$(MAKE) --no-print-directory -j2 $(COMPARED:%=runs/demo/%/results.json)
	$(RUN) --mode=compare --workdir=runs/demo

# A run by its path, such as runs/seeds/digits/avb_ac-2: config, variant and, where there is one, seed.
runs/%/results.json: parts = $(subst /, ,$(subst -,/,$*))
runs/%/results.json: config = $(word 2,$(parts))
runs/%/results.json:
	@mkdir -p $(dir $(@D))
	@echo "$* has begun; its progress is in $(@D).log"
	@$(RUN) --config=configs/$(config).py:$(word 3,$(parts)) --workdir=$(@D) \
	  $(if $(filter posteriors,$(config)),--config.eval.reference=$(dir $(@D))references \
	  --config.seed,--config.model.seed)=$(or $(word 4,$(parts)),0) \
	  $(if $(filter mnist mnist_4x4,$(config)),$(MNIST:%=--config.data.path=%)) \
	  --mode=train_and_evaluate >$(@D).log 2>&1 || { cat $(@D).log; exit 1; }
	@echo; echo "$*"; grep '^|' $(@D).log

test: setup
	$(BIN)/python -m pytest

# The tests that CI leaves out for their time.
test-long: setup
	$(BIN)/python -m pytest -m "long and not browser and not gpu"

# Without the tests that train, export or start processes (SLOW in tests/conftest.py).
test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not long and not browser and not gpu"

# Reported, not enforced; the lines are in runs/coverage/index.html. FAST=1 runs the fast tests only.
coverage: setup
	$(BIN)/python -m pytest --cov=avb_tf --cov-report=term:skip-covered \
	  --cov-report=html:runs/coverage $(if $(FAST),-m "not slow and not long and not browser and not gpu")

# In headless Chromium, Debian's package; screenshots are kept in runs/artefacts/.
test-browser: setup
	command -v chromium >/dev/null || { apt-get update && apt-get install -y chromium; }
	$(BIN)/python -m pytest -n 0 -m browser

# On a machine with a GPU; where there is none, each test is skipped and says so.
test-gpu: setup
	$(BIN)/python -m pytest -n 0 -m gpu -rs

# 20,000 requests by eight threads on one loaded export.
load: setup
	AVB_TF_LOAD_REQUESTS=20000 $(BIN)/python -m pytest -n 0 -s tests/test_serving_load.py

# TensorBoard of all runs.
board: setup
	$(BIN)/tensorboard --logdir runs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The first table of docs/evidence/results.md, three seeds each.
seeds: setup
	@$(MAKE) --no-print-directory -j2 \
	  $(foreach seed,0 1 2,$(COMPARED:%=runs/seeds/%-$(seed)/results.json))

# The paper's comparison on MNIST with eight latents, and a Gaussian beside AVB on its images in 4 x 4
# pixels: two hours. What is finished is not done again, and what was interrupted goes on.
# MNIST=mnist.npz names the data, which are downloaded otherwise.
MNIST_RUNS := $(addprefix mnist/,avb_flow-0 vae-0 avb_flow-1 vae-1 iaf-0 avb-0 avb_flow-2 vae-2 \
  auxvae-0 aae-0 avb_ac-0 iaf-1 iaf-2) $(foreach seed,0 1 2,mnist_4x4/avb_ac-$(seed) mnist_4x4/vae-$(seed))
mnist: setup
	@$(MAKE) --no-print-directory -j2 $(MNIST_RUNS:%=runs/paper/%/results.json)
	$(RUN) --mode=compare --workdir=runs/paper

# Every model of configs/posteriors.py, three seeds each, the baselines by the first: 45 minutes.
POSTERIORS := eight_schools eight_schools_centred eight_schools_two_modes gauss_unknown_scale \
  rosenbrock torus banana funnel mixture logistic_regression gaussian_process autoregression \
  correlated_regression
posteriors: setup
	@$(MAKE) --no-print-directory -j2 \
	  $(foreach seed,0 1 2,$(POSTERIORS:%=runs/fits/posteriors/%-$(seed)/results.json))
	$(RUN) --mode=compare --workdir=runs/fits

# The error rate of the verdict: targets with exact draws, 60 and 6 seconds each, resumable; five hours.
verdicts: setup
	$(BIN)/python -m tests.campaigns.verdicts runs/verdicts --seeds 0 1 --seconds 60 6

# Amortised posteriors of five benchmark tasks beside reference draws: half an hour of training each, three
# seeds, ten observations; resumable. The references are in $AVB_TF_DATA_DIR/sbibm or ../shared/data/sbibm.
amortised: setup
	$(BIN)/python -m tests.campaigns.amortised runs/amortised --seeds 0 1 2 --seconds 1800

# Speed on this machine, quiet: a step of each kind beside the machine's peak, and how costs grow.
bench: setup
	@for networks in mlp conv; do for precision in float32 mixed_bfloat16; do \
	  dir=runs/benchmark/$$networks-$$precision; first=runs/benchmark/$$networks-float32; \
	  $(RUN) --config=configs/benchmark.py:$$networks $(if $(MNIST),--config.data.path=$(MNIST)) \
	    --config.precision=$$precision --mode=benchmark --workdir=$$dir \
	    $$([ $$dir = $$first ] || echo --baseline=$$first/benchmark.json) || exit 1; \
	done; done
	$(RUN) --config=configs/benchmark.py:mlp $(if $(MNIST),--config.data.path=$(MNIST)) \
	  --mode=scaling --workdir=runs/benchmark/scaling

# AIS in one graph beside a loop that calls a graph at each leapfrog step.
bench-ais: setup
	$(BIN)/python -m avb_tf.benchmarks.ais

# The same batch on one device of this machine, on two logical ones and by two workers.
bench-replicas: setup
	$(BIN)/python -m avb_tf.benchmarks.replicas

# Held-out log p(x) and imputation of tables, beside factor analysis and a Poisson.
tables: setup
	$(BIN)/python -m tests.campaigns.tables --seeds 0 1 2

# What a plain Keras model can do, tried with ours.
keras-ways: setup
	$(BIN)/python -m tests.campaigns.keras_ways

# Kills, damaged checkpoints, lost workers and full disks: a table of trials and losses, for half an hour.
faults: setup
	$(BIN)/python -m tests.campaigns.faults

# Crash states, kills, corruption and more: a table of trials and losses, resumable; hours.
durability: setup
	command -v strace >/dev/null || { apt-get update && apt-get install -y strace; }
	$(BIN)/python -m tests.campaigns.durability runs/durability

# The site, in docs/_build/html. Needs no network once it is set up; the tutorials are executed.
docs: $(VENV)/docs-installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	touch $@

# Wheel and sdist in fresh environments of Python 3.11, 3.12 and 3.13, away from the source.
release-check: setup
	.ci/release-check $(BIN)/python

clean:
	rm -rf runs .venv .venv-*
