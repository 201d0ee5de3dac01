"""The releases at the ends of the supported range, of which the Python sources run here, without a compiled library.

They get all tests that import vLLM without starting an engine, then load a checkpoint and multiply with it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.vllm_sources import RELEASES, fetch

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.network


@pytest.fixture(scope="module", params=RELEASES)
def release(request) -> str:
    try:
        fetch(request.param)
    except subprocess.CalledProcessError as error:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"pip cannot download {RELEASES[request.param]} {request.param}: {error.stderr.strip()[-500:]}")
    return request.param


def run(release: str, *module: str) -> str:
    """``python -m ...`` with that vLLM; its output. Not its exit code: vLLM may abort in the interpreter's teardown."""
    path = os.pathsep.join([str(fetch(release)), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-m", *module],
        env=os.environ | {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1"},
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    return done.stdout


def test_tests_without_an_engine(release):
    imports = re.compile(r"^ *(from|import) (vllm\b|vllm_w8a8_bismooth\.serving)", re.MULTILINE)
    files = [str(path) for path in TESTS.rglob("test_*.py") if imports.search(path.read_text())]
    assert len(files) >= 3
    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-profile=quick", "-m"]
    output = run(release, "pytest", *options, "not engine and not gpu and not network", *files)
    summary = output.splitlines()[-1]
    assert " passed" in summary and "failed" not in summary and "error" not in summary, output[-5000:]


def test_checkpoint_loads_and_multiplies(release, checkpoints, tmp_path):
    """Bit for bit what the checkpoint's tensors give, in the fused linears too."""
    answer = tmp_path / "answer.json"
    output = run(
        release, "tests.support.workers.loading", str(checkpoints["mixed"]), str(checkpoints["planted"]), str(answer)
    )
    assert answer.exists(), output[-3000:]
    found = json.loads(answer.read_text())
    assert found["version"] == release and found["method"] == "w8a8_bismooth"
    assert len(found["groups"]) == 4 * 6 + 1 and set(found["groups"].values()) == {None, 32}
    assert found["unequal"] == []
    assert "has no quantization_config: convert the model with `bismooth convert`" in found["refusal"]


def test_verify_asks_it(release, checkpoints):
    output = run(release, "vllm_w8a8_bismooth", "verify", str(checkpoints["mixed"]))
    assert "nothing wrong" in output and "was not checked" not in output
