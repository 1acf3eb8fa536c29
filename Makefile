# mm_sharp: `make` lists the targets. Without make: the README gives the same steps in plain commands.
SHELL := /bin/bash
VENV ?= .venv
# The first Python of a supported version (3.10 to 3.12) on the PATH; or say `make PYTHON=/path/to/python`.
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python; do \
	if $$p -c '$(SUPPORTED)' >/dev/null 2>&1; then echo $$p; break; fi; done)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

DEMO := data/demo
WORK_DIR := work_dirs/demo
BASE_CONFIG := configs/demo/td-hm_lite0_b16-20e_demo-192x144.py
AUSAM_CONFIG := configs/demo/td-hm_lite0_ausam_b16-19e_demo-192x144.py
FLOATS := work_dirs/demo/base/epoch_20.pth work_dirs/demo/ausam/epoch_19.pth
QAT_DIR := work_dirs/demo-qat
QAT_CONFIG := configs/demo/td-hm_lite0_w8a8_b16-3e_demo-192x144.py

.DEFAULT_GOAL := help
.PHONY: help install train train-qat test test-slow test-kills reliability sweep sweep-qat lint format types docs lock doctor dist clean

help: ## list the targets
	@echo 'mm_sharp: sharpness-aware training for OpenMMLab. Targets:'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{ printf "%-16s %s\n", $$1, $$2 }'

install: $(INSTALLED) ## create .venv and install everything, pinned

# Three steps, because no single resolution gives this stack: torch brings the libraries of its own build; everything else
# comes exactly as pinned; mmpose asks for a package that no longer builds and that training never imports.
$(INSTALLED): requirements/torch.txt requirements/dev.txt requirements/mmpose.txt pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo 'mm_sharp needs Python 3.10, 3.11 or 3.12, and none is on the PATH: install one, or say make PYTHON=/path/to/python' >&2; exit 2; fi
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c requirements/dev.txt -r requirements/torch.txt
	$(PIP) install -q --no-deps -r requirements/dev.txt -r requirements/mmpose.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(DEMO)/meta.json: | $(INSTALLED)
	$(PY) tools/make_demo_data.py --out $(DEMO) --train 512 --val 256 --seed 0

# Two commands at the same time, half of the cores each: a line of the console begins with the name of its command. MMEngine's
# thousand lines before the training (the config, hooks, and what each tensor gets) are in the log of the work directory.
HALF := $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores > 1 ? cores / 2 : 1)))
shown = 2> >(sed -u 's/^/$(strip $(1)) | /' >&2) | sed -unE '/Loads checkpoint|Checkpoints will be saved/,$$s/^/$(strip $(1)) | /p'
define at_once
@export OMP_NUM_THREADS=$(HALF); set -o pipefail; \
	($(2) $(call shown,$(1))) & first=$$!; \
	($(4) $(call shown,$(3))); second=$$?; \
	wait $$first && exit $$second
endef

# glibc otherwise gives freed memory back, and gets it again page by page: a sixth of the time on a CPU.
train train-qat: export MALLOC_TRIM_THRESHOLD_ := 2147483647
train train-qat: export MALLOC_MMAP_THRESHOLD_ := 33554432

train: $(INSTALLED) $(DEMO)/meta.json ## draw people, fine-tune a keypoint model on them with AdamW and with AUSAM, compare the two
	$(call at_once,AdamW,$(PY) tools/train.py $(BASE_CONFIG) --work-dir $(WORK_DIR)/base $(ARGS),\
	AUSAM,$(PY) tools/train.py $(AUSAM_CONFIG) --work-dir $(WORK_DIR)/ausam $(ARGS))
	$(PY) tools/compare_runs.py AdamW=$(WORK_DIR)/base AUSAM=$(WORK_DIR)/ausam --samples 32 --out-dir $(WORK_DIR)
	@echo 'Both have the same learning rate. With twice of it, its best, AdamW is level with AUSAM: docs/results.md#the-demo'

$(firstword $(FLOATS)): | $(INSTALLED) $(DEMO)/meta.json
	$(MAKE) train ARGS=

# Both come from one command.
$(lastword $(FLOATS)): | $(firstword $(FLOATS))
	test -f $@ || $(MAKE) train ARGS=

train-qat: $(INSTALLED) $(FLOATS) ## quantize both models to 8 bits, fine-tune them, compare, export, and measure the speed
	$(call at_once,AdamW,$(PY) tools/train.py $(QAT_CONFIG) --work-dir $(QAT_DIR)/base $(ARGS),\
	AUSAM,$(PY) tools/train.py $(QAT_CONFIG) --work-dir $(QAT_DIR)/ausam --cfg-options load_from=$(lastword $(FLOATS)) $(ARGS))
	$(PY) tools/compare_runs.py AdamW=$(QAT_DIR)/base AUSAM=$(QAT_DIR)/ausam --samples 32 --out-dir $(QAT_DIR)
	$(PY) tools/export.py $(QAT_CONFIG) "$$(cat $(QAT_DIR)/ausam/last_checkpoint)" --benchmark --out $(QAT_DIR)/model.onnx

# Each process would compile the package and all asserts anew otherwise; the tests start dozens of them.
test test-slow test-kills: export PYTHONDONTWRITEBYTECODE :=

test: $(INSTALLED) lint types ## lint, check the types and run the fast tests (at most five minutes)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(INSTALLED) ## run the tests that take long and rarely break: command lines, exports, several processes, long runs (13 minutes)
	$(PY) -m pytest -n 2 --dist loadfile -m 'slow and not thorough and not kills' $(ARGS)

test-kills: $(INSTALLED) ## kill training runs at random times, and resume them (about five minutes)
	$(PY) -m pytest -m kills -s $(ARGS) tests/step/test_kills.py tests/step/test_rank_faults.py tests/cli/test_process.py tests/step/test_resume.py

FOUND := work_dirs/reliability.jsonl

reliability: $(INSTALLED) ## put every method through all faults, kills and long runs; write the tables of docs/reliability.md
	mkdir -p $(dir $(FOUND)) && rm -f $(FOUND)
	$(PY) -m pytest -n 2 --dist loadfile -m '' --reliability $(CURDIR)/$(FOUND) $$(grep -l 'holds: Holds' tests/*/test_*.py)
	$(PY) -m tests.reliability_page $(FOUND) docs/reliability.md

sweep: $(INSTALLED) ## try SAM at rho = 0 on all models that the packages ship; write docs/model_sweep.md
	OMP_NUM_THREADS=1 $(PY) -m tests.sweep work_dirs/model_sweep.jsonl --page docs/model_sweep.md $(ARGS)

sweep-qat: $(INSTALLED) ## quantize, train and export a small model with every backbone; write docs/quantized_backbones.md
	OMP_NUM_THREADS=1 $(PY) -m tests.sweep.quantized work_dirs/quantized_backbones.jsonl --page docs/quantized_backbones.md $(ARGS)

lint: $(INSTALLED) ## ruff: lint and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED) ## ruff: mend what can be mended
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(INSTALLED) ## mypy, strict
	$(VENV)/bin/mypy

# Of its own, since it needs nothing of the stack: mkdocstrings reads the sources without importing them.
DOCS := $(VENV)-docs

$(DOCS)/.installed: requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install -q -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/.installed ## build the documentation as a site, strictly, into build/docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

doctor: $(INSTALLED) ## print versions, active fixes, and what is broken
	$(PY) -m mm_sharp.doctor

dist: $(INSTALLED) ## build the wheel and the source archive into dist/
	$(PY) -m hatchling build -d dist

# uv resolves for Python 3.10 to 3.12 at once; torch and the libraries of its build stay out (see requirements/torch.txt).
lock: ## compile requirements/dev.in and docs.in into dev.txt and docs.txt (needs uv)
	uv pip compile -q --universal --python-version 3.10 --no-annotate --no-header \
		--override requirements/override.in requirements/dev.in \
		| grep -vE '^(torch|opencv-python|nvidia-.*|cuda-.*|triton)==' > requirements/dev.txt
	uv pip compile -q --universal --fork-strategy fewest --python-version 3.10 --no-annotate --no-header requirements/docs.in > requirements/docs.txt

clean: ## remove caches and builds (not the environments, data or work_dirs)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
