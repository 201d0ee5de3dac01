import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_w8a8_bismooth import __version__

BISMOOTH = str(Path(sys.executable).with_name("bismooth"))


def bismooth(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([BISMOOTH, *map(str, arguments)], capture_output=True, text=True)


def test_help_is_quick():
    """Half a second of processor time at most: nothing heavy is imported. Elapsed time would measure the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = bismooth("convert", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--calibration" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


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
