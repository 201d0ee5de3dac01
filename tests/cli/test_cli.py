import contextlib
import fcntl
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.command import json_of, run
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.sweep import sweep
from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.cli.progress import Progress
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.recipe import Recipe

BISMOOTH = str(Path(sys.executable).with_name("bismooth"))


def bismooth(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([BISMOOTH, *map(str, arguments)], capture_output=True, text=True)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder: sizes and times of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("words", [("convert", "--help"), ("--help",), ("--version",)], ids=" ".join)
def test_help_is_light(words):
    """Nothing that takes long is imported: no torch, transformers, safetensors, vLLM, huggingface_hub, matplotlib."""
    script = (
        "import json, sys\n"
        "from vllm_w8a8_bismooth.cli.main import main\n"
        f"sys.argv = ['bismooth', *{words!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('\\n' + json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and (words != ("convert", "--help") or "--calibration" in done.stdout), done.stderr
    modules = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert "vllm_w8a8_bismooth" in modules
    heavy = "torch transformers safetensors numpy huggingface_hub compressed_tensors tokenizers yaml matplotlib vllm"
    assert modules & set(heavy.split()) == set()


def test_version():
    assert bismooth("--version").stdout.strip() == f"bismooth {__version__}"


def test_errors_go_to_stderr_in_one_message(tmp_path):
    done = bismooth("convert", tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and "no such folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("method", sweep(["bismooth", "rtn", "mixed"]))
def test_convert(make_checkpoint, tmp_path, method):
    source, out = make_checkpoint(), tmp_path / "out"
    done = bismooth("convert", source, out, "--method", method, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["linears"]) == 21 and report["written_bytes"] < report["source_bytes"] and not report["reused"]
    assert json.loads((out / "recipe.json").read_text())["recipe"]["method"] == method
    again = bismooth("convert", source, out, "--method", method, "--json")
    assert json.loads(again.stdout) == report | {"reused": True}
    again = bismooth("convert", source, out, "--method", method)
    assert again.returncode == 0 and "already holds this conversion" in again.stderr.replace("\n", " ")


def dry_run(source: Path, out: Path, *options) -> dict:
    """The plan as JSON; nothing beside source and destination has changed."""
    before = everything(out.parent)
    code, text = run("convert", source, out, "--dry-run", "--json", *options)
    assert code == 0, text
    assert everything(out.parent) == before
    return json_of(text)


def interrupt(source: Path, out: Path, recipe: Recipe) -> None:
    """Leave a conversion with two blocks done."""

    def interrupted(stage, done, total, written):
        if stage == "convert" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, recipe, progress=interrupted)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--group-size", "32", "--group-layers", "layers.0.*down_proj"),
        ("--ignore", r"layers\.1\.self_attn\.v|layers\.2.*down"),
    ],
)
def test_dry_run_is_the_plan_of_the_run(make_checkpoint, tmp_path, calibration_text, monkeypatch, options):
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "40KB")
    source, out = make_checkpoint(), tmp_path / "new" / "out"
    options = (*options, "--calibration", calibration_text, "--calibration-tokens", "256")
    plan = dry_run(source, out, *options)
    assert not out.parent.exists()
    code, text = run("convert", source, out, "--json", *options)
    report = json_of(text)
    assert code == 0 and plan["written_bytes"] == report["written_bytes"] == sum(plan["shards"].values())
    assert plan["shards"].keys() == {path.name for path in out.glob("*.safetensors")} and len(plan["shards"]) > 2
    assert plan["grouped"] == [n for n, entry in report["linears"].items() if entry["group_size"]]
    assert plan["ignored"] == report["ignored"] and len(report["linears"]) == 21 - len(report["ignored"])
    assert len(plan["ignored"]) == (4 if "--ignore" in options else 0)
    assert plan["tokens"] == 256 and plan["blocks"] == 3 and plan["resumed"] == 0 and plan["seconds"] > 0
    assert dry_run(source, out, *options)["reused"]


def test_dry_run_knows_what_a_resume_skips(make_checkpoint, tmp_path):
    source, out = make_checkpoint(), tmp_path / "out"
    assert dry_run(source, out, "--method", "mixed", "--group-size", "32")["grouped"] is None
    interrupt(source, out, Recipe.of("mixed", group_size=32))
    plan = dry_run(source, out, "--method", "mixed", "--group-size", "32")
    assert 1 <= plan["resumed"] <= 2 and plan["grouped"] == []
    code, text = run("convert", source, out, "--method", "mixed", "--group-size", "32", "--dry-run")
    assert code == 0 and f"{plan['resumed']} of 3 blocks are done" in text and "Nothing was written" in text
    before = everything(tmp_path)
    code, text = run("convert", source, out, "--method", "rtn", "--dry-run")
    assert code == 2 and "an unfinished conversion of another kind" in text
    with open(tmp_path / "out.partial" / ".bismooth" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, text = run("convert", source, out, "--method", "mixed", "--group-size", "32", "--dry-run")
    assert code == 2 and "another conversion is writing it" in text and everything(tmp_path) == before


def occupied(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("precious")


REFUSED = {
    "destination": (occupied, [], ["exists and is no result of bismooth"]),
    "partial folder": (
        lambda out: occupied(out.with_name("out.partial")),
        [],
        ["out.partial", "is no unfinished conversion"],
    ),
    "file on the way": (lambda out: out.with_name("out.partial").write_text(""), [], ["cannot be written"]),
    "group size": (None, ["--method", "mixed", "--group-size", "64", "--group-layers", "down_proj"], ["K = 96"]),
    "calibration": (None, ["--calibration", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
    "device": (None, ["--device", "tpu"], ["--device tpu"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dry_run_refuses_what_the_run_refuses(make_checkpoint, tmp_path, case):
    prepare, options, parts = REFUSED[case]
    source, out = make_checkpoint(), tmp_path / "out"
    if prepare:
        prepare(out)
    before = everything(tmp_path)
    for dry in (["--dry-run"], []):
        code, text = run("convert", source, out, *options, *dry)
        assert code == 2 and all(part in text for part in parts), text
        assert everything(tmp_path) == before


def test_dry_run_notices_a_config_that_transformers_refuses(make_checkpoint, tmp_path, calibration_text):
    source = make_checkpoint()
    edit_json(source / "config.json", lambda config: config.update(hidden_act="nonsense"))
    code, text = run("convert", source, tmp_path / "out", "--calibration", calibration_text, "--dry-run")
    assert code == 2 and "config.json: transformers builds no model of it" in text


def test_interrupt_is_one_line(make_checkpoint, tmp_path):
    """While it waits for its calibration text, which here is a pipe that nobody writes into."""
    pipe = tmp_path / "text.txt"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "vllm_w8a8_bismooth", "convert", make_checkpoint(), tmp_path / "out"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen([*command, "--calibration", pipe], stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    writer = None
    while writer is None and process.poll() is None:
        with contextlib.suppress(OSError):  # until it reads
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    for _ in range(5):  # an interrupt that meets a destructor is lost, as Python has it
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(timeout=15)
            break
    os.close(writer)
    assert process.returncode == 130 and said == "Interrupted; the same command goes on from there\n", said


def test_progress_away_from_a_terminal(monkeypatch):
    """A line where a stage begins and ends, and between them only now and then."""
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress(Console(file=out, width=200)) as progress:
        for done in range(81):
            now[0] += 1
            progress("convert", done, 80, done * 10**9)
    lines = out.getvalue().splitlines()
    assert len(lines) == 9 and lines[0].startswith("convert: 0 of 80 blocks, peak memory ")
    assert lines[1].startswith("convert: 10 of 80 blocks, 70 s left, 10.00 GB written, peak memory ")
    assert lines[-1].startswith("convert: 80 of 80 blocks, 80.00 GB written")


def test_progress_on_a_terminal():
    out = io.StringIO()
    with Progress(Console(file=out, width=200, force_terminal=True)) as progress:
        progress("analyze", 1, 2)
        progress("convert", 2, 2, 3 * 10**9)
    assert "1/2" in out.getvalue() and "3.00 GB written, peak memory" in out.getvalue()


def test_many_problems_are_one_message():
    problems = [Problem(file, "absent", "download it") for file in "abcdefghij"]
    assert str(BismoothError(problems[0])) == str(BismoothError.of(Path("a"), "absent", "download it"))
    assert str(BismoothError(*problems[:2])) == "a: absent; download it\n  also: b: absent; download it"
    ending = "also: h: absent; download it\n  and 2 more"
    assert str(BismoothError(*problems)).endswith(ending)


SPINS = """
import os, sys
from vllm_w8a8_bismooth.cli import main
assert "torch" not in sys.modules, "which reads them when it is imported"
sys.argv = ["bismooth", *sys.argv[1:]]
main.app = lambda: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
main.main()
"""


@pytest.mark.parametrize(
    ("verb", "given", "expected"),
    [
        ("convert", {}, "100"),
        ("analyze", {}, "100"),
        ("doctor", {}, "None"),
        ("score", {}, "None"),
        ("convert", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("convert", {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_threads_that_wait_do_not_spin(verb, given, expected):
    """Where blocks are worked on; what is timed, or is vLLM's, keeps what it would have, and so does who says how."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    command = [sys.executable, "-c", SPINS, verb]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]
