# Everything is set up in .venv; a fresh machine needs python3 (3.11 or newer) and make.
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
	@echo 'Listen to out/demo/audio/*/*.wav; every script, chunk and file is a row of out/demo/results/*.parquet.'
	@echo 'The demo was taught a few hundred words, those of the scripts plain-*, and speaks like a machine: a recogniser gets 3'
	@echo 'words of 4 wrong, where its teachers get 4 of 7 wrong. Voices are as they should be, but in dialogues it mixes them up.'
	@echo 'See "The demo'"'"'s voice" in README.md.'

# The demo's checkpoint from nothing, and how good it is: hours on two cores; killed, it goes on where it was.
demo-voice: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,voice]'
	command -v espeak-ng > /dev/null && command -v flite > /dev/null || \
	  (apt-get update -qq && apt-get install -qq --yes --no-install-recommends espeak-ng flite > /dev/null)
	$(BIN)/python -m jobs.demo
	$(BIN)/python -W ignore -m jobs.benchmark voice

# The page is tested in Debian's Chromium; without it, and without the right to install it, those tests are skipped.
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
