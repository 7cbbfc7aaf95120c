# Two commands on a fresh machine: `make demo` and `make test`. Both make their environment first.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
RAY := .venv-ray
MODELS := .venv-models
# Two processes: most tests keep one core busy. Each file stays in one of them, with its trained fixtures.
PARALLEL := -n 2 --dist loadfile
# A plain comma inside $(call …) would end the argument.
, := ,
ifeq ($(OS),Windows_NT)
  BIN := Scripts
else
  BIN := bin
endif

.PHONY: demo test docs docs-code test-quick test-ray test-oldest bench gpu parity targets chaos chaos-ray interruptions fuzz stock compat coverage repositories format clean

define uv
	$(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv
endef

# uv links packages from its cache, so that a second environment costs no second 6 GB of torch.
# All tests, then those that hold on every backend with Triton's kernels, in its interpreter on the CPU.
define tests
	$(1) -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(1) -m pytest -n 2 -m kernels tests/test_ops.py
endef

define environment
	$(call uv)
	$(PYTHON) -m uv venv --quiet --allow-existing $(1)
	$(PYTHON) -m uv pip install --quiet --python $(1) $(2)
endef

$(VENV)/installed: pyproject.toml
	$(call environment,$(VENV),-e ".[dev$(,)export]")
	@touch $@

demo: $(VENV)/installed
	$(VENV)/$(BIN)/rtdetr-act train --act arelu

test: $(VENV)/installed
	$(VENV)/$(BIN)/ruff check .
	$(VENV)/$(BIN)/ruff format --check .
	MYPYPATH=scripts $(VENV)/$(BIN)/mypy rtdetr_act scripts
	$(VENV)/$(BIN)/lint-imports --no-logo
	$(VENV)/$(BIN)/zizmor --offline --quiet .github/workflows
	$(call tests,$(VENV)/$(BIN)/python)

# What trains and exports nothing and starts no process; about a minute.
test-quick: $(VENV)/installed
	$(VENV)/$(BIN)/python -m pytest $(PARALLEL) -m unit

# Ray has an environment of its own, since Ultralytics imports it into every training where it is installed.
$(RAY)/installed: pyproject.toml
	$(call environment,$(RAY),-e ".[dev$(,)ray]")
	@touch $@

# Studies on two local nodes; one to two minutes.
test-ray: $(RAY)/installed
	$(RAY)/$(BIN)/python -m pytest tests/test_cluster.py

# The oldest supported releases, of torch too. Ultralytics 8.3.0 works with the newest torch as well: `make compat`.
test-oldest:
	$(call environment,$(OLDEST),-e ".[dev]" "ultralytics==8.3.0" "torch==2.4.1" "torchvision==0.19.1" "numpy<2" setuptools)
	$(call tests,$(OLDEST)/$(BIN)/python)

# What runs and what a swap reaches in models of Ultralytics, torchvision, timm and transformers, and in checkouts given as
# REPOSITORIES="--yolov5 DIR …"; about ten minutes.
coverage:
	$(call environment,$(MODELS),-e ".[dev]" timm transformers)
	$(MODELS)/$(BIN)/python scripts/count_activations.py $(REPOSITORIES)

# Tables, JSON and charts in runs/bench, and what `rtdetr-act acts` shows of costs; about half an hour on two cores.
bench: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/bench_ops.py
	$(VENV)/$(BIN)/python scripts/bench_acts.py
	$(VENV)/$(BIN)/python scripts/bench_models.py
	$(VENV)/$(BIN)/python scripts/bench_fold.py
	$(VENV)/$(BIN)/python scripts/bench_conv.py

# Kernels, precision, times and trainings on a CUDA GPU: docs/gpu.md, .csv and .png. Without one the kernels in Triton's
# interpreter, about six minutes. It goes on where it was stopped; remove runs/gpu to begin anew.
gpu: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/check_gpu.py --minutes 120 --report docs

# Every activation in every export format against torch: runs/parity/parity.md and .json; about fifteen minutes.
parity: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/parity.py

# What each target runs of the operators of yolo11n and rtdetr-l: docs/targets.md and .json; a minute.
targets: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/operator_tables.py

# Twenty kills that hit a running study, and twenty that hit a search, each compared with an undisturbed one; about half
# an hour. A machine is slowed down by `scripts/chaos.py study --busy 4`.
chaos: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/chaos.py study
	$(VENV)/$(BIN)/python scripts/chaos.py search

# Twenty times, the node is killed on which a run of a study under Ray is at work; about fifteen minutes.
chaos-ray: $(RAY)/installed
	$(RAY)/$(BIN)/python scripts/chaos.py ray

# A full disk, Ctrl-C and kill -9 for every command, over good files; about fifteen minutes.
interruptions: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/check_interruptions.py

# 20,000 hostile plans, YAMLs, study files and checkpoints, and 300 command lines: runs/fuzz; about five minutes.
fuzz: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/fuzz.py

# Stock trainings with and without the plugin imported; about three minutes.
stock: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/check_stock.py

# Seventeen releases of Ultralytics and the newest, each in an environment of its own: docs/compatibility.md; about 25
# minutes on two quiet cores. What was finished is not done again.
compat:
	$(call uv)
	$(PYTHON) scripts/check_compat.py

# YOLOv5, YOLOv7, official RT-DETR and D-FINE, from checkouts of yours; ten minutes. WITH is the Python of the environment
# that has their requirements, and rtdetr-act.
WITH ?= $(VENV)/$(BIN)/python
repositories:
	@test -n "$(CHECKOUTS)" || { echo 'usage: make repositories WITH=env/bin/python CHECKOUTS="--yolov5 DIR --yolov7 DIR --rtdetr DIR --dfine DIR"$(,) any of the four'; exit 2; }
	$(WITH) scripts/check_repositories.py $(CHECKOUTS)

# The documentation as a site, docs/_build/html/index.html; a broken link or reference fails. About a minute.
$(VENV)/docs-installed: pyproject.toml $(VENV)/installed
	$(call environment,$(VENV),-e ".[dev$(,)export$(,)docs]")
	@touch $@

docs: $(VENV)/docs-installed
	$(VENV)/$(BIN)/python -m sphinx -W --keep-going -n --quiet docs docs/_build/html
	$(VENV)/$(BIN)/python scripts/check_site.py docs/_build/html

# Every code block and command of README.md and docs/, shrunk until each takes seconds; `make test` checks them without
# running what trains. About 25 minutes.
docs-code: $(VENV)/installed
	$(VENV)/$(BIN)/python scripts/run_docs.py

format: $(VENV)/installed
	$(VENV)/$(BIN)/ruff format .
	$(VENV)/$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) $(RAY) $(MODELS) .venv-compat docs/_build docs/_generated docs/activations .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
