import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_w8a8_bismooth import __version__

BISMOOTH = str(Path(sys.executable).with_name("bismooth"))


def bismooth(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([BISMOOTH, *map(str, arguments)], capture_output=True, text=True)


def test_help_is_quick():
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = bismooth("convert", "--help")
        times.append(time.monotonic() - started)
        assert done.returncode == 0 and "--calibration" in done.stdout
    assert min(times) < 1.0  # half a second on an idle machine


def test_version():
    assert bismooth("--version").stdout.strip() == f"bismooth {__version__}"


def test_errors_go_to_stderr_in_one_message(tmp_path):
    done = bismooth("convert", tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and "no such folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["rtn", "mixed", "bismooth"])
def test_convert(make_checkpoint, tmp_path, method):
    source, out = make_checkpoint(), tmp_path / "out"
    done = bismooth("convert", source, out, "--method", method, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["linears"]) == 21 and report["written_bytes"] < report["source_bytes"] and not report["reused"]
    assert json.loads((out / "recipe.json").read_text())["recipe"]["method"] == method
    again = bismooth("convert", source, out, "--method", method)
    assert again.returncode == 0 and "already holds this conversion" in again.stderr.replace("\n", " ")
