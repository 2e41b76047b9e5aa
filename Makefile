# Everything runs from here on a machine that has Python >= 3.11 and make:
#
#   make demo        install into .venv, swap one activation, print and draw what happened
#   make test        the whole test suite with the doctests
#   make help        the rest

PYTHON ?= python3
VENV := .venv
PEERS_VENV := .venv-peers
EASYROUTINE_VENV := .venv-easyroutine
BENCH ?=

# Small tensors: one thread a process is fastest, and two processes then never wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: help demo test lint format types smollm2 minilm test-smollm2 capital-map registry registry-page maps maps-page maps-sabotage peers bench bench-attention bench-sweep bench-das bench-maps bench-map-types bench-easyroutine tutorials clean

help:
	@echo "make demo          run the main job on the language model that ships with the library"
	@echo "make test          tests and doctests (2 processes)"
	@echo "make lint          ruff check and ruff format --check;  make format repairs"
	@echo "make types         mypy --strict on the three packages"
	@echo "make test-smollm2  fetch SmolLM2-135M and MiniLM once, run the tests that need them"
	@echo "make capital-map   train an alignment for every layer of SmolLM2, draw docs/images/smollm2_das_map.png"
	@echo "make registry      sweep every architecture of transformers, compared cell by cell (some minutes)"
	@echo "make registry-page the same, and write docs/sweep-coverage.md"
	@echo "make maps          infer and verify the map of every architecture, in all tasks (some minutes)"
	@echo "make maps-page     the same, and write docs/architectures.md"
	@echo "make maps-sabotage spoil maps of many families in every way, and see that each is refused (long)"
	@echo "make peers         install the pinned peers, run the comparisons with them"
	@echo "make bench         what a swap costs, against the peers (BENCH=--quick, BENCH=--help)"
	@echo "make bench-attention    what reading and editing patterns costs, likewise"
	@echo "make bench-easyroutine  the same in easyroutine, whose environment is its own"
	@echo "make bench-sweep        what a whole patching sweep costs, in time and memory"
	@echo "make bench-das          what it costs to train an alignment, and whether the same comes out"
	@echo "make bench-maps         what it costs to find out and prove where the components of a model are"
	@echo "make bench-map-types    the same for every type of model that transformers has, about ten minutes"
	@echo "make tutorials     run every notebook from top to bottom"
	@echo "make clean         remove the environments, caches and outputs"
	@echo "make PYTHON=python3.12 ... chooses the interpreter of new environments"

# An environment is stamped with what was installed, so that a second `make` starts at once.
$(VENV)/.demo: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) --editable ".[plots]"
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) --editable ".[dev]"
	@touch $(VENV)/.demo $@

$(PEERS_VENV)/.peers: $(REQUIREMENTS) benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python $(INSTALL) --editable ".[dev]"
	$(PEERS_VENV)/bin/python $(INSTALL) --no-deps --requirement benchmarks/peers.txt
	@touch $@

demo: $(VENV)/.demo
	$(VENV)/bin/python -m intervenable demo

test: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/.dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

format: $(VENV)/.dev
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

types: $(VENV)/.dev
	$(VENV)/bin/python -m mypy

smollm2: $(VENV)/.dev
	$(VENV)/bin/python scripts/fetch_smollm2.py

minilm: $(VENV)/.dev
	$(VENV)/bin/python scripts/fetch_minilm.py

test-smollm2: smollm2 minilm
	$(VENV)/bin/python -m pytest -m smollm2 tests

# Finished cells stay in out/capital_map: a run that was ended goes on from there.
capital-map: smollm2
	$(ONE_THREAD) $(VENV)/bin/python -m scripts.capital_map

registry: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n 2 -m registry tests/test_sweep_registry.py

registry-page: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python tests/registry_survey.py

# The survey shares the types out to two processes and keeps its records in out/, as long as no source changes.
maps: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python tests/map_survey.py --no-page
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n 2 -m registry tests/test_map_registry.py tests/test_experts.py

# Half a minute to a minute for each of many families.
maps-sabotage: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n 2 -m registry \
		tests/test_map_sabotage_everywhere.py tests/test_all_components_everywhere.py

maps-page: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python tests/map_survey.py

# Only the files that need them: the others may need what is not in this environment. A peer that is missing
# is a failure here, where elsewhere its tests are skipped.
peers: $(PEERS_VENV)/.peers
	PEERS=required $(ONE_THREAD) $(PEERS_VENV)/bin/python -m pytest -n 2 -m peers \
		$$(grep --files-with-matches pytest.mark.peers tests/test_*.py)

bench: $(PEERS_VENV)/.peers
	$(ONE_THREAD) $(PEERS_VENV)/bin/python -m benchmarks.overhead $(BENCH)

bench-attention: $(PEERS_VENV)/.peers
	$(ONE_THREAD) $(PEERS_VENV)/bin/python -m benchmarks.attention $(BENCH)

bench-sweep: $(PEERS_VENV)/.peers
	$(ONE_THREAD) $(PEERS_VENV)/bin/python -m benchmarks.sweep $(BENCH)

bench-das: $(PEERS_VENV)/.peers
	$(ONE_THREAD) $(PEERS_VENV)/bin/python -m benchmarks.das $(BENCH)

bench-maps: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python -m benchmarks.maps $(BENCH)

bench-map-types: $(VENV)/.dev
	$(ONE_THREAD) $(VENV)/bin/python -m benchmarks.maps_of_types $(BENCH)

# It asks for an old transformers and a vllm that only its other half uses: benchmarks/easyroutine.md.
$(EASYROUTINE_VENV)/.easyroutine: benchmarks/easyroutine.txt
	$(PYTHON) -m venv $(EASYROUTINE_VENV)
	$(EASYROUTINE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	$(EASYROUTINE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps easyroutine==1.1.5
	@touch $@

bench-easyroutine: $(EASYROUTINE_VENV)/.easyroutine smollm2
	$(ONE_THREAD) $(EASYROUTINE_VENV)/bin/python -m benchmarks.easyroutine_check
	$(ONE_THREAD) $(EASYROUTINE_VENV)/bin/python -m benchmarks.attention --only easyroutine --batches 1 \
		--models tiny-llama smollm2 --baseline "eager, output_attentions" $(BENCH)

tutorials: smollm2
	$(ONE_THREAD) $(VENV)/bin/python scripts/run_tutorials.py --jobs 2

clean:
	rm -rf $(VENV) $(PEERS_VENV) $(EASYROUTINE_VENV) out dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
