# Two commands do all set-up on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# Telemetry, and the Hub's tries to reach it, are of no use to either command: both work without a network.
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-floors lint clean

demo: $(VENV)/installed
	$(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/vit_digits.py --output-dir out/vit_digits --resume

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

# Everything at its floor but torch, which is linked from the first environment, in a second one.
test-floors: $(VENV)/installed
	$(RUN)/python tests/environments.py floors

lint: $(VENV)/installed
	$(RUN)/pip install --quiet ruff==0.17.6
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

clean:
	rm -rf $(VENV) .venv-floors out

# The stamp is written last, so that an interrupted install is taken up again.
$(VENV)/installed: pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...')"
	$(RUN)/python -m pip install --quiet --editable '.[test]'
	touch $@
