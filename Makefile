.PHONY: demo test results studies soak clean

PYTHON = .venv/bin/python
RESULTS = benchmarks/results
# What depends on the machine has a folder, named after the kernels' instructions, the CPU and its cores, or the GPU.
HERE = $(RESULTS)/$(shell $(PYTHON) -m benchmarks.record)
# PEER=PYTHON, of an environment with llm-compressor, measures that beside.
BESIDE = $(if $(PEER),--peer $(PEER))

demo: .venv/ready
	$(PYTHON) -m benchmarks.demo

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m pytest

# Every picture of the README, from real runs; docs/results.md has the minutes.
results: .venv/ready
	$(PYTHON) -m benchmarks.serve random:1b --turns 2 --json $(HERE)/serve-random-1b.json
	$(PYTHON) -m benchmarks.gemm --device cpu --json $(HERE)/gemm.json
	$(PYTHON) -m benchmarks.convert --repeats 1 $(BESIDE) --json $(HERE)/convert.json
	$(PYTHON) -m benchmarks.demo --json $(RESULTS)/demo.json
	$(PYTHON) -m benchmarks.accuracy --through vllm $(BESIDE) --json $(RESULTS)/accuracy-vllm.json
	$(PYTHON) -m benchmarks.plot
	$(PYTHON) -m benchmarks.tables README.md docs/results.md

# Accuracy over seeds, plants and calibrations.
studies: .venv/ready
	$(PYTHON) -m benchmarks.accuracy $(BESIDE) --json $(RESULTS)/accuracy.json
	$(PYTHON) -m benchmarks.accuracy --calibration-study --json $(RESULTS)/calibration.json
	$(PYTHON) -m benchmarks.plot
	$(PYTHON) -m benchmarks.tables README.md docs/results.md

soak: .venv/ready
	$(PYTHON) -m benchmarks.soak

.venv/ready: pyproject.toml setup.py .ci/setup .ci/vllm-metadata/pyproject.toml $(shell find csrc -type f)
	.ci/setup

clean:
	rm -rf .venv build *.egg-info
