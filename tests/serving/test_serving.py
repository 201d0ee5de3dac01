from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.server import serve
from tests.support.adapters import write_adapter
from tests.support.agreement import CLOSE_THROUGHOUT, assert_close_to_emulation, assert_same_up_to_near_ties
from tests.support.models import tiny_model, write_checkpoint
from tests.support.quantization import JSON, STOCK, TOKEN, W8A8, config_class
from tests.support.workers import engine
from tests.support.workers.engine import PROMPTS, ask
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.convert.pipeline import convert
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.recipe import Recipe


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
    ("device", "capability", "has_kernel", "reason"),
    [
        ("cpu", None, True, None),
        ("cpu", None, False, None),
        ("cuda", 90, True, None),
        ("cuda", 90, False, "installed without its kernels"),
        ("cuda", 75, True, "capability 8.0"),
        ("cuda", 100, False, None),  # vLLM's own fails there
        ("xpu", None, False, "installed without its kernels"),
    ],
)
def test_who_serves_per_channel_linears(monkeypatch, device, capability, has_kernel, reason):
    from vllm_w8a8_bismooth.serving import config

    platform = SimpleNamespace(
        device_type=device,
        is_cpu=lambda: device == "cpu",
        is_cuda=lambda: device == "cuda",
        has_device_capability=lambda least: capability >= least,
    )
    monkeypatch.setattr(config, "current_platform", platform)
    monkeypatch.setattr(ops, "has_kernel", lambda _: has_kernel)
    found = config.reason_for_stock()
    assert found is None if reason is None else reason in found


def made_by_vllm(group_size: int | None, rows: int, columns: int):
    """A layer with the parameters of one rank, and its scheme."""
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    layer, scheme = torch.nn.Module(), W8A8Scheme(group_size, group_size)
    layer.prefix = "model.layers.0.mlp.down_proj"
    scheme.create_weights(layer, [rows], columns, torch.bfloat16, weight_loader=lambda *a: None)
    return layer, scheme


def test_group_size_must_divide_the_share_of_a_rank(on_rank):
    on_rank(0, 1)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj: K = 352 on this rank .* group_size = 128"):
        made_by_vllm(128, 64, 352)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_ranks_add_up(on_rank, group_size, split):
    """Two ranks' linears, loaded by vLLM's own parameter classes, make up the whole one."""
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(5, 128, generator=generator), torch.randn(64, generator=generator)
    codes, scales = quantize_weight(torch.randn(64, 128, generator=generator), group_size)
    whole = ops.linear(x, codes, scales, group_size or 128, bias)
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
        halves = [ops.linear(x[:, half], codes[:, half], scales, 64) for half in (slice(0, 64), slice(64, 128))]
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
    on_gpu = ops.unsupported(*layer.weight.shape, groups=1, device=torch.device("cuda"))
    monkeypatch.setattr(ops, "unsupported", lambda *shape, **more: on_gpu)
    with pytest.raises(ValueError, match="down_proj: N = 72 and K = 256 must be multiples of 16; use"):
        scheme.process_weights_after_loading(layer)


@pytest.fixture(scope="module")
def stock(checkpoints, tmp_path_factory) -> dict:
    """The bi-smoothed checkpoint in vLLM without plugins."""
    return ask(tmp_path_factory.mktemp("stock"), checkpoints["bismooth"], plugins="", enforce_eager=True)


@pytest.mark.engine
def test_marked_checkpoint_is_detected_and_stock_serves_it_alike(checkpoints, stock, tmp_path):
    """Auto-detected, torch.compile on (vLLM's default); without the plugin the same greedy tokens up to near-ties."""
    ours = ask(tmp_path, checkpoints["bismooth"])
    assert ours["quantization"] == "w8a8_bismooth" and "per-channel linears run on" in ours["log"]
    assert stock["quantization"] == "compressed-tensors" and "w8a8_bismooth:" not in stock["log"]
    assert_close_to_emulation(checkpoints["bismooth"], PROMPTS, ours["first_steps"])
    assert_same_up_to_near_ties(ours, stock)


@pytest.mark.engine
def test_checkpoint_of_others_by_the_flag(checkpoints, stock, tmp_path):
    """Without our marker, eager, with ``--quantization w8a8_bismooth``: served by our ops, like stock."""
    ours = ask(tmp_path, checkpoints["unmarked"], enforce_eager=True, quantization="w8a8_bismooth")
    assert ours["quantization"] == "w8a8_bismooth" and "per-channel linears run on" in ours["log"]
    assert_same_up_to_near_ties(ours, stock)


@pytest.mark.engine
def test_stock_vllm_refuses_the_mixed_checkpoint(checkpoints, tmp_path):
    options = {"model": checkpoints["mixed"], "enforce_eager": True}
    result, log = engine.run(tmp_path, "", options=options, prompts=PROMPTS[:1], max_tokens=1)
    assert result is None and "No compressed-tensors compatible scheme was found" in log


@pytest.mark.engine
def test_mixed_checkpoint_eager_with_adapter_and_reload(checkpoints, tmp_path):
    """On CPU the weights are packed: LoRA finds what it needs of them, and reloading packs them anew."""
    model = checkpoints["mixed"]
    updates = write_adapter(tmp_path / "adapter", model)
    ours = ask(tmp_path, model, lora=tmp_path / "adapter", enforce_eager=True, enable_lora=True)
    assert ours["quantization"] == "w8a8_bismooth"
    assert_close_to_emulation(model, PROMPTS, ours["first_steps"])
    adapted = [steps[0] for steps in ours["adapted"]["logprobs"]]
    assert_close_to_emulation(model, PROMPTS, adapted, updates)
    with pytest.raises(AssertionError):  # the adapter makes a difference
        assert_close_to_emulation(model, PROMPTS, adapted)
    assert ours["reloaded"] == {key: ours[key] for key in ours["reloaded"]}


@pytest.mark.engine
def test_qwen2_with_biases(tmp_path):
    """Another architecture, with biases in q, k and v, untied, all linears per-group."""
    source = write_checkpoint(tmp_path / "source", tiny_model("qwen2", head_dim=32, hidden_size=128))
    convert(source, tmp_path / "out", Recipe.of("bismooth", group_size=32, group_layers="proj"))
    ours = ask(tmp_path, tmp_path / "out", enforce_eager=True, max_model_len=96)
    assert ours["quantization"] == "w8a8_bismooth" and "per-group (32) linears run on" in ours["log"]
    assert_close_to_emulation(tmp_path / "out", PROMPTS, ours["first_steps"])


@pytest.mark.engine
def test_other_models_are_not_touched(checkpoints, stock, tmp_path):
    """With and without the plugin: the same method, the same log-probabilities to the last bit."""
    plain = [ask(tmp_path, checkpoints["planted"], plugins, enforce_eager=True) for plugins in (None, "")]
    unmarked = [ask(tmp_path, checkpoints["unmarked"], enforce_eager=True), stock]
    for pair, method in ((plain, None), (unmarked, "compressed-tensors")):
        assert [result["quantization"] for result in pair] == [method, method]
        assert "w8a8_bismooth:" not in pair[0]["log"]
        assert pair[0]["tokens"] == pair[1]["tokens"] and pair[0]["logprobs"] == pair[1]["logprobs"]


@pytest.mark.engine
def test_server_with_the_explicit_flag(checkpoints, tmp_path, monkeypatch):
    """`vllm serve --quantization w8a8_bismooth` on the mixed checkpoint, compiled, on two ranks, over HTTP."""
    from openai import OpenAI

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
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
