# make demo | make test | make fuzz | make limits | make environments | make mutants
# make bench | make bench-models | make survey | make readme | make clean

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
METADATA = settings.ini setup.py pyproject.toml

export MPLBACKEND = Agg

.PHONY: demo test fuzz limits environments mutants bench bench-models survey readme clean

demo: $(VENV)/demo-installed
	$(BIN)/python -m flashconv $(PICTURE)

test: $(VENV)/test-installed
	$(BIN)/python -m pytest -q -n auto

# Up to 3 GB and some minutes: what a size, a length or a number of calls may cost.
limits: $(VENV)/test-installed
	$(BIN)/python -m pytest -q -m large

# Every Python, the oldest and the newest of what settings.ini admits, each in an empty environment.
environments:
	$(PYTHON) tools/environments.py

# Hours, see tools/mutants.py: MUTANTS="padding --sample 20" takes minutes.
mutants: $(VENV)/test-installed
	$(BIN)/python -m pip install -q mutmut==3.8.1
	$(BIN)/python tools/mutants.py $(MUTANTS)

# FUZZ="--seed 3 --cases 2000 --jobs 2": other cases than the 10,000 of seed 0.
fuzz: $(VENV)/test-installed
	$(BIN)/python tests/fuzz.py $(FUZZ)

bench: $(VENV)/bench-installed
	$(BIN)/python benchmarks/layers.py $(BENCH)

bench-models: $(VENV)/bench-installed
	$(BIN)/python benchmarks/models.py $(BENCH)

# SURVEY="--seed 3 --cases 20 --torch 4": other layers than the 100 of seed 0, listed sooner.
survey: $(VENV)/bench-installed
	$(BIN)/python benchmarks/survey.py $(SURVEY)

readme: $(VENV)/test-installed
	$(BIN)/python tools/readme.py

clean:
	rm -rf $(VENV) build dist *.egg-info _docs _proc demo.png

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[cpu,openblas]"
	touch $@

# PyTorch on its own first: the tests judge by this version, whatever newer one there is.
$(VENV)/test-installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[cpu,openblas,dev,torch]"
	touch $@

$(VENV)/bench-installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[cpu,openblas,torch]"
	touch $@
