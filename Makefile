# make demo    install and run the main job end to end; results in demo-out/
# make demo-model  the same from a model: profiles a tiny checkpoint first (installs PyTorch)
# make test    install with test tools and run all tests
# make test-long  run the checks that take minutes (scripted kills and the like)
# make same BASE=REV  compare an older commit with the working tree, value by value (tests/golden)
# make lint    style, formatting, types and the direction of imports
# make schemas write the JSON Schemas of prism_plan/schemas anew from the models in prism_plan/io
# make bench   measure and record the speeds that tests/benchmarks/README.md promises
# make bench BASE=REV [CASES="A,B"]  measure an older commit and the working tree in turn: ratios
# make grid    hold `latency` against the best of the others in a quarter of the grid (studies)
# Only Python (3.11 or newer) and make are needed. PyTorch comes from the package index that pip is
# set up for; on Linux that is a large build with CUDA unless the index offers the CPU build.

PYTHON ?= python3
VENV ?= .venv
# dev: test tools; hf: PyTorch and transformers. With EXTRAS=dev the tests that need hf skip.
EXTRAS ?= dev,hf
# extras of both revisions of `make same`; hf: also the cases that need PyTorch
SAME_EXTRAS ?=
# of make bench: the commit to compare with, and the cases, all by default
BASE ?=
CASES ?=
# processes that share the tests; those of servers wait for each other much of the time
TEST_PROCESSES ?= 3
PIP_FLAGS ?= --quiet --disable-pip-version-check
BIN = $(VENV)/bin

.PHONY: demo demo-model test test-long same lint schemas bench grid clean

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "prism-plan needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml
	$(BIN)/pip install $(PIP_FLAGS) -c .ci/constraints.txt -e .
	@touch $@

$(VENV)/installed-hf: $(VENV)/made pyproject.toml
	$(BIN)/pip install $(PIP_FLAGS) -c .ci/constraints.txt -e '.[hf]'
	@touch $@

ifneq ($(EXTRAS),hf)
$(VENV)/installed-$(EXTRAS): $(VENV)/made pyproject.toml
	$(BIN)/pip install $(PIP_FLAGS) -c .ci/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
endif

demo: $(VENV)/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh traces/demo.sh demo-out

demo-model: $(VENV)/installed-hf
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh traces/demo.sh demo-out --profile

test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-long: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -m long

same: $(VENV)/made
	@test -n "$(BASE)" || { echo "give the commit to compare with: make same BASE=REV" >&2; exit 2; }
	$(BIN)/python -m tests.golden same "$(BASE)" --extras "$(SAME_EXTRAS)"

lint: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

schemas: $(VENV)/installed
	$(BIN)/python -m tools.make_schemas

bench: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m tests.benchmarks $(if $(BASE),--base "$(BASE)") $(if $(CASES),--cases "$(CASES)")

grid: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m studies.grid --quarter --renew latency
	$(BIN)/python -m studies.grid --quarter --report

clean:
	rm -rf $(VENV) demo-out build *.egg-info
