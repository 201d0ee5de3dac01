"""The process of an engine, with a small program in its place: what it writes, how it fails, that it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vllm_w8a8_bismooth import engine
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.scoring import worker
from vllm_w8a8_bismooth.scoring.worker import Engine

PROGRAM = """
import json, os, subprocess, sys, time
import numpy as np
request = json.load(sys.stdin)
print("asked for", request["model"], os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"], flush=True)
open(os.path.join(request["folder"], "pid"), "w").write(str(os.getpid()))
for number in request["wanted"]:
    while request["ahead"] and sum(n.endswith(".npy") for n in os.listdir(request["folder"])) >= request["ahead"]:
        time.sleep(0.01)
    path = os.path.join(request["folder"], f"{number:06d}")
    np.save(path + ".tmp.npy", np.full((2, 3), number, np.float32))
    os.rename(path + ".tmp.npy", path + ".npy")
"""
ANSWERS = (
    'json.dump({"dtype": "float32"}, open(sys.argv[1] + ".part", "w")); os.rename(sys.argv[1] + ".part", sys.argv[1])'
)


@pytest.fixture
def program(monkeypatch):
    """``program(end)``: in the place of vLLM, with an end of its own."""
    monkeypatch.setattr(engine, "refuse_absence", lambda: None)

    def be(end: str) -> None:
        monkeypatch.setattr(
            engine, "_command", lambda module, answer: [sys.executable, "-c", PROGRAM + end, str(answer)]
        )

    return be


@pytest.fixture
def asked(tmp_path) -> tuple[Engine, Path, Path]:
    (tmp_path / "windows").mkdir()
    return (
        Engine(tmp_path / "model", {"dtype": "auto"}, tmp_path / "log"),
        tmp_path / "tokens.npy",
        tmp_path / "windows",
    )


def gone(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("ahead", [None, 1])
def test_windows_come_one_after_the_other(program, asked, ahead):
    program(ANSWERS)
    running, tokens, folder = asked
    found = []
    for number, path in running.windows(tokens, [0, 2, 5], folder, ahead):
        assert np.load(path).tolist() == [[number] * 3] * 2
        found.append(number)
        if ahead:
            path.unlink()
    assert found == [0, 2, 5] and running.answer == {"dtype": "float32"} and gone(folder)


def test_an_end_that_is_bad_after_all_is_done(program, asked):
    program(f"{ANSWERS}; os.abort()")
    running, tokens, folder = asked
    assert len(list(running.windows(tokens, [0, 1], folder))) == 2 and running.answer


def test_a_failure_shows_the_end_of_the_log(program, asked):
    program("print('\\n'.join(f'line {i}' for i in range(50))); raise ValueError('no such model')")
    running, tokens, folder = asked
    with pytest.raises(BismoothError) as caught:
        list(running.windows(tokens, [0], folder))
    said = str(caught.value)
    assert "model: vLLM failed on it (exit code 1), and said at last:" in said and "ValueError: no such model" in said
    assert "line 49" in said and "line 20" not in said and f"the whole log is {folder.parent / 'log'}" in said
    assert "asked for" in (folder.parent / "log").read_text() and not list(folder.parent.glob("*.tmp"))


def test_who_stops_looking_ends_it(program, asked):
    """Also its own children."""
    program("subprocess.Popen(['sleep', '1000']); time.sleep(1000)")
    running, tokens, folder = asked
    windows = running.windows(tokens, [0], folder)
    next(windows)
    windows.close()
    assert gone(folder)


def test_environment(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert worker.environment()["VLLM_CPU_KVCACHE_SPACE"] == "1"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert worker.environment()["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_a_killed_run_leaves_no_engine(tmp_path):
    """SIGKILL gives the run no time to end the engine, which then ends by itself."""
    script = (
        "import os, subprocess, sys, time\n"
        "child = 'import os, sys, time\\n'\n"
        "child += 'from vllm_w8a8_bismooth.serving import predictions\\n'\n"
        "child += 'parent = os.getppid()\\n'\n"
        "child += 'print(os.getpid(), flush=True)\\n'\n"
        "child += 'while True:\\n    predictions._end_with(parent)\\n    time.sleep(0.02)\\n'\n"
        "subprocess.Popen([sys.executable, '-c', child]).wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(500):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.02)
    pytest.fail("it goes on")


def test_the_request_is_json(program, asked):
    program(ANSWERS)
    running, tokens, folder = asked
    list(running.windows(tokens, np.arange(2).tolist(), folder))
    assert json.dumps(running.answer)
