# make demo: install into .venv and make the demo video.   make test: install and run all tests that this machine can.
# make fuzz: 10,000 mutated inputs for each reader.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz lint clean

demo: $(VENV)/.installed
	@$(BIN)/wanvideo demo

test: $(VENV)/.installed
	@$(BIN)/python -m pytest

fuzz: $(VENV)/.installed
	@FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest tests/fuzz

lint: $(VENV)/.installed
	@$(BIN)/ruff check .

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: no later requirement may choose another build of it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) output
