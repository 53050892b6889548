# Two commands: `make demo` sets up and runs the main job in its quick form, `make test` sets up and runs the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test thorough soak lint docs docs-serve package clean

demo: .venv/ready
	$(BIN)/anybatch compare --quick --out results/demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The further cases of the long tests.
thorough: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m thorough

# 200 random training configurations against float64: 20 to 30 minutes.
soak: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --examples 200 --minutes 30

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/; a broken link is an error. docs-serve shows it while one writes: http://localhost:8000.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The wheel and the sdist, and whether they serve a stranger: a fresh environment, minutes to install.
package: .venv/ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m scripts.check_package dist

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "anybatch needs Python 3.11 or newer; give one: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
