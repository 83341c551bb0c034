# Everything is installed in .venv; a fresh machine needs python3 (3.11 or newer) and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo demo-voice browser test lint format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/python -W ignore -m jobs.synthesize --manifest jobs/examples/scripts.jsonl --voices jobs/examples/voices \
		--output out/demo --attempts 1
	@echo 'Listen to out/demo/audio/*/*.wav; out/demo/results/*.parquet has one row per script, with its file and chunks.'
	@echo 'The model demo was trained on a few hundred words (those of the scripts plain-*) and is mostly unintelligible:'
	@echo 'word error rate 0.75 by a speech recogniser, 0.57 for its teachers. It follows reference voices, but confuses the'
	@echo 'two speakers of a dialogue. Details: jobs/benchmark/README.md#the-demo-model'

# Train the demo checkpoint from scratch and measure it: hours on two cores; resumes when interrupted.
demo-voice: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,voice]'
	command -v espeak-ng > /dev/null && command -v flite > /dev/null || \
	  (apt-get update -qq && apt-get install -qq --yes --no-install-recommends espeak-ng flite > /dev/null)
	$(BIN)/python -m jobs.demo
	$(BIN)/python -W ignore -m jobs.benchmark voice

# The web page is tested in Debian's Chromium; if it is missing and cannot be installed, those tests are skipped.
browser:
	@command -v chromedriver > /dev/null || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null || \
	  (apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium chromium-driver > /dev/null)

test: $(READY) browser
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
