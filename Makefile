# kindling: everything a developer runs. `make` alone lists the targets.
#
# All of it runs with the Python of .venv, by absolute path; a Spark or Python path set outside is not looked at.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := $(CURDIR)/.venv
VENV35 := $(CURDIR)/.venv-spark35
PY := $(VENV)/bin/python
PY35 := $(VENV35)/bin/python
PYTEST := -m pytest -q --durations=5

unexport PYTHONPATH PYTHONHOME SPARK_HOME SPARK_REMOTE SPARK_CONF_DIR PYSPARK_PYTHON PYSPARK_DRIVER_PYTHON PYSPARK_SUBMIT_ARGS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# $(call new-venv,FOLDER): a virtual environment of the first Python >= 3.11 found ($PYTHON first).
define new-venv
	@found=; \
	for python in "$${PYTHON:-}" python3 python3.11 python3.12 python3.13 python3.14; do \
	  if [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "kindling needs Python 3.11 or newer and found none. Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	test -x "$(1)/bin/python" || "$$found" -m venv "$(1)"
endef

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*  ## (.*)/  make \1@\2/' | column -t -s@

.PHONY: setup
setup: $(VENV)/.stamp  ## .venv from the pinned versions in constraints.txt (does nothing when it is up to date)
$(VENV)/.stamp: pyproject.toml constraints.txt
	$(call new-venv,$(VENV))
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@command -v java >/dev/null || [ -n "$${JAVA_HOME:-}" ] || echo "Note: no Java found. Spark needs Java 17 or newer; install one or set JAVA_HOME." >&2
	@touch $@

.PHONY: setup-spark35
setup-spark35: $(VENV35)/.stamp  ## .venv-spark35: the same with the oldest Spark supported
$(VENV35)/.stamp: pyproject.toml constraints-spark35.txt
	$(call new-venv,$(VENV35))
	$(PY35) -m pip install --quiet -c constraints-spark35.txt -e '.[test]'
	@touch $@

.PHONY: demo
demo: setup  ## transfer learning on real handwritten digits, offline, under 3 minutes on 2 cores
	$(PY) -m kindling demo

.PHONY: test test-local test-plain test-spark test-cluster test-connect
test: test-local test-cluster test-connect  ## the suite: local[2], two executor processes, Spark Connect
test-local: setup  # two processes at a time: what needs Spark waits often, the rest fills the gaps
	@echo "Tests with and without Spark run side by side; each prints when it ends."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-plain test-spark
test-plain: setup
	$(PY) $(PYTEST) -m 'not spark and not slow'
test-spark: setup
	$(PY) $(PYTEST) -m 'spark and not slow' tests
test-cluster: setup
	KINDLING_TEST_MASTER='local-cluster[2,1,1024]' $(PY) $(PYTEST) -m 'sessions and not slow' tests
test-connect: setup
	KINDLING_TEST_REMOTE='local[2]' $(PY) $(PYTEST) -m 'sessions and not slow' tests

.PHONY: test-all test-slow test-spark35
test-all: test test-slow test-spark35  ## everything: adds the long fault, fuzz and accuracy suites and Spark 3.5
test-slow: setup
	$(PY) $(PYTEST) -m slow --timeout 1800
	KINDLING_TEST_MASTER='local-cluster[2,1,1024]' $(PY) $(PYTEST) -m 'slow and sessions' tests
	KINDLING_TEST_REMOTE='local[2]' $(PY) $(PYTEST) -m 'slow and sessions' tests
	KINDLING_FUZZ=20 $(PY) $(PYTEST) -m 'fuzz and not slow' --timeout 1800 tests
test-spark35: setup-spark35
	$(PY35) $(PYTEST) -m 'spark and not slow' tests

.PHONY: lint format types check
lint: setup  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
format: setup  ## let ruff lay out the code and mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
types: setup  ## mypy --strict
	$(PY) -m mypy --strict
check: lint types test  ## what a change must pass

.PHONY: bench
bench: setup  ## the benchmarks; figures land in benchmarks/results
	test -x .venv-peers/bin/python || $(PY) benchmarks/run.py --make-peers
	$(PY) benchmarks/run.py

.PHONY: wheel
wheel: setup  ## dist/*.whl
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

.PHONY: clean
clean:  ## remove what was built, the environments too
	rm -rf $(VENV) $(VENV35) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis spark-warehouse artifacts demo-output
