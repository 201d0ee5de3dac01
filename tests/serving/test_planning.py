"""Who serves a linear by a plan: on a CPU, our kernels or vLLM's, which are timed and chosen there as on a GPU."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.score import engine_environment
from tests.support.conversion import convert
from tests.support.quantization import STOCK as CONFIG
from tests.support.quantization import TOKEN, W8A8, config_class
from vllm_w8a8_bismooth import ops, switch
from vllm_w8a8_bismooth.ops import COMPILED
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.serving import servers

pytestmark = pytest.mark.skipif(not ops.has_kernel("cpu"), reason="the CPU kernels are not built (see setup.py)")
STOCK = "stock"
CLASSES = {STOCK: "CompressedTensorsW8A8Int8", COMPILED: "W8A8Scheme"}
ROWS, COLUMNS = 32, 64
SHAPE = {"rows": ROWS, "columns": COLUMNS}


@pytest.fixture
def planning(monkeypatch, tmp_path, on_rank):
    """The module, in a process that has found nothing yet, with a cache of its own and models in bf16."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_w8a8_bismooth.serving import planning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    monkeypatch.setenv(switch.PLAN, "on")
    monkeypatch.setattr(planning, "_FOUND", {})
    on_rank(0, 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(VllmConfig()):
        yield planning
    torch.set_default_dtype(before)


@pytest.fixture
def plan_file(monkeypatch, tmp_path):
    def write(*shapes: dict, **more) -> None:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps({"shapes": shapes} | more))
        monkeypatch.setenv(switch.PLAN, str(path))

    return write


def layer(weights: dict = W8A8, inputs: dict = TOKEN) -> torch.nn.Module:
    """A linear as vLLM makes it, before its weights are loaded."""
    groups = {"g": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    config = config_class().from_config(CONFIG | {"config_groups": groups})
    made = torch.nn.Module()
    made.bias, made.prefix = None, "model.layers.0.mlp.down_proj"
    made.scheme = config.get_scheme(torch.nn.Linear(1, 1, device="meta"), made.prefix)
    made.scheme.create_weights(
        layer=made,
        input_size=COLUMNS,
        input_size_per_partition=COLUMNS,
        output_partition_sizes=[ROWS],
        output_size=ROWS,
        params_dtype=torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    return made


def scheme() -> str:
    return type(layer().scheme).__name__


def timed(**factors: float):
    """Stands for :func:`trial.measure` where what it finds must be known."""
    from vllm_w8a8_bismooth.serving.plan import WEIGHTS

    return lambda makes, *_: {kernel: {m: factors[kernel] * m for m in WEIGHTS} for kernel in makes}


def test_it_is_measured_once_and_kept(planning, monkeypatch, log, vllms_library):
    """All of it: both kernels run; the next process reads."""
    found = scheme()
    (path,) = planning.SHELF.folder().glob("*.json")
    (row,) = json.loads(path.read_text())["plan"]["shapes"]
    assert SHAPE.items() <= row.items() and row["activations"] == "token" and row["groups"] == 1
    assert {*row["seconds"]} == {STOCK, COMPILED} and all(len(times) == 11 for times in row["seconds"].values())
    assert found == CLASSES[row["measured"]]
    (line,) = [line for line in log.messages if "linears of 32 x 64, activations per token on" in line]
    assert f" on {row['measured']} (measured: stock " in line and "compiled" in line
    monkeypatch.setattr(planning, "_FOUND", {})
    monkeypatch.setattr(planning.trial, "measure", None)
    assert scheme() == found
    kept = planning.kept(torch.device("cpu"))
    assert [*kept] == ["torch.bfloat16"] and len(kept["torch.bfloat16"].entries) == 1


def test_fixed_scales_are_timed_as_such(planning, vllms_library):
    """Of the whole tensor, in weights and activations; both kernels pass the check of numbers."""
    tensor = {"strategy": "tensor", "dynamic": False}
    layer(W8A8 | tensor, TOKEN | tensor)
    (path,) = planning.SHELF.folder().glob("*.json")
    (row,) = json.loads(path.read_text())["plan"]["shapes"]
    assert row["activations"] == "tensor" and all(len(times) == 11 for times in row["seconds"].values())


@pytest.mark.parametrize(("stock", "compiled", "kernel"), [(1, 0.96, COMPILED), (1, 0.98, STOCK), (1, 2, STOCK)])
def test_the_faster_one_serves(planning, monkeypatch, stock, compiled, kernel):
    monkeypatch.setattr(planning.trial, "measure", timed(stock=stock, compiled=compiled))
    assert scheme() == CLASSES[kernel]


def test_compiled_graphs_are_kept_apart_by_plan(planning, monkeypatch):
    from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config

    keys = []
    for compiled in (0.5, 2, 0.5):
        monkeypatch.setattr(planning, "_FOUND", {})
        monkeypatch.setattr(planning, "SHELF", planning.Shelf(f"plans {len(keys)}", "plan", ""))
        monkeypatch.setattr(planning.trial, "measure", timed(stock=1, compiled=compiled))
        with set_current_vllm_config(VllmConfig()):
            scheme()
            keys.append(get_current_vllm_config().compute_hash())
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("kernel", [STOCK, COMPILED])
def test_a_file_goes_before_measuring(planning, plan_file, kernel, monkeypatch, request):
    """Also where nothing else would be measured; what is chosen computes the linear."""
    if kernel == STOCK:
        request.getfixturevalue("vllms_library")
    monkeypatch.setattr(planning.trial, "measure", None)
    plan_file(SHAPE | {"kernel": kernel})
    made = layer()
    assert type(made.scheme).__name__ == CLASSES[kernel]
    codes = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8)
    made.weight.data.copy_(codes)
    made.weight_scale.data.fill_(0.01)
    made.scheme.process_weights_after_loading(made)
    x = torch.randn(5, COLUMNS)
    want = x.float() @ codes.float().t() * 0.01
    assert (made.scheme.apply_weights(made, x, None).float() - want).norm() < 0.02 * want.norm()


def test_what_a_file_does_not_name_stays_as_it_was(planning, plan_file, monkeypatch):
    monkeypatch.setattr(planning.trial, "measure", None)
    plan_file(SHAPE | {"rows": 1, "kernel": STOCK})
    assert scheme() == "W8A8Scheme"


def test_a_kept_file_can_be_given_as_it_is(planning, monkeypatch):
    """By whoever wants all ranks to round alike; it holds for where it was measured."""
    monkeypatch.setattr(planning.trial, "measure", timed(stock=1, compiled=2))
    assert scheme() == CLASSES[STOCK]
    (path,) = planning.SHELF.folder().glob("*.json")
    monkeypatch.setenv(switch.PLAN, str(path))
    monkeypatch.setattr(planning, "_FOUND", {})
    monkeypatch.setattr(planning.trial, "measure", None)
    assert scheme() == CLASSES[STOCK]


@pytest.mark.parametrize("wanted", [switch.ON, switch.OFF])
def test_a_plan_beside_the_other_switch_is_said_to_count_for_nothing(planning, plan_file, monkeypatch, log, wanted):
    plan_file(SHAPE | {"kernel": STOCK})
    platform = replace(servers.here(), ruling=servers.Ruling(wanted), planned=False)
    servers.report(planning.logger, platform)
    (line,) = [line for line in log.messages if "counts for nothing" in line]
    assert line.endswith(f"plan.json counts for nothing, because BISMOOTH_KERNELS={wanted} says who serves")


def test_where_vllms_product_is_wrong_no_plan_chooses_it(planning, plan_file, monkeypatch, log):
    """Our kernel serves, and the log says that the file counts for nothing."""
    monkeypatch.setattr(servers.processor, "saturates", lambda: True)
    plan_file(SHAPE | {"kernel": STOCK})
    assert scheme() == "W8A8Scheme"
    platform = replace(servers.here(), ruling=servers.Ruling(switch.AUTO), planned=True)
    servers.report(planning.logger, platform)
    (line,) = [line for line in log.messages if "counts for nothing" in line]
    assert "plan.json counts for nothing, because vLLM's own products are wrong here: without VNNI" in line


def test_what_cannot_be_kept_leaves_nothing(planning, monkeypatch):
    """Neither a part of a file nor a change of the one that was there."""
    assert planning.SHELF.write({}, 1)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    assert not planning.SHELF.write({}, 2)
    (path,) = planning.SHELF.folder().iterdir()
    assert json.loads(path.read_text())["plan"] == 1


@pytest.mark.parametrize("plan", ["auto", "off"])
def test_a_cpu_measures_only_when_asked(planning, monkeypatch, plan):
    monkeypatch.setenv(switch.PLAN, plan)
    monkeypatch.setattr(planning.trial, "measure", None)
    assert scheme() == "W8A8Scheme"


def test_groups_have_one_kernel_on_a_cpu(planning, monkeypatch):
    monkeypatch.setattr(planning.trial, "measure", None)
    group = {"strategy": "group", "group_size": 32}
    assert type(layer(W8A8 | group, TOKEN | group).scheme).__name__ == "W8A8Scheme"


def test_files_that_cannot_hold(planning, plan_file, monkeypatch):
    """Each is one line; the engine does not start on what somebody did not mean."""
    plan_file(SHAPE | {"kernel": "triton"})
    with pytest.raises(
        ValueError, match="has linears of 32 x 64.* on triton, which cannot.*expected compiled or stock"
    ):
        layer()
    plan_file(SHAPE | {"kernel": STOCK}, holds_for=planning.key_on(torch.device("cpu"), torch.bfloat16) | {"vllm": "0"})
    with pytest.raises(ValueError, match="was made with another vllm; measure anew, or take holds_for out"):
        layer()
    monkeypatch.setenv(switch.PLAN, "absent.json")
    with pytest.raises(ValueError, match="absent.json is no plan of kernels: .*No such file"):
        layer()


class Broken:
    """A scheme that fails, or is wrong."""

    def __init__(self, scheme, fault):
        self._scheme, self._fault = scheme, fault

    def __getattr__(self, name):
        return getattr(self._scheme, name)

    def apply_weights(self, *arguments):
        if isinstance(self._fault, Exception):
            raise self._fault
        return self._scheme.apply_weights(*arguments) * self._fault


@pytest.mark.parametrize("fault", [RuntimeError("illegal\naccess"), 0.9, float("nan")])
def test_a_kernel_that_fails_is_not_chosen(planning, fault, log, monkeypatch):
    from vllm_w8a8_bismooth.serving import trial
    from vllm_w8a8_bismooth.serving.plan import Shape, fastest
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    makes = {COMPILED: lambda: Broken(W8A8Scheme(None, None), fault), STOCK: lambda: W8A8Scheme(None, None)}
    found = trial.measure(makes, Shape(ROWS, COLUMNS), torch.bfloat16, torch.device("cpu"), (1, 16))
    assert found[COMPILED] == {} and [*found[STOCK]] == [1, 16] and fastest(found) is None
    (line,) = [line for line in log.messages if "compiled fails for linears of 32 x 64" in line]
    assert "\n" not in line


def test_a_device_without_room_keeps_what_it_had(planning, monkeypatch):
    """And so do the other ranks."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(planning.trial, "measure", full)
    assert scheme() == "W8A8Scheme"
    monkeypatch.setattr(planning, "_FOUND", {})
    monkeypatch.setattr(planning.trial, "measure", None)
    assert scheme() == "W8A8Scheme"


def test_a_plan_that_others_cannot_read_is_not_followed(planning, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(planning.trial, "measure", timed(stock=1, compiled=2))
    assert scheme() == "W8A8Scheme"


def test_a_damaged_plan_is_measured_anew(planning, monkeypatch, log):
    monkeypatch.setattr(planning.trial, "measure", timed(stock=1, compiled=2))
    scheme()
    (path,) = planning.SHELF.folder().glob("*.json")
    path.write_text("{")
    monkeypatch.setattr(planning, "_FOUND", {})
    assert scheme() == CLASSES[STOCK]
    (line,) = [line for line in log.messages if str(path) in line]
    assert "who serves what is measured anew" in line and json.loads(path.read_text())


ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, dtype="bfloat16")
(out,) = llm.generate([{"prompt_token_ids": list(range(5, 25))}], SamplingParams(max_tokens=4, temperature=0))
def look(model):
    return {name: type(each.scheme).__name__ for name, each in model.named_modules() if hasattr(each, "scheme")}
print("FOUND", json.dumps([len(out.outputs[0].token_ids), llm.apply_model(look)[0]]))
"""


@pytest.mark.engine
@pytest.mark.slow
def test_an_engine_serves_by_what_it_measured(checkpoints, tmp_path):
    """Linears of one model on both kernels, if that is how it turns out."""
    convert(checkpoints["planted"], tmp_path / "model", Recipe.of("rtn"))
    environment = engine_environment() | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "BISMOOTH_PLAN": "on",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, tmp_path / "model"], capture_output=True, text=True, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr
    tokens, schemes = json.loads(lines[0].removeprefix("FOUND "))
    (path,) = (tmp_path / "cache").rglob("plans/*.json")
    rows = json.loads(path.read_text())["plan"]["shapes"]
    assert tokens == 4 and len(schemes) > len(rows) > 1
    assert {*schemes.values()} == {CLASSES[row["measured"]] for row in rows}


@pytest.mark.parametrize("capability", [90, 120])
def test_what_no_self_test_has_tried_is_timed_only_where_it_was_asked_for(capability):
    passed = servers.Platform("cuda", ops.COMPILED, ops.COMPILED, ops.TRITON, capability, planned=True)
    assert servers.linears(passed, True) == (ops.COMPILED,)
    assert servers.linears(replace(passed, asked=True), True) == (ops.COMPILED, ops.TRITON)
