from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.server import serve
from tests.support.adapters import write_adapter
from tests.support.agreement import CLOSE_THROUGHOUT, assert_close_to_emulation, assert_same_up_to_near_ties
from tests.support.conversion import convert
from tests.support.models import tiny_model, write_checkpoint
from tests.support.quantization import JSON, ROWS, STOCK, TOKEN, W8A8, config_class
from tests.support.workers.engine import PROMPTS, ask_each
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.ops import gate
from vllm_w8a8_bismooth.ops.gate import Ruling
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.serving import servers
from vllm_w8a8_bismooth.serving.servers import Platform

PER_CHANNEL = 4 * 6 - 2 + 1
"""Linears of ours in the bi-smoothed checkpoint: of six blocks all but the two that are left in float, and the head."""


@pytest.mark.parametrize(
    ("checkpoint", "flag", "claimed"),
    [
        (STOCK | {"bismooth": {}}, None, True),
        (STOCK | {"bismooth": {}}, "w8a8_bismooth", True),
        (STOCK | {"bismooth": {}}, "compressed-tensors", False),
        (STOCK, None, False),
        (STOCK, "w8a8_bismooth", True),
        (STOCK, "fp8", False),
        (STOCK | {"format": "pack-quantized"}, "w8a8_bismooth", True),  # to say why it is refused
        (ROWS, None, True),
        (ROWS, "w8a8_bismooth", True),
        (ROWS, "compressed-tensors", False),
        ({"quant_method": "w8a8_bismooth"}, None, True),  # to say why it is refused
        ({"quant_method": "gptq", "bismooth": {}}, None, False),
        (None, "w8a8_bismooth", False),
    ],
)
def test_which_checkpoints_are_claimed(checkpoint, flag, claimed):
    answer = config_class().override_quantization_method(checkpoint, flag, hf_config=None)
    assert answer == ("w8a8_bismooth" if claimed else None)


@given(JSON, JSON, st.sampled_from([None, "w8a8_bismooth", "fp8"]))
def test_any_config_is_tolerated(groups, whole, flag):
    for checkpoint in (
        whole,
        STOCK | {"format": whole},
        STOCK | {"config_groups": groups},
        STOCK | {"config_groups": {"g": groups}},
    ):
        config_class().override_quantization_method(checkpoint, flag, hf_config=None)


def test_schemes():
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    def scheme_of(weights: dict, inputs: dict, **changes):
        groups = {"g": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
        parsed = config_class().from_config(STOCK | {"config_groups": groups} | changes)
        return parsed.get_scheme(torch.nn.Linear(1, 1, device="meta"), "model.layers.0.mlp.down_proj")

    group = {"strategy": "group", "group_size": 32}
    assert isinstance(scheme_of(W8A8, TOKEN), W8A8Scheme)
    assert scheme_of(W8A8 | group, TOKEN | group).activation_group_size == 32
    assert scheme_of(W8A8 | group, TOKEN).activation_group_size is None
    with pytest.raises(ValueError, match="'g' has the format pack-quantized"):
        scheme_of(W8A8, TOKEN, format="pack-quantized")
    with pytest.raises(ValueError, match="'g' has groups of 32 weights and of 64 activations"):
        scheme_of(W8A8 | group, TOKEN | group | {"group_size": 64})


@pytest.mark.parametrize(
    ("device", "capability", "server", "stock"),
    [
        ("cpu", None, "compiled", None),
        ("cpu", None, "reference", None),
        ("cuda", 90, "compiled", None),
        ("cuda", 90, "triton", "installed without its kernels"),
        ("cuda", 90, "reference", "installed without its kernels"),
        ("cuda", 75, "compiled", "capability 8.0"),
        ("cuda", 75, "triton", "capability 8.0"),
        ("cuda", 100, "triton", None),  # vLLM's own fails there
        ("cuda", None, "triton", "for CPUs and NVIDIA's GPUs"),  # ROCm, whatever capability it says it has
        ("xpu", None, "triton", "for CPUs and NVIDIA's GPUs"),
    ],
)
def test_who_serves_per_channel_linears(monkeypatch, device, capability, server, stock):
    from vllm import platforms

    platform = SimpleNamespace(
        device_type=device,
        is_cuda=lambda: device == "cuda" and capability is not None,
        get_device_capability=lambda: SimpleNamespace(to_int=lambda: capability or 94),
    )
    monkeypatch.setattr(platforms, "current_platform", platform)
    monkeypatch.setattr(servers, "server", lambda *_: server)
    monkeypatch.setattr(servers, "unsupported", lambda *_, **__: "")
    monkeypatch.setattr(gate, "settle", lambda *_: Ruling("auto"))  # see test_gate.py
    found = servers.per_channel(servers.here())
    assert (found.kernel == servers.STOCK) == (stock is not None) and (stock or "") in found.reason


@pytest.mark.parametrize(("capability", "name"), [(90, "CompressedTensorsW8A8Int8"), (100, "W8A8Scheme")])
def test_the_rule_chooses_the_scheme(monkeypatch, capability, name):
    monkeypatch.setattr(servers, "here", lambda: Platform("cuda", "triton", "triton", "triton", capability))
    groups = {"g": {"targets": ["Linear"], "weights": W8A8, "input_activations": TOKEN}}
    config = config_class().from_config(STOCK | {"config_groups": groups})
    scheme = config.get_scheme(torch.nn.Linear(1, 1, device="meta"), "model.layers.0.mlp.down_proj")
    assert type(scheme).__name__ == name


OFF = Ruling("off", "BISMOOTH_KERNELS=off")
CPU = Platform("cpu", "compiled", "compiled", "reference")


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        (CPU, ("our kernel",) * 4),
        (replace(CPU, per_channel="reference", per_group="reference"), ("the torch reference",) * 4),
        (
            Platform("cuda", "compiled", "compiled", "triton", 90),  # where nobody measures which is faster
            ("vLLM's own kernel", "our kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cuda", "compiled", "compiled", "triton", 90, planned=True),
            ("vLLM's own kernel or our kernel", "our kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cuda", "compiled", "compiled", "triton", 90, planned=True, asked=True),
            (
                "vLLM's own kernel or our kernel",
                "our kernel or our Triton kernel",
                "vLLM's own method",
                "our Triton kernel",
            ),
        ),
        (
            Platform("cuda", "compiled", "compiled", "triton", 90, ruling=Ruling("on")),
            ("our kernel", "our kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cuda", "compiled", "compiled", "triton", 100),  # where vLLM's own fails
            ("our kernel", "our kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cuda", "compiled", "compiled", "reference", 90),
            ("vLLM's own kernel", "our kernel", "vLLM's own method", "none, refused at load"),
        ),
        (
            Platform("cuda", "triton", "triton", "triton", 90),
            ("vLLM's own kernel", "our Triton kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cuda", "triton", "triton", "triton", 120),
            ("our Triton kernel", "our Triton kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cuda", "triton", "triton", "triton", 75, "7.5 has none"),
            ("vLLM's own kernel", "none, refused at load", "vLLM's own method", "none, refused at load"),
        ),
        (
            Platform("xpu", "reference", "reference", "reference"),
            ("vLLM's own kernel", "the torch reference", "vLLM's own method", "none, refused at load"),
        ),
        (
            Platform("cuda", "triton", "triton", "triton", 90, ruling=OFF),
            ("vLLM's own kernel", "our Triton kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cuda", "triton", "triton", "triton", 100, ruling=OFF),  # where vLLM's own fails
            ("our Triton kernel", "our Triton kernel", "vLLM's own method", "our Triton kernel"),
        ),
        (
            Platform("cpu", "reference", "reference", "reference", ruling=OFF),
            ("vLLM's own kernel", "the torch reference", "vLLM's own method", "the torch reference"),
        ),
        (replace(CPU, planned=True), ("our kernel or vLLM's own kernel", *("our kernel",) * 3)),
        (replace(CPU, planned=True, saturates=True), ("our kernel",) * 4),  # vLLM's own is wrong there
    ],
)
def test_who_serves_what(platform, expected):
    found = {kind: rule(platform) for kind, rule in servers.KINDS.items()}
    rows = found.pop("rows of four bits")
    assert tuple(served.kernel for served in found.values()) == expected
    ours = {"compiled": "our kernel", "triton": "our Triton kernel", "reference": "the torch reference"}
    assert rows.kernel == ("none, refused at load" if platform.unsupported else ours[platform.per_channel])
    for served in (rows, *found.values()):  # a user is told of all that could be better
        assert served.meant or served.reason
        assert not served.meant or "reference" not in served.kernel


def test_a_product_that_is_wrong_is_not_meant():
    """Who does without our kernels gets vLLM's own all the same, and is told."""
    platform = replace(CPU, per_channel="reference", per_group="reference", ruling=OFF)
    assert servers.per_channel(platform) == servers.Served(servers.STOCK, OFF.reason, True)
    kernel, reason, meant = servers.per_channel(replace(platform, saturates=True))
    assert kernel == servers.STOCK and not meant
    assert reason.startswith(
        f"{OFF.reason}; its products are wrong here: without VNNI, oneDNN sums products in 16 bits"
    )


def test_what_is_missing_depends_on_the_maker():
    """Nobody can install kernels that there are none of; and who has vLLM's own instead misses nothing then."""
    nothing = Platform("cuda", "reference", "reference", "reference")
    nvidia, cpu = replace(nothing, capability=90), replace(nothing, device="cpu")
    no_sources, not_built = (
        "this package's kernels are for CPUs and NVIDIA's GPUs",
        "this package was installed without",
    )
    assert servers.per_group(nothing).reason == f"{no_sources}, and Triton is not installed: slow"
    assert servers.per_group(nvidia).reason == f"{not_built} its kernels for cuda, and Triton is not installed: slow"
    assert servers.per_group(cpu).reason == f"{not_built} its kernels for cpu: slow"
    assert servers.per_channel(nothing) == servers.Served(servers.STOCK, no_sources, True)
    assert servers.per_channel(nvidia) == servers.Served(servers.STOCK, f"{not_built} its kernels for cuda", False)


def made_by_vllm(group_size: int | None, rows: int, columns: int):
    """A layer with the parameters of one rank, and its scheme."""
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    layer, scheme = torch.nn.Module(), W8A8Scheme(group_size, group_size)
    layer.prefix = "model.layers.0.mlp.down_proj"
    scheme.create_weights(layer, [rows], columns, torch.bfloat16, weight_loader=lambda *a: None)
    return layer, scheme


def test_group_size_must_divide_the_share_of_a_rank(on_rank):
    on_rank(0, 1)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj: K = 352 is not .* group_size = 128; 32 would fit"):
        made_by_vllm(128, 64, 352)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_ranks_add_up(on_rank, group_size, split):
    """Two ranks' linears, loaded by vLLM's own parameter classes, make up the whole one."""
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(5, 128, generator=generator), torch.randn(64, generator=generator)
    codes, scales = quantize_weight(torch.randn(64, 128, generator=generator), group_size)
    whole = ops.linear(x, codes, scales, group_size, bias)
    outputs = []
    for rank in (0, 1):
        on_rank(rank, 2)
        if split == "columns":  # row-parallel: each rank has half of K
            layer, scheme = made_by_vllm(group_size, 64, 64)
            layer.weight.load_row_parallel_weight(codes)
            if group_size is None:
                layer.weight_scale.data.copy_(scales)  # replicated
            else:
                layer.weight_scale.load_row_parallel_weight(scales)
            share = x[:, rank * 64 : rank * 64 + 64]
            outputs.append(scheme.apply_weights(layer, share, bias if rank == 0 else None))
        else:
            layer, scheme = made_by_vllm(group_size, 32, 128)
            layer.weight.load_column_parallel_weight(codes)
            layer.weight_scale.load_column_parallel_weight(scales)
            outputs.append(scheme.apply_weights(layer, x, bias[rank * 32 : rank * 32 + 32]))
        scheme.process_weights_after_loading(layer)
    if split == "rows":
        assert torch.equal(torch.cat(outputs, dim=1), whole)
    elif group_size:  # every group lies on one rank, so only the order of fp32 sums differs
        torch.testing.assert_close(outputs[0] + outputs[1], whole, rtol=1e-5, atol=1e-4)
    else:  # each rank quantizes its half of a token by its own range: not the whole's product, but the halves'
        halves = [ops.linear(x[:, half], codes[:, half], scales, None) for half in (slice(0, 64), slice(64, 128))]
        assert torch.equal(outputs[0], halves[0] + bias) and torch.equal(outputs[1], halves[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_must_have_arrived(on_rank, value):
    on_rank(0, 1)
    layer, scheme = made_by_vllm(None, 64, 256)
    with pytest.raises(ValueError, match="down_proj.weight_scale .* missing"):
        scheme.process_weights_after_loading(layer)
    layer.weight_scale.data.uniform_(-1e-3, 1e-3)  # what --load-format dummy gives
    scheme.process_weights_after_loading(layer)
    layer.weight_scale.data[5] = value
    with pytest.raises(ValueError, match="down_proj.weight_scale"):
        scheme.process_weights_after_loading(layer)


def test_shapes_without_a_kernel_are_refused_at_load(on_rank, monkeypatch):
    """As on a GPU, whose answer needs no device; on CPU the kernel takes every shape."""
    if not hasattr(torch.ops.w8a8_bismooth, "gemm_unsupported"):
        pytest.skip("the CUDA kernels are not built")
    on_rank(0, 1)
    layer, scheme = made_by_vllm(None, 72, 256)
    layer.weight_scale.data.fill_(1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = ops.unsupported(*layer.weight.shape, group_size=None, device=torch.device("cuda"))
    monkeypatch.setattr(ops, "unsupported", lambda *shape, **more: on_gpu)
    with pytest.raises(ValueError, match="down_proj: N = 72 and K = 256 must be multiples of 16; use"):
        scheme.process_weights_after_loading(layer)


@pytest.fixture(scope="module")
def stock(checkpoints, tmp_path_factory) -> dict[str, dict]:
    """vLLM without plugins."""
    engines = {name: {"model": checkpoints[name], "enforce_eager": True} for name in ("bismooth", "planted", "mixed")}
    return ask_each(tmp_path_factory.mktemp("stock"), engines, plugins="")


@pytest.fixture(scope="module")
def updates(checkpoints, adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter on the mixed checkpoint adds to its weights."""
    return write_adapter(adapter, checkpoints["mixed"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapter") / "adapter"


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> Path:
    """Another architecture, with biases in q, k and v, untied, all linears per-group."""
    folder = tmp_path_factory.mktemp("biased")
    source = write_checkpoint(folder / "source", tiny_model("qwen2", head_dim=32, hidden_size=128))
    convert(source, folder / "out", Recipe.of("bismooth", group_size=32, group_layers="proj"))
    return folder / "out"


@pytest.fixture(scope="module")
def served(checkpoints, updates, adapter, biased, tmp_path_factory) -> dict[str, dict]:
    """vLLM with our plugin, found by itself; torch.compile on (vLLM's default) where it is not said to be off."""
    eager = {"enforce_eager": True}
    engines = {
        "planted": eager | {"model": checkpoints["planted"]},
        "unmarked": eager | {"model": checkpoints["unmarked"]},
        "flagged": eager | {"model": checkpoints["unmarked"], "quantization": "w8a8_bismooth"},
        # Of one place for adapters, vLLM applies what is there on the head to the base model's requests, too.
        "adapted": eager | {"model": checkpoints["mixed"], "lora": adapter, "enable_lora": True, "max_loras": 2},
        "biased": eager | {"model": biased, "max_model_len": 96},
        "compiled": {"model": checkpoints["bismooth"]},
    }
    return ask_each(tmp_path_factory.mktemp("served"), engines)


@pytest.mark.engine
def test_marked_checkpoint_is_detected_and_stock_serves_it_alike(checkpoints, stock, served):
    """Auto-detected; without the plugin the same greedy tokens up to near-ties."""
    ours, theirs = served["compiled"], stock["bismooth"]
    assert ours["quantization"] == "w8a8_bismooth" and ours["linears"] == {"None": PER_CHANNEL}
    assert theirs["quantization"] == "compressed-tensors" and "w8a8_bismooth:" not in theirs["log"]
    assert_close_to_emulation(checkpoints["bismooth"], PROMPTS, ours["first_steps"])
    assert_same_up_to_near_ties(ours, theirs)


@pytest.mark.engine
def test_switched_off_it_gives_the_numbers_of_vllms_own_kernels(checkpoints, stock, served, monkeypatch, tmp_path):
    """To the last bit; and graphs that an engine compiled with ours, for the same checkpoint, are not taken."""
    monkeypatch.setenv("BISMOOTH_KERNELS", "off")
    model, theirs = checkpoints["bismooth"], stock["bismooth"]
    off = ask_each(tmp_path, {"eager": {"model": model, "enforce_eager": True}, "compiled": {"model": model}})
    for answer in off.values():
        assert answer["quantization"] == "w8a8_bismooth" and answer["linears"] == {} != served["compiled"]["linears"]
    assert "BISMOOTH_KERNELS=off: per-channel on vLLM's own kernel (BISMOOTH_KERNELS=off); " in off["eager"]["log"]
    assert off["eager"]["tokens"] == theirs["tokens"] and off["eager"]["logprobs"] == theirs["logprobs"]
    assert_same_up_to_near_ties(off["compiled"], theirs)


@pytest.mark.engine
def test_checkpoint_of_others_by_the_flag(stock, served):
    """Without our marker, with ``--quantization w8a8_bismooth``: served by our ops, like stock."""
    ours = served["flagged"]
    assert ours["quantization"] == "w8a8_bismooth" and ours["linears"] == {"None": PER_CHANNEL}
    assert "per-channel linears run on" in ours["log"]  # the first of the process, which says so once
    assert_same_up_to_near_ties(ours, stock["bismooth"])


@pytest.mark.engine
def test_stock_vllm_refuses_the_mixed_checkpoint(stock):
    assert "No compressed-tensors compatible scheme was found" in stock["mixed"]["error"]


@pytest.mark.engine
def test_mixed_checkpoint_eager_with_adapter_and_reload(checkpoints, served, updates):
    """On CPU the weights are packed: LoRA finds what it needs of them, the head too; reloading packs them anew."""
    ours, model = served["adapted"], checkpoints["mixed"]
    assert ours["quantization"] == "w8a8_bismooth"
    assert_close_to_emulation(model, PROMPTS, ours["first_steps"])
    adapted = [steps[0] for steps in ours["adapted"]["logprobs"]]
    # The adapter of the head is a product in bf16 more; 0.107 was seen, and 0.45 without that adapter.
    assert_close_to_emulation(model, PROMPTS, adapted, updates, close=CLOSE_THROUGHOUT)
    with pytest.raises(AssertionError):  # the adapter makes a difference
        assert_close_to_emulation(model, PROMPTS, adapted)
    assert ours["reloaded"] == {key: ours[key] for key in ours["reloaded"]}


@pytest.mark.engine
def test_qwen2_with_biases(biased, served):
    ours = served["biased"]
    assert ours["quantization"] == "w8a8_bismooth" and ours["linears"] == {"32": 4 * 3}
    assert_close_to_emulation(biased, PROMPTS, ours["first_steps"])


@pytest.mark.engine
def test_other_models_are_not_touched(stock, served):
    """With and without the plugin: the same method, the same log-probabilities to the last bit."""
    for ours, theirs, method in (
        (served["planted"], stock["planted"], None),
        (served["unmarked"], stock["bismooth"], "compressed-tensors"),
    ):
        assert ours["quantization"] == theirs["quantization"] == method
        assert "w8a8_bismooth:" not in ours["log"] and ours["linears"] == {}
        assert ours["tokens"] == theirs["tokens"] and ours["logprobs"] == theirs["logprobs"]


@pytest.mark.engine
def test_server_with_the_explicit_flag(checkpoints, tmp_path, monkeypatch):
    """`vllm serve --quantization w8a8_bismooth` on the mixed checkpoint, compiled, on two ranks, over HTTP."""
    from openai import OpenAI

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # both ranks on the cores that there are
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--quantization", "w8a8_bismooth", "--served-model-name", "mixed", "--max-model-len", "256"]
    flags += ["--tensor-parallel-size", "2", "--return-tokens-as-token-ids"]
    with serve(checkpoints["mixed"], tmp_path / "log", *flags) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused")
        assert [m.id for m in client.models.list().data] == ["mixed"]
        asked = {"model": "mixed", "max_tokens": 8, "temperature": 0, "logprobs": 5}
        answers = [client.completions.create(prompt=prompt, **asked).choices[0] for prompt in PROMPTS]
    assert all(answer.finish_reason == "length" and answer.text for answer in answers)
    log = (tmp_path / "log").read_text()
    assert "per-group (32) linears run on" in log and "per-channel linears run on" in log
    steps = [answer.logprobs.top_logprobs[0] for answer in answers]
    first_steps = [{token.removeprefix("token_id:"): logprob for token, logprob in step.items()} for step in steps]
    # Unlike in the emulation, each rank quantizes its own half of a token; 0.11 was seen.
    assert_close_to_emulation(checkpoints["mixed"], PROMPTS, first_steps, close=CLOSE_THROUGHOUT)
