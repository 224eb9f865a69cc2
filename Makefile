# make demo, make test: each sets up .venv first if it is missing or out of date.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
TYPES := build/types

.PHONY: demo test check lint types fresh docs

demo: $(READY)
	$(BIN)/vlmfix demo $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

check: lint types fresh

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install: it reads the package as a wheel would lay it out.
types: $(READY)
	rm -rf $(TYPES) && mkdir -p $(TYPES)/vlmfix
	ln -s $(CURDIR)/vlmfix/* $(TYPES)/vlmfix/ && ln -s $(CURDIR)/eval $(TYPES)/vlmfix/eval
	cd $(TYPES) && $(CURDIR)/$(BIN)/mypy -p vlmfix --config-file $(CURDIR)/pyproject.toml

fresh: $(READY)
	$(BIN)/python scripts/generate_docs.py --check

docs: $(READY)
	$(BIN)/python scripts/generate_docs.py

# torch comes first and by itself, so that TORCH=path/to/a/cpu/build.whl is kept by what follows.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)
