"""`benchmarks.serve`: its bookkeeping without engines, and once with them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import record, serve
from benchmarks.random_llama import OUTLIERS, PLANTED_BLOCKS, SIZES, checkpoint, noise, planted
from benchmarks.serve import ARMS, BASE, WORKLOADS

TINY = SIZES["tiny"]
LOADS = WORKLOADS[serve.DEVICE].loads


@pytest.fixture
def engines(monkeypatch, tmp_path):
    """Stands in for the engines: what was run, in order. A bench of an arm named in ``broken`` fails."""
    seen, broken = [], set()

    def throughput(case, arm, rates):
        seen.append(("throughput", arm))
        if arm in broken:
            raise serve.Failed(f"{arm} broke\nand more")
        yield {"tokens_per_second": 1000.0 + len(seen), "requests_per_second": 4.0}

    def latency(case, arm, rates):
        seen.append(("latency", arm))
        yield {"seconds": 0.5}

    def serving(case, arm, rates):
        for load, rate in rates.items():
            seen.append(("serve", arm, load))
            yield {"load": load, "rate": rate, "ttft_ms": 1.0 * len(seen), "output_tokens_per_second": 9.0}

    monkeypatch.setattr(serve, "WORK", tmp_path / "work")
    monkeypatch.setattr(serve, "BENCHES", {"throughput": throughput, "latency": latency, "serve": serving})
    monkeypatch.setattr(serve.Case, "score", lambda self, arm: np.log(np.full((2, 127, 4), 0.25, np.float32)))
    monkeypatch.setattr(serve.Case, "windows", np.zeros((2, 128), dtype=np.int64))
    monkeypatch.setattr(serve.Case, "bytes", lambda self, arm: 7)
    return seen, broken


def run(monkeypatch, out: Path, *options: str) -> tuple[int, dict]:
    monkeypatch.setattr(sys, "argv", ["serve", "random:tiny", "--json", str(out), *options])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", serve.__spec__)
    code = serve.main()
    return code, json.loads(out.read_text())


def test_arms_take_turns_and_rows_are_medians(engines, monkeypatch, tmp_path):
    seen, _ = engines
    code, found = run(monkeypatch, tmp_path / "out.json", "--turns", "3", "--arms", "stock|mixed")
    assert code == 0 and found["failed"] == {}
    arms = [BASE, "stock INT8", "ours, mixed"]
    assert [arm for bench, arm, *_ in seen if bench == "latency"] == arms + arms[1:] + arms[:1] + arms[2:] + arms[:2]
    rows = {(row["bench"], row["arm"], row.get("load")): row for row in found["rows"]}
    assert len(found["rows"]) == len(rows) == 3 * (1 + 1 + len(LOADS) + 1)
    row = rows["throughput", "stock INT8", None]
    values = [r["tokens_per_second"] for r in found["runs"] if (r["bench"], r["arm"]) == ("throughput", "stock INT8")]
    assert row["turns"] == 3 and row["tokens_per_second"] == sorted(values)[1]
    assert row["tokens_per_second_range"] == [min(values), max(values)]
    of_latency = {"bench": "latency", "arm": BASE, "turns": 3, "seconds": 0.5, "seconds_range": [0.5, 0.5]}
    assert rows["latency", BASE, None] == of_latency
    assert [rows["serve", BASE, load]["rate"] for load in LOADS] == [load and 4 * load for load in LOADS]
    assert rows["accuracy", "ours, mixed", None]["kl"] == 0 and rows["accuracy", BASE, None]["bytes"] == 7


def test_goes_on_behind_the_last_run(engines, monkeypatch, tmp_path):
    seen, _ = engines
    out, options = tmp_path / "out.json", ("--turns", "2", "--arms", "stock")
    add, stops = serve.Journal.add, iter(range(100))

    def stop(journal, **found):
        add(journal, **found)
        if next(stops) == 8:  # amid the rates of a server
            raise KeyboardInterrupt

    monkeypatch.setattr(serve.Journal, "add", stop)
    monkeypatch.setattr(record, "seconds", lambda: 10)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, out, *options)
    assert len(json.loads(out.read_text())["runs"]) == 9
    _, found = run(monkeypatch, out, *options)
    assert found["seconds"] == 20  # of both
    assert len(seen) == len(set(seen)) * 2 and len(found["runs"]) == 2 * 2 * (2 + len(LOADS)) + 2  # two turns of each
    before = len(seen)
    assert run(monkeypatch, out, *options)[1]["runs"] == found["runs"] and len(seen) == before


def test_other_settings_start_anew(engines, monkeypatch, tmp_path):
    seen, _ = engines
    out = tmp_path / "out.json"
    found = run(monkeypatch, out, "--quick", "--arms", "stock")[1]
    count = len(seen)
    assert run(monkeypatch, out, "--quick", "--arms", "stock", "--", "--enforce-eager")[1]["runs"] != found["runs"]
    assert len(seen) == 2 * count
    again = run(monkeypatch, tmp_path / "other.json", "--quick", "--arms", "stock")[1]
    assert again["runs"] == found["runs"] and len(seen) == 2 * count
    monkeypatch.setattr(record, "COMMIT", "another")
    run(monkeypatch, out, "--quick", "--arms", "stock")
    assert len(seen) == 3 * count


def test_an_arm_that_fails_is_left_out(engines, monkeypatch, tmp_path):
    seen, broken = engines
    broken.add("stock INT8")
    code, found = run(monkeypatch, tmp_path / "out.json", "--turns", "2", "--arms", "stock|mixed")
    assert code == 1 and found["failed"] == {"stock INT8": "stock INT8 broke"}
    assert seen.count(("throughput", "stock INT8")) == 1 and ("latency", "stock INT8") not in seen
    assert {run["arm"] for run in found["runs"]} == {BASE, "ours, mixed"}
    broken.clear()
    code, found = run(monkeypatch, tmp_path / "out.json", "--turns", "2", "--arms", "stock|mixed")
    assert code == 0 and found["failed"] == {} and seen.count(("throughput", "stock INT8")) == 3


@pytest.mark.parametrize("model", ["random:2b", "no/such/folder", "missing"])
def test_no_such_model(monkeypatch, capsys, model):
    monkeypatch.setattr(sys, "argv", ["serve", model])
    with pytest.raises(SystemExit) as error:
        serve.main()
    assert error.value.code == 2 and model in capsys.readouterr().err


def test_a_model_that_does_not_fit(engines, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serve.shutil, "disk_usage", lambda path: type("", (), {"free": 10**7})())
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path / "out.json")
    assert error.value.code == 2 and "0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_fp8_needs_hardware(monkeypatch):
    for there, capability, expected in ((False, None, False), (True, (8, 6), False), (True, (8, 9), True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert serve.available("FP8") is expected and all(serve.available(arm) for arm in ARMS if arm != "FP8")


def test_the_plant_changes_exponents_and_no_function(tmp_path):
    """Each planted column is 1024 times what it was, its gain as much less; nothing else differs."""
    sizes = TINY | {"num_hidden_layers": 5}
    healthy, sick = (
        load_file(checkpoint(tmp_path / name, sizes, fill) / "model-00001-of-00001.safetensors")
        for name, fill in (("healthy", noise()), ("planted", planted()))
    )
    for block in range(5):
        prefix = f"model.layers.{block}."
        for norm, readers in (("input_layernorm", "qkv"), ("post_attention_layernorm", "gate up")):
            gain = sick[f"{prefix}{norm}.weight"].float() / healthy[f"{prefix}{norm}.weight"].float()
            assert (gain == 1 / 1024).sum() == (OUTLIERS if block in PLANTED_BLOCKS else 0)
            assert ((gain == 1) | (gain == 1 / 1024)).all()
            for name in readers.split() if " " in readers else readers:
                name = f"{prefix}{'mlp' if norm.startswith('post') else 'self_attn'}.{name}_proj.weight"
                assert torch.equal(sick[name].float() * gain, healthy[name].float()), name
    rest = [name for name in healthy if "norm" not in name and not re.search(r"[qkv]_proj|gate|up_proj", name)]
    assert len(rest) == 2 * 5 + 2 and all(torch.equal(sick[name], healthy[name]) for name in rest)


@pytest.mark.engine
@pytest.mark.soak
def test_real_engines(tmp_path):
    """Each bench of two arms; a second time nothing is left to do."""
    command = [sys.executable, "-m", "benchmarks.serve", "random:tiny", "--quick", "--arms", "per-channel"]
    command += ["--json", "out.json", "--", "--enforce-eager"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for count in (0, 10):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert (f"going on behind {count} runs" in done.stdout) == (count > 0)
        assert done.stdout.count("turn 1, ") == (8 if count == 0 else 0)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["settings"]["engine_options"] == ["--enforce-eager"] and record["failed"] == {}
    rows = {(row["arm"], row["bench"], row.get("load")): row for row in record["rows"]}
    asked = [("throughput", None), ("latency", None), ("serve", 0.5), ("serve", None), ("accuracy", None)]
    assert set(rows) == {(arm, *bench) for arm in (BASE, "ours, per-channel") for bench in asked}
    for arm in (BASE, "ours, per-channel"):
        assert rows[arm, "throughput", None]["tokens_per_second"] > 0 and rows[arm, "latency", None]["seconds"] > 0
        assert rows[arm, "serve", 0.5]["rate"] == rows[BASE, "serve", 0.5]["rate"] > 0
        row = rows[arm, "serve", None]
        assert 0 < row["ttft_ms"] <= row["p99_ttft_ms"] and row["ttft_ms"] < row["e2e_ms"] and row["tpot_ms"] > 0
    bf16, ours = (rows[arm, "accuracy", None] for arm in (BASE, "ours, per-channel"))
    assert bf16["kl"] == 0 and bf16["tokens"] == 24 * 127 and 0 < ours["kl"] < 1e-3 and ours["top1"] > 0.9
    assert 0.5 < ours["bytes"] / bf16["bytes"] < 1
    log = (tmp_path / "build/serve/random-tiny/ours-per-channel-serve.log").read_text()
    assert "per-channel linears run on the cpu kernel" in log
