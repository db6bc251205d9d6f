# make demo | make lab | make test | make zoo | make fuzz | make sanitize | make limits | make environments | make mutants
# make bench | make bench-models | make bench-converted | make bench-streaming | make bench-steps | make survey | make export | make readme | make clean

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
METADATA = settings.ini setup.py pyproject.toml

export MPLBACKEND = Agg

.PHONY: demo lab test zoo fuzz sanitize limits environments mutants bench bench-models bench-converted bench-streaming bench-steps survey export readme clean

demo: $(VENV)/demo-installed
	-$(BIN)/python -m flashconv build
	$(BIN)/python -m flashconv $(PICTURE)

# The notebooks, to read and to run, where `make test` runs them.
lab: $(VENV)/lab-installed
	-$(BIN)/python -m flashconv build
	env -u MPLBACKEND $(BIN)/python -m jupyterlab nbs/index.ipynb

test: $(VENV)/test-installed
	-$(BIN)/python -m flashconv build
	$(BIN)/python -m pytest -q -n auto $(TESTS)

# A quarter of an hour: networks of three libraries in PyTorch and here, as a table.
# ZOO="unet swin": those whose names hold one of the words.
zoo: $(VENV)/test-installed
	$(BIN)/python tests/zoo.py $(ZOO)

# Up to 3 GB and some minutes: what a size, a length or a number of calls may cost.
limits: $(VENV)/test-installed
	$(BIN)/python -m pytest -q -m large

# Hours: without a compiler, on one core and the like, on every Python, with the oldest packages.
# `python3 tools/environments.py bare 3.13` is some of it, see there.
environments:
	$(PYTHON) tools/environments.py

# Hours, see tools/mutants.py: MUTANTS="padding --sample 20" takes minutes.
mutants: $(VENV)/test-installed
	$(BIN)/python -m pip install -q mutmut==3.8.1
	$(BIN)/python tools/mutants.py $(MUTANTS)

# FUZZ="--seed 3 --cases 2000 --jobs 2": other cases than the 10,000 of seed 0. FUZZ="--kernels
# --threads 7 --architecture x86-64": all in kernels, on 7 threads, compiled for SSE2.
fuzz: $(VENV)/test-installed
	$(BIN)/python tests/fuzz.py $(FUZZ)

# The C++ kernels alone, against the loop: reads and writes past arrays, undefined behaviour, races
# of threads, narrow vectors. SANITIZE="2000 3": so many layers, another seed.
SANITIZE ?= 2000 0
CHECKED = $(CXX) -std=c++17 -g -Wall -Wextra -DFLASHCONV_SMALL_WORK=0 tests/sanitize.cpp \
	flashconv/kernels/cpp/kernels.cpp -pthread
ADDRESSES = -O1 -march=native -fsanitize=address,undefined -fno-sanitize-recover=all

sanitize:
	mkdir -p build
	$(CHECKED) $(ADDRESSES) -o build/sanitize && build/sanitize $(SANITIZE)
	$(CHECKED) -O1 -march=native -fsanitize=thread -o build/threads && build/threads $(SANITIZE)
	$(CHECKED) -O2 -o build/baseline && build/baseline $(SANITIZE)

bench: $(VENV)/bench-installed
	-$(BIN)/python -m flashconv build
	$(BIN)/python benchmarks/layers.py $(BENCH)

bench-models: $(VENV)/bench-installed
	-$(BIN)/python -m flashconv build
	$(BIN)/python benchmarks/models.py $(BENCH)

bench-converted: $(VENV)/bench-installed
	-$(BIN)/python -m flashconv build
	$(BIN)/python benchmarks/converted.py $(BENCH)

bench-streaming: $(VENV)/bench-installed
	-$(BIN)/python -m flashconv build
	$(BIN)/python benchmarks/streaming.py $(BENCH)

# The pages nbs/kernels/03 and 04 print what it writes: run them again afterwards.
bench-steps: $(VENV)/demo-installed
	$(BIN)/python benchmarks/steps.py

# SURVEY="--seed 3 --cases 20 --torch 4": other layers than the 100 of seed 0, listed sooner.
survey: $(VENV)/bench-installed
	-$(BIN)/python -m flashconv build
	$(BIN)/python benchmarks/survey.py $(SURVEY)

# The modules and the C++ that the notebooks hold.
export: $(VENV)/test-installed
	PATH="$(abspath $(BIN)):$$PATH" nbdev_export
	$(BIN)/python tools/export_cpp.py

readme: $(VENV)/test-installed
	$(BIN)/python tools/readme.py

clean:
	rm -rf $(VENV) build dist *.egg-info _docs _proc demo.png

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[cpu]"
	touch $@

# PyTorch on its own first: the tests judge by this version, whatever newer one there is.
$(VENV)/test-installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[cpu,dev,torch,zoo]"
	touch $@

$(VENV)/lab-installed: $(METADATA) $(VENV)/test-installed
	$(BIN)/python -m pip install -q -e ".[lab]"
	touch $@

$(VENV)/bench-installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[cpu,torch]"
	touch $@
