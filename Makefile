# Thin on purpose: a target is one command. `make run` and `make test` are the two that matter.
PYTHON ?= python3
PROFILE ?= demo
VENV_PYTHON := .venv/bin/python
HELPERS := $(VENV_PYTHON) -m helpers
RUN := $(HELPERS) run --profile $(PROFILE)
FOR_SERVING := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-serving.txt -c constraints.txt
# Two files of tests at a time, with one thread each.
TEST_BY_TWO := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install for-tests setup run test test-slow test-faults record lab generate_dataset \
	push_dataset fine_tune merge_models push_model new_model_inference llama2_inference all

help:     ## list the targets
	@sed -n 's/^\([a-z_0-9-]*\): .*##/\1:/p' Makefile

install:  ## .venv, pinned requirements, embedded model; a second call does nothing
	@$(PYTHON) setup/install.py

for-tests: install  ## what the tests need beside: a Chromium, on Linux bubblewrap, the server's packages
	@$(VENV_PYTHON) setup/for_tests.py
	-@$(FOR_SERVING)

run: install  ## execute the six notebooks with PROFILE and write the report
	@$(RUN)

test: for-tests  ## style, units, notebooks, and the fast half of the faults
	@$(VENV_PYTHON) -m ruff check . && $(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -c "from importlinter.cli import lint_imports_command as check; check()" && $(VENV_PYTHON) -m mypy
	@$(TEST_BY_TWO) -m "not slow and not alone" --part first
	@$(VENV_PYTHON) -m pytest -m alone --part second

test-slow: for-tests  ## what `make test` leaves out: kills at every write, full disks, bad networks
	@$(TEST_BY_TWO) -m slow

test-faults: for-tests  ## every fault, fast and slow
	@$(VENV_PYTHON) -m pytest tests/faults

record: run  ## put the outputs of a demo run into the committed notebooks
	@$(HELPERS) first-look && $(RUN) --only 01 && $(HELPERS) record  # 01 opens with the end of the run

lab: install  ## open JupyterLab
	@$(VENV_PYTHON) -m jupyterlab notebooks

# -- The article's own targets.
setup:  ## the article's conda environment
	@command -v conda > /dev/null || { echo "conda is not installed: make install needs only Python" >&2; exit 1; }
	conda env create -f environment.yml

generate_dataset: install  ## notebook 02
	@$(RUN) --only 02

push_dataset: install  ## upload the curated set under your name
	@$(HELPERS) push-dataset --profile $(PROFILE)

fine_tune: install  ## notebook 04
	@$(RUN) --only 04

merge_models: install  ## notebook 05
	@$(RUN) --only 05

push_model: install  ## upload the merged model under your name
	@$(HELPERS) push-model --profile $(PROFILE)

new_model_inference: install  ## the article's prompt to the tuned model
	@$(HELPERS) ask tuned --profile $(PROFILE)

llama2_inference: install  ## the article's prompt to the base model
	@$(HELPERS) ask base --profile $(PROFILE)

all: run new_model_inference llama2_inference  ## everything but the uploads, in order

# -- The models behind OpenAI's interface, on this machine only.
.PHONY: for-serving serve chat
for-serving: install  ## what the server needs beside: fastapi, uvicorn, openai
	@$(FOR_SERVING)

serve: for-serving  ## answer programs as OpenAI's server does: make serve MODELS="tuned merged"
	@$(HELPERS) serve $(MODELS) --profile $(PROFILE)

chat: for-serving  ## open a page in the browser: one question, base and tuned side by side
	@$(HELPERS) serve base tuned --page --profile $(PROFILE)

# -- In a browser, and for Colab.
.PHONY: test-browser colab picture
test-browser: for-tests  ## open the lessons in JupyterLab and Chromium, and use them
	@$(VENV_PYTHON) -m pytest tests/browser

colab: install  ## write badges and the clone address: make colab REPO=owner/name
	@$(VENV_PYTHON) -m setup.colab $(REPO)

picture:  ## take README's picture from the recorded notebook 06
	@$(VENV_PYTHON) -m helpers.runs.report
