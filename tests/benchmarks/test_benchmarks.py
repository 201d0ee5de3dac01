"""Benchmarks on small data."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, record
from benchmarks.compare import distance
from benchmarks.tasks import continuation
from vllm_w8a8_bismooth import ops

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_conversions(tmp_path):
    command = [sys.executable, "-m", "benchmarks.convert", "--quick", "--json", "out.json"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    record = json.loads((tmp_path / "out.json").read_text())
    rows = record["rows"]
    assert [(row["arm"], row["blocks"]) for row in rows] == [
        ("RTN", 2),
        ("data-free", 2),
        ("calibrated", 2),
        ("data-free", 4),
    ]
    for row in rows:
        assert row["seconds"] == [row["median"]["seconds"]] and row["seconds"][0] > 0
        assert row["cpu_seconds"][0] > 0
        assert 100e6 < row["peak_rss_bytes"][0] < 4e9
        # A byte and a share of the scales for each weight of a block; embeddings and head stay as they are.
        assert 1 < row["output_bytes"][0] / (row["blocks"] * 3538944 + 2 * 2 * 2048 * 512) < 1.1
    targets = {target["name"]: target for target in record["targets"]}
    assert len(targets) == 7 and all(t["measured"] > 0 for t in targets.values() if t["measured"] is not None)
    assert all(t["met"] is (None if t["measured"] is None else t["measured"] <= t["target"]) for t in targets.values())
    assert targets["seconds of --help"]["measured"] is not None
    assert record["ratios"] == [] and record["peer_versions"] == {}
    assert not list((tmp_path / "build/convert").glob("*-headers"))


def test_distance():
    """Two windows of two predicted tokens; one token differs."""
    reference = np.log(np.full((2, 2, 2), 0.5, dtype=np.float32))
    other = reference.copy()
    other[1, 0] = np.log([0.8, 0.2])
    found = distance(reference, other, np.array([[0, 0, 0], [0, 1, 0]])).as_dict()
    worst = 0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)
    assert found["kl_worst"] == pytest.approx(worst, rel=1e-6)
    assert found["kl"] == pytest.approx(worst / 4, rel=1e-6)
    assert found["kl_error"] == pytest.approx(worst / 4, rel=1e-6)  # windows: 0 and worst / 2
    assert found["top1"] == 1.0 and found["ppl"] == pytest.approx((2**3 * 5) ** 0.25, rel=1e-6)


VIRTUAL = {"level": "amx", "cpu": "Intel(R) Xeon(R) Processor", "family": 6, "model": 143, "stepping": 8, "cores": 2}
EPYC = {"level": "avx2", "cpu": "AMD EPYC", "family": 25, "model": 1, "stepping": 1, "cores": 2}


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (VIRTUAL, "amx-intel-xeon-f6m143s8-2-cores"),
        (VIRTUAL | {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"}, "amx-intel-xeon-platinum-8481c-2-cores"),
        (EPYC, "avx2-amd-epyc-f25m1s1-2-cores"),
        (EPYC | {"level": "avx512_vnni"}, "avx512_vnni-amd-epyc-f25m1s1-2-cores"),
        (EPYC | {"model": 17}, "avx2-amd-epyc-f25m17s1-2-cores"),
        (EPYC | {"cpu": "AMD EPYC 7B13 64-Core Processor", "cores": 16}, "avx2-amd-epyc-7b13-16-cores"),
        (EPYC | {"cpu": "unknown", "model": None}, "avx2-unknown-2-cores"),
        (VIRTUAL | {"gpu": "NVIDIA H200"}, "nvidia-h200"),
    ],
)
def test_folder_of_what_results_depend_on(machine, name):
    assert record.folder({"gpu": None, **machine}) == name


def test_record_of_this_machine(tmp_path, monkeypatch):
    """What the folder's name is made of is in each file; the system's own tool reads the same."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("benchmarks.demo"))
    record.write(tmp_path / "x.json", [])
    machine = json.loads((tmp_path / "x.json").read_text())["machine"]
    assert record.here("x") == record.RESULTS / record.folder(machine) / "x.json"
    lines = subprocess.run(
        ["lscpu"], capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"}
    ).stdout
    shown = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines.splitlines())}
    assert (machine["cpu"], machine["vendor"]) == (shown["Model name"], shown["Vendor ID"])
    for key, name in {"family": "CPU family", "model": "Model", "stepping": "Stepping"}.items():
        assert machine[key] == (int(shown[name]) if shown[name].isdigit() else None)
    assert machine["flags"] == [flag for flag in record.FLAGS if flag in shown["Flags"].split()]
    assert machine["level"] == ops.cpu_level()


HARNESS_RESULTS = {  # as version 0.4.13 writes them
    "results": {
        "python_continuation": {
            "alias": "python_continuation",
            "sample_len": 20,
            "acc,none": 0.4,
            "acc_stderr,none": 0.1124,
            "exact_match,flexible-extract": 0.25,
            "exact_match_stderr,flexible-extract": "N/A",
        }
    },
    "n-samples": {"python_continuation": {"original": 200, "effective": 20}},
}


def test_harness_rows_and_table():
    rows = harness.parse("a", HARNESS_RESULTS) + harness.parse("b", {"results": {"other": {"ppl,none": 3.0}}})
    columns = ("checkpoint", "task", "metric", "value", "stderr", "questions")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("a", "python_continuation", "acc", 0.4, 0.1124, 20),
        ("a", "python_continuation", "exact_match (flexible-extract)", 0.25, None, 20),
        ("b", "other", "ppl", 3.0, None, None),
    ]
    cells = [list(column.cells) for column in harness.table(rows[:1] + rows[2:] + rows[1:2]).columns]
    assert list(zip(*cells, strict=True)) == [
        ("python_continuation, acc, 20 questions", ""),
        ("a", "0.4000 ± 0.1124"),
        ("other, ppl", ""),
        ("b", "3.0000"),
        ("python_continuation, exact_match (flexible-extract), 20 questions", ""),
        ("a", "0.2500"),
    ]


def test_harness_task_is_what_its_script_makes():
    lines = continuation.FILE.read_text().splitlines()
    assert continuation.FILE.stat().st_size < 200e3 and len(lines) == continuation.QUESTIONS
    questions = [json.loads(line) for line in lines]
    assert questions == continuation.questions()
    answers = [question["answer"] for question in questions]
    assert all(30 < answers.count(i) < 70 for i in range(continuation.CHOICES))
    assert all(len(set(question["choices"])) == continuation.CHOICES for question in questions)


def test_harness_reads_the_task(monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.chdir(ROOT)
    manager = tasks.TaskManager(include_path=str(harness.TASKS))
    task = manager.load([harness.LOCAL])["tasks"][harness.LOCAL]
    question, *more = task.test_docs()
    assert len(more) == continuation.QUESTIONS - 1
    requests = task.construct_requests(question, task.doc_to_text(question))
    assert [request.args for request in requests] == [(question["context"], choice) for choice in question["choices"]]
    assert task.doc_to_target(question) == question["answer"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness", "checkpoint"])
    with pytest.raises(SystemExit):
        harness.main()
    assert "pip install lm-eval" in capsys.readouterr().err
