# Everything a fresh machine needs: `make demo` shows the product, `make test` proves it.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Whoever is idle takes over waiting tests; each worker loads the models for itself, hence no more than four.
PARALLEL ?= -n logical --maxprocesses 4 --dist worksteal
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint types tests slow bench format clean

help:
	@echo "make demo    install, erase a concept from the bundled model, write pictures and a page to $(OUT)/"
	@echo "make test    install, then lint, types and the test-suite"
	@echo "make slow    the tests marked slow      make bench   the tables of benchmarks/"
	@echo "make format  let ruff rewrite the code  make clean   remove what make made"

$(STAMP): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if sys.version_info >= (3, 11) else "Expunge needs Python 3.11 or newer; " + sys.executable + " is " + v + ". Name another one: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large: minutes on a slow line)"
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/expunge demo --output_dir $(OUT)

test: lint types tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow setuptools' mapping of the folders: give it the installed shape as a tree of links.
types: $(STAMP)
	@rm -rf .types && mkdir -p .types/expunge
	@for entry in expunge/* kernels erase_ops pipelines; do ln -s ../../$$entry .types/expunge/; done
	MYPYPATH=.types $(BIN)/mypy -p expunge

tests: $(STAMP)
	$(BIN)/pytest $(PARALLEL)

slow: $(STAMP)
	$(BIN)/pytest -m slow $(PARALLEL)

bench: $(STAMP)
	@for script in benchmarks/bench_*.py benchmarks/kernel_report.py benchmarks/kernel_bars.py benchmarks/plot_kernels.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .types .mypy_cache .ruff_cache .pytest_cache build *.egg-info $(OUT)
