# make demo | test | test-quick | test-slow | test-all | test-kernels | test-integrations | test-trainers | check
# | check-torch | wheel | sdist | docs | bench | gpu | doctor | clean. Each sets up $(VENV) by itself; a second call
# starts at once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# On a machine with a torch of its own (a GPU's): make test VENV_FLAGS=--system-site-packages TORCH=
VENV_FLAGS ?=
ARGS ?=
# What the compiled part is built for (setup.py): the GPUs of this machine, without CUDA where there are none.
# test-kernels and wheel build for all.
STEEPEST_CUDA ?= local
export STEEPEST_CUDA

bin := $(VENV)/bin
install := $(bin)/python -m pip install --quiet
build_tools := "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13"
say := $(bin)/python -c 'import setup; b = setup.decide(); [print("==", line) for line in (b, b.warning) if line]'
# What shows that a build works with its torch: schemas, doors, steps on every backend that is there, products of DTensors,
# a traced step, defaults of torch's that somebody has set.
compiled_tests := tests/optim/test_backends_of_a_step.py tests/kernels/test_weight_update.py tests/kernels/test_chain_numbers.py \
	tests/distributed/test_qk_clip.py tests/linalg/test_modes.py tests/optim/test_along_polar.py \
	'tests/optim/test_compile.py::test_compiled_once_and_equal_to_eager[Muon-True-cpu]' \
	tests/optim/test_product_norms.py::test_a_compiled_function_may_call_a_coupled_step
# The oldest Triton that the kernels are for and the newest, whose PTX is executed beside that of torch's own.
tritons := build/triton-3.6/.ready build/triton-3.9/.ready
# Sources whose change asks for a new build of the compiled part; Python is installed as a link to the sources.
sources := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-quick test-slow test-all test-kernels test-integrations test-trainers check check-torch wheel sdist \
	docs bench gpu doctor clean same-python
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	@echo "== Training a small GPT with three optimizers: 2 to 3 minutes on two cores"
	$(bin)/python examples/train_gpt.py $(ARGS)

# The tests that need no nvcc: while editing, before a commit, the rest, and all of them in one run.
test-quick: tests := quick and not slow and not kernels
test-quick: takes := half a minute
test: tests := not slow and not kernels
test: takes := 3 to 4 minutes
test-slow: tests := slow and not kernels
test-slow: takes := 20 minutes
test-all: tests := not kernels
test-all: takes := 25 minutes
# Two dozen processes import the package, and three workers all tests: each is compiled once. On two cores a third worker has
# what the others leave while they wait for processes.
test-quick test test-slow test-all: export PYTHONDONTWRITEBYTECODE :=
test-quick test test-slow test-all: $(VENV)/.built $(VENV)/.test
	@echo "== $@, which needs no nvcc: $(takes) on two cores"
	$(bin)/python -m pytest -n 3 -m "$(tests)" $(ARGS)

# Every kernel for every architecture: its machine code is read, and its PTX executed.
test-kernels: $(VENV)/.built-all $(VENV)/.test $(tritons)
	@echo "== The tests of compiled kernels: about 10 minutes on two cores"
	STEEPEST_TEST_KERNELS=1 $(bin)/python -m pytest -n 2 -m kernels $(ARGS)

# With the frameworks themselves, which bring much along: in a virtual environment of their own, beside the build that is
# there. A test whose package is missing says so.
integrations := build/integrations
test-integrations: $(integrations)/.ready
	@echo "== The tests with other people's packages: 2 minutes on two cores"
	$(integrations)/bin/python -m pytest -n 2 tests/integrations $(ARGS)

$(integrations)/.ready: $(VENV)/.built pyproject.toml
	@echo "== Transformers, timm, Lightning and others, into $(integrations): downloads, then two minutes"
	$(PYTHON) -m venv $(VENV_FLAGS) $(integrations)
	$(integrations)/bin/python -m pip install --quiet --upgrade pip
	$(integrations)/bin/python -m pip install --quiet $(if $(TORCH),"$(TORCH)") --group test --group integrations
	$(integrations)/bin/python -m pip install --quiet --no-deps --group torchtitan || echo "torchtitan needs Python 3.11"
	echo "$(abspath python)" > "$$($(integrations)/bin/python -c 'import site; print(site.getsitepackages()[0])')/steepest.pth"
	touch $@

# TorchTune, axolotl, LLaMA-Factory, TRL and Ultralytics, each with the versions of other packages that it wants and on top
# of those above. Not among what must pass: they download for minutes.
trainers := torchtune axolotl llamafactory trl ultralytics
test-trainers: $(trainers:%=build/trainers/%/.ready)
	@echo "== The tests with $(trainers): 3 minutes on two cores"
	for name in $(trainers); do HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 YOLO_OFFLINE=1 YOLO_AUTOINSTALL=0 \
	    build/trainers/$$name/bin/python -m pytest tests/integrations/test_$$name.py tests/integrations/test_pages.py -k $$name $(ARGS) || exit; done

build/trainers/%/.ready: $(integrations)/.ready
	@echo "== $*, into $(@D): downloads"
	$(PYTHON) -m venv --without-pip $(@D)
	$(integrations)/bin/python -c 'import site; print(site.getsitepackages()[0])' > \
	    "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/integrations.pth"
	echo "$(abspath python)" > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/steepest.pth"
	$(integrations)/bin/python -m pip --python $(@D)/bin/python install --quiet --no-deps --group $*
	touch $@

check: $(VENV)/.torch $(VENV)/.dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# Whether the sources build against another torch, load and make steps: make check-torch TORCH="torch==2.11.0". In a
# virtual environment of its own, which is thrown away.
other := build/check-torch
check-torch:
	$(if $(TORCH),,$(error check-torch builds against the torch that is named: make check-torch TORCH="torch==2.11.0"))
	@echo "== $(TORCH): downloads, then some minutes on two cores"
	rm -rf $(other)
	$(PYTHON) -m venv $(other)
	$(other)/bin/python -m pip install --quiet --upgrade pip
	$(other)/bin/python -m pip install --quiet --no-compile "$(TORCH)" $(build_tools) --group test
	STEEPEST_CUDA=0 $(other)/bin/python -m pip install --quiet --no-build-isolation --no-deps .
	$(other)/bin/python -m pytest -n 2 -q -p no:cacheprovider $(compiled_tests)
	rm -rf $(other)

# The wheel that every Python imports, into dist/, for all architectures; STEEPEST_CUDA=0 makes the one without CUDA. Its
# tag names the oldest Linux that has what it asks of the system; torch's libraries are the user's own.
wheel: export STEEPEST_CUDA := $(STEEPEST_CUDA:local=1)
wheel: $(VENV)/.torch $(VENV)/.cutlass $(VENV)/.release
	@$(say)
	rm -rf dist build/wheel
	$(bin)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(bin)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	$(bin)/python .ci/check_wheel.py dist/*.whl

# The archive of the sources, into dist/, and a wheel out of it, without CUDA and away from this folder, to see that it can.
sdist: $(VENV)/.torch $(VENV)/.release
	rm -rf dist/*.tar.gz build/sdist
	$(bin)/python -m build --sdist --no-isolation --outdir dist .
	STEEPEST_CUDA=0 $(bin)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/sdist dist/*.tar.gz
	$(bin)/python .ci/check_wheel.py dist/*.tar.gz build/sdist/*.whl
	$(bin)/python -m twine check --strict dist/*.tar.gz build/sdist/*.whl

# The site, into build/docs/html, from docs/, the docstrings and the notebooks. A link that leads nowhere is an error.
site := build/docs
docs: $(site)/.ready
	$(site)/bin/python -m sphinx -W --keep-going -q -b html docs $(site)/html
	@echo "== $(abspath $(site))/html/index.html"

$(site)/.ready: $(VENV)/.torch pyproject.toml
	@echo "== The site's generator, into $(site): downloads, then some seconds"
	$(PYTHON) -m venv $(site)
	$(site)/bin/python -m pip install --quiet --upgrade pip
	$(site)/bin/python -m pip install --quiet --group docs
	echo "$$($(bin)/python -c 'import torch; print(torch.__path__[0].rpartition("/")[0])')" > \
	"$$($(site)/bin/python -c 'import site; print(site.getsitepackages()[0])')/torch.pth"
	touch $@

bench: $(VENV)/.built
	$(bin)/python -m steepest bench $(ARGS)

# On a machine with a GPU and a torch of its own: builds, runs the tests that need a GPU and takes the figures, each
# whatever the others said, with $(PYTHON) as it is, in nine minutes. ARGS: STEP..., --quick, --dry-run, --site DIR, --pack DIR
RESULTS ?= bench/results
MODELS ?= gpt2-124m llama-1b
gpu:
	PYTHON="$(PYTHON)" MODELS="$(MODELS)" bash bench/gpu.sh "$(RESULTS)" $(ARGS)

doctor: $(VENV)/.built
	$(bin)/python -m steepest doctor $(ARGS)

$(tritons): build/triton-%/.ready: $(VENV)/.torch
	$(install) --target $(@D) --no-deps triton==$*.0
	touch $@

# A virtual environment keeps the Python that it was made with: another one would be asked for in vain.
same-python:
ifneq ($(origin PYTHON),file)
	@test ! -e $(VENV)/.torch || test "$$($(PYTHON) -VV)" = "$$($(bin)/python -VV)" || { echo "$(VENV) was made with \
	$$($(bin)/python -V), and PYTHON=$(PYTHON) is $$($(PYTHON) -V): make clean, or set VENV to another folder" >&2; exit 1; }
endif

# Stamps: torch and the build tools, which take a minute or two of downloads; the compiled part; the tools of each command.
$(VENV)/.torch: | same-python
	@echo "== $(VENV) with $(or $(TORCH),the torch of $(PYTHON)) and build tools: downloads, then half a minute"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "steepest needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(install) --upgrade pip
	$(install) $(build_tools) $(if $(TORCH),"$(TORCH)")
	touch $@

# Headers alone: what the package depends on is for its Python part.
$(VENV)/.cutlass: $(VENV)/.torch
	$(install) --no-deps nvidia-cutlass==4.2.0.0
	touch $@

$(VENV)/.built: $(VENV)/.torch $(if $(shell command -v nvidia-smi 2>/dev/null),$(VENV)/.cutlass) $(sources)
	@$(say)
	$(install) --no-build-isolation --editable ".[plot]"
	touch $@

# In place of the build for this machine, of which it has all.
$(VENV)/.built-all: export STEEPEST_CUDA := 1
$(VENV)/.built-all: $(VENV)/.torch $(VENV)/.cutlass $(sources)
	@$(say)
	$(install) --no-build-isolation --editable ".[plot]"
	touch $(VENV)/.built $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "== Packages for the tests: downloads, then some seconds"
	$(install) --group test --group triton
	touch $@

$(VENV)/.release: $(VENV)/.torch pyproject.toml
	$(install) --group release
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "== Formatters, linter and type checker: downloads, then some seconds"
	$(install) --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist python/*.egg-info python/steepest/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
