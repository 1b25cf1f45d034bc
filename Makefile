# make demo and make test need Python 3.10 or later, git and make; everything else is set up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 5000
# So many processes run the tests, a file at a time each. They wait a lot, so more than there are processors pays.
WORKERS ?= 4

# Else each process of the tests would compile the package anew where Python is told not to keep what it compiled.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test browser database screenshots lint soak bench clean

demo: $(VENV)/demo.stamp
	@echo "The chat is at http://127.0.0.1:$(PORT) (Ctrl-C stops it; its conversations stay in instance/sessions.db)"
	$(BIN)/gunicorn --workers 2 --threads 32 --bind 127.0.0.1:$(PORT) "example_app:create_app()"

test: browser database
	$(BIN)/python -m pytest -m "not soak" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Finds a Chromium for the tests, or gets one; where that cannot be done, it says how, and fails only in CI.
browser: $(VENV)/test.stamp
	@$(BIN)/python -m tests.browser.chromium

# The same for a MariaDB or MySQL server.
database: $(VENV)/test.stamp
	@$(BIN)/python -m tests.database

screenshots: browser
	$(BIN)/python -m tests.browser.screenshots

soak: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m soak

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flask_persist_session example_app
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks

$(VENV)/pip.stamp:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or later is needed; name one with PYTHON=…')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/%.stamp: $(VENV)/pip.stamp setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet $(MODE_$*) ".[$(EXTRAS_$*)]"
	@touch $@

MODE_test := --editable
MODE_lint := --editable
MODE_bench := --editable
EXTRAS_demo := demo
EXTRAS_test := test
EXTRAS_lint := test,lint
EXTRAS_bench := test,bench

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
