.PHONY: demo test soak clean

demo: .venv/ready
	.venv/bin/python -m benchmarks.demo

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

soak: .venv/ready
	.venv/bin/python -m benchmarks.soak

.venv/ready: pyproject.toml setup.py .ci/setup .ci/vllm-metadata/pyproject.toml $(shell find csrc -type f)
	.ci/setup

clean:
	rm -rf .venv build *.egg-info
