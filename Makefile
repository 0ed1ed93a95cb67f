.PHONY: setup python azurite chromium demo test long check lint types fast fast-jobs fast-others engine chaos constraints

# Compiled modules are kept, whatever the shell says: without them each process that a test starts compiles all that it imports, of
# vLLM's 2,100 modules too, which doubles what the start of an engine or of `tokenmill` costs.
export PYTHONDONTWRITEBYTECODE :=

setup: python azurite chromium  ## make .venv, and install what the tests on Azure Blob and in a browser need

python:
	bash .ci/setup

azurite:
	bash .ci/setup-azurite

chromium:
	bash .ci/setup-chromium

demo: python      ## demo model, a real job over the demo prompts, a summary
	.venv/bin/tokenmill demo --output demo
	.venv/bin/tokenmill verify demo/completions

test: setup       ## lint, types, every test but the long ones
	bash .ci/check

check: test

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

types: setup
	.venv/bin/mypy

FAST = TOKENMILL_FUZZ=0.1 .venv/bin/pytest -q -m "not engine and not chaos and not azurite and not batch and not slow and not long" \
	--ignore=tests/pipeline/test_quantise.py

fast: setup       ## the developer loop, under a minute: no engine, no Azurite, no killed processes, no Batch, nothing slow, a tenth of the fuzzing
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target fast-jobs fast-others

fast-jobs:
	$(FAST) tests/jobs

fast-others:
	$(FAST) --ignore=tests/jobs

engine: setup
	.venv/bin/pytest -q -m engine

chaos: setup
	.venv/bin/pytest -q -m "chaos and not long"

long: setup       ## minutes of chaos and of engines; networks cut between namespaces (as root)
	.venv/bin/pytest -q --durations=10 -m long

constraints: setup  ## renew the pinned versions
	.venv/bin/uv pip compile --quiet --python-version 3.11 --override .ci/overrides.txt \
		--extra cpu --extra demo --extra bench --extra prepare --extra dashboard --extra notebook --extra dev --no-header --no-annotate \
		pyproject.toml --output-file .ci/constraints.txt
	infra/image/lock
