# Each target sets up what it needs: a machine with make and Python 3.11, 3.12 or 3.13 is enough.
# The newest of these Pythons is used. PYTHON=python3.12 selects another, with a separate environment.
VENV := .venv$(addprefix -,$(notdir $(PYTHON)))
BIN := $(VENV)/bin
RUN := $(BIN)/python main.py
COMPARED := digits/avb_ac four_points/avb digits/vae four_points/vae
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup demo test test-fast test-long coverage test-browser test-gpu load board lint seeds mnist \
  posteriors verdicts posteriordb gym amortised tables keras-ways faults durability bench bench-ais bench-replicas release-check docs clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	python=$$(.ci/python $(PYTHON)) && $$python -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

# Compares AVB with a Gaussian VAE on the paper's four points and on handwritten digits, with exact
# log-likelihoods. Two runs train at a time, each on one core.
demo seeds mnist posteriors verdicts posteriordb gym amortised: export TF_NUM_INTEROP_THREADS = 1
demo seeds mnist posteriors verdicts posteriordb gym amortised: export OPENBLAS_NUM_THREADS = 1
demo: setup
	@$(MAKE) --no-print-directory -j2 $(COMPARED:%=runs/demo/%/results.json)
	$(RUN) --mode=compare --workdir=runs/demo

# The path of a run, such as runs/seeds/digits/avb_ac-2, names its config, variant and optional seed.
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
	$(BIN)/python -m pytest --durations=60 --durations-min=4

# Runs the tests that CI leaves out because they take long.
test-long: setup
	$(BIN)/python -m pytest -m "long and not browser and not gpu"

# Leaves out the tests that train, export or start processes (SLOW in tests/conftest.py).
test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not long and not browser and not gpu"

# Reports coverage without a minimum; runs/coverage/index.html shows the lines. FAST=1 runs only
# the fast tests.
coverage: setup
	$(BIN)/python -m pytest --cov=avb_tf --cov-report=term:skip-covered \
	  --cov-report=html:runs/coverage $(if $(FAST),-m "not slow and not long and not browser and not gpu")

# Runs the browser tests in headless Chromium (Debian's package); keeps screenshots in runs/artefacts/.
test-browser: setup
	command -v chromium >/dev/null || { apt-get update && apt-get install -y chromium; }
	$(BIN)/python -m pytest -n 0 -m browser

# Runs the tests that need a GPU. Without a GPU each test is skipped, and the report says so.
test-gpu: setup
	$(BIN)/python -m pytest -n 0 -m gpu -rs

# Sends 20,000 requests by eight threads to one loaded export.
load: setup
	AVB_TF_LOAD_REQUESTS=20000 $(BIN)/python -m pytest -n 0 -s tests/test_serving_load.py

# Starts TensorBoard on all runs.
board: setup
	$(BIN)/tensorboard --logdir runs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Trains the runs in the first table of docs/evidence/results.md, with three seeds each.
seeds: setup
	@$(MAKE) --no-print-directory -j2 \
	  $(foreach seed,0 1 2,$(COMPARED:%=runs/seeds/%-$(seed)/results.json))

# Repeats the paper's comparison on MNIST with eight latents, and compares AVB with a Gaussian VAE on
# the images in 4 x 4 pixels: two hours. Finished runs are kept, and interrupted runs resume.
# MNIST=mnist.npz names the data; otherwise they are downloaded.
MNIST_RUNS := $(addprefix mnist/,avb_flow-0 vae-0 avb_flow-1 vae-1 iaf-0 avb-0 avb_flow-2 vae-2 \
  auxvae-0 aae-0 avb_ac-0 iaf-1 iaf-2) $(foreach seed,0 1 2,mnist_4x4/avb_ac-$(seed) mnist_4x4/vae-$(seed))
mnist: setup
	@$(MAKE) --no-print-directory -j2 $(MNIST_RUNS:%=runs/paper/%/results.json)
	$(RUN) --mode=compare --workdir=runs/paper

# Fits every model of configs/posteriors.py with three seeds: 45 minutes. The first seed computes the
# baselines and reference draws for all three.
POSTERIORS := eight_schools eight_schools_centred eight_schools_two_modes gauss_unknown_scale \
  rosenbrock torus banana funnel mixture logistic_regression gaussian_process autoregression \
  correlated_regression
posteriors: setup
	@$(MAKE) --no-print-directory -j2 \
	  $(foreach seed,0 1 2,$(POSTERIORS:%=runs/fits/posteriors/%-$(seed)/results.json))
	$(RUN) --mode=compare --workdir=runs/fits

# Measures the error rate of the verdict on targets with exact draws, with fits of 60 and of 6
# seconds, two at a time: two hours, resumable.
verdicts: setup
	$(BIN)/python -m tests.campaigns.verdicts runs/verdicts --seeds 0 1 --seconds 60 6 --jobs 2

# Fits the models of posteriordb that have reference draws with 60 seconds each, two at a time: 22
# minutes for 25 of the 45, resumable. POSTERIORDB is a copy of github.com/stan-dev/posteriordb.
POSTERIORDB := ../posteriordb
posteriordb: setup
	$(BIN)/python -m tests.campaigns.posteriordb $(POSTERIORDB)/posterior_database runs/posteriordb

# Fits ten models of inference_gym with 60 seconds each, two at a time; resumable.
gym: setup
	$(BIN)/python -m tests.campaigns.gym runs/gym

# Compares amortised posteriors of five benchmark tasks with reference draws, also fitted from tables
# of 10,000 pairs and two of them as simulators without a density, and of six models with exact draws:
# three seeds with half an hour of training each, and ten observations; resumable. The references are
# in $AVB_TF_DATA_DIR/sbibm or ../shared/data/sbibm.
amortised: setup
	$(BIN)/python -m tests.campaigns.amortised runs/amortised --seeds 0 1 2 --seconds 1800

# Measures speed; the machine should be idle. Compares each kind of step with the machine's peak, and
# measures how the costs grow.
bench: setup
	@for networks in mlp conv; do for precision in float32 mixed_bfloat16; do \
	  dir=runs/benchmark/$$networks-$$precision; first=runs/benchmark/$$networks-float32; \
	  $(RUN) --config=configs/benchmark.py:$$networks $(if $(MNIST),--config.data.path=$(MNIST)) \
	    --config.precision=$$precision --mode=benchmark --workdir=$$dir \
	    $$([ $$dir = $$first ] || echo --baseline=$$first/benchmark.json) || exit 1; \
	done; done
	$(RUN) --config=configs/benchmark.py:mlp $(if $(MNIST),--config.data.path=$(MNIST)) \
	  --mode=scaling --workdir=runs/benchmark/scaling

# Compares AIS in one graph with a loop that calls a graph for each leapfrog step.
bench-ais: setup
	$(BIN)/python -m avb_tf.benchmarks.ais

# Times the same batch on one device of this machine, on two logical devices and by two workers.
bench-replicas: setup
	$(BIN)/python -m avb_tf.benchmarks.replicas

# Compares held-out log p(x) and imputation of tables with factor analysis and a Poisson model.
tables: setup
	$(BIN)/python -m tests.campaigns.tables --seeds 0 1 2

# Compares how our model and a plain Keras model handle the uses of a Keras model.
keras-ways: setup
	$(BIN)/python -m tests.campaigns.keras_ways

# Tries kills, damaged checkpoints, lost workers and full disks, and prints a table of trials and
# losses: half an hour.
faults: setup
	$(BIN)/python -m tests.campaigns.faults

# Tries crash states, kills, corruption and more, and prints a table of trials and losses: hours,
# resumable.
durability: setup
	command -v strace >/dev/null || { apt-get update && apt-get install -y strace; }
	$(BIN)/python -m tests.campaigns.durability runs/durability

# Builds the site in docs/_build/html and executes the tutorials; EXECUTE=off leaves their output out.
# After the setup it needs no network.
docs: $(VENV)/docs-installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d docs/_build/doctrees \
	  $(if $(EXECUTE),-D nb_execution_mode=$(EXECUTE)) docs docs/_build/html

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	touch $@

# Checks the wheel and the sdist in fresh environments of Python 3.11, 3.12 and 3.13.
release-check: setup
	.ci/release-check $(BIN)/python

clean:
	rm -rf runs .venv .venv-*
