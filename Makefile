# make demo | test | check | bench | gpu | doctor | clean. Each sets up $(VENV) by itself; a second call starts at once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# On a machine with a torch of its own (a GPU's): make test VENV_FLAGS=--system-site-packages TORCH=
VENV_FLAGS ?=
ARGS ?=

bin := $(VENV)/bin
ready := $(VENV)/.ready
# Sources whose change asks for a new build of the compiled part; Python is installed as a link to the sources.
sources := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test check bench gpu doctor clean
.DELETE_ON_ERROR:

demo: $(ready)
	$(bin)/python examples/train_gpt.py $(ARGS)

test: $(ready)
	$(bin)/python -m pytest -n 2 $(ARGS)

check: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

bench: $(ready)
	$(bin)/python -m steepest bench $(ARGS)

# On a machine with a GPU and a torch of its own: builds, runs the tests that need a GPU and takes the figures, each
# whatever the others said, with $(PYTHON) as it is, in nine minutes. ARGS: --quick, --dry-run, --parts ...
RESULTS ?= bench/results
MODELS ?= gpt2-124m llama-1b
gpu:
	PYTHON="$(PYTHON)" MODELS="$(MODELS)" bash bench/gpu.sh $(RESULTS) $(ARGS)

doctor: $(ready)
	$(bin)/python -m steepest doctor $(ARGS)

# One stamp for torch and the build tools, which take minutes, and one for our own build, which takes seconds.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "steepest needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13" nvidia-cutlass==4.2.0.0 $(if $(TORCH),"$(TORCH)")
	touch $@

$(ready): $(VENV)/.torch $(sources)
	$(bin)/python -m pip install --quiet --no-build-isolation --editable ".[test,codegen,plot,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist python/*.egg-info python/steepest/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
