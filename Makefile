.PHONY: help demo check test kernels wheel results studies soak clean

PYTHON = .venv/bin/python
RESULTS = benchmarks/results
# What depends on the machine has a folder, named after the kernels' instructions, the CPU and its cores, or the GPU.
HERE = $(RESULTS)/$(shell $(PYTHON) -m benchmarks.record)
# PEER=PYTHON, of an environment with llm-compressor, measures that beside.
BESIDE = $(if $(PEER),--peer $(PEER))

CSRC = $(shell find csrc -type f)

define LINT
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	.venv/bin/mypy
endef

# Two processes with one thread each: most tests use one core, and engines start on one.
BESIDE_EACH_OTHER = OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(PYTHON) -m pytest -n 2 --dist loadfile

help: # this list
	@sed -n 's/^\([a-z]*\):.*# \(.*\)/make \1	\2/p' Makefile | expand -t 16

demo: .venv/ready # an INT8 collapse, its repairs, and a vLLM server that answers from a repaired checkpoint
	$(PYTHON) -m benchmarks.demo

check: .venv/ready # for every commit, under three minutes: linters, types, and the fast tests
	$(LINT)
	$(BESIDE_EACH_OTHER) --hypothesis-profile quick -m "not slow and not engine and not network and not soak"

test: .venv/ready # linters, types, and all tests, as CI runs them
	$(LINT)
	$(BESIDE_EACH_OTHER) -m "not soak"

kernels: .venv/packages # compile what has changed in csrc/, or for another BISMOOTH_CUDA
	.ci/setup kernels

wheel: .venv/ready # into dist/, for every Python from 3.10 on; then installed in a fresh environment, and served from
	rm -rf dist
	.ci/wheel dist
	WHEEL=$$(echo dist/*.whl) $(PYTHON) -m pytest tests/test_wheel.py

results: .venv/ready # every picture of the README, from real runs; docs/results.md has the minutes
	$(PYTHON) -m benchmarks.serve random:1b --turns 2 --json $(HERE)/serve-random-1b.json
	$(PYTHON) -m benchmarks.gemm --device cpu --json $(HERE)/gemm.json
	$(PYTHON) -m benchmarks.convert --repeats 1 $(BESIDE) --json $(HERE)/convert.json
	$(PYTHON) -m benchmarks.demo --json $(RESULTS)/demo.json
	$(PYTHON) -m benchmarks.accuracy --through vllm $(BESIDE) --json $(RESULTS)/accuracy-vllm.json
	$(PYTHON) -m benchmarks.plot
	$(PYTHON) -m benchmarks.tables README.md docs/results.md docs/models.md

studies: .venv/ready # accuracy over seeds, plants and calibrations; every family of models
	$(PYTHON) -m benchmarks.accuracy $(BESIDE) --json $(RESULTS)/accuracy.json
	$(PYTHON) -m benchmarks.accuracy --calibration-study --json $(RESULTS)/calibration.json
	$(PYTHON) -m benchmarks.compute_dtype --json $(RESULTS)/compute-dtype.json
	$(PYTHON) -m benchmarks.families --json $(RESULTS)/families.json
	$(PYTHON) -m benchmarks.plot
	$(PYTHON) -m benchmarks.tables README.md docs/results.md docs/models.md

soak: .venv/ready # five minutes of load on a server
	$(PYTHON) -m benchmarks.soak

clean: # the environment and everything that was built
	rm -rf .venv build dist *.egg-info vllm_w8a8_bismooth/_C.so

.venv/packages: pyproject.toml .ci/setup .ci/vllm-metadata/pyproject.toml
	.ci/setup

.venv/ready: .venv/packages setup.py $(CSRC)
	.ci/setup kernels
