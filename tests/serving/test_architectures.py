"""Every model type through the whole pipeline and on to what reads the result: vLLM, transformers, an emulation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import emulate
from tests.support.conversion import convert
from tests.support.models import MODEL_TYPES
from tests.support.predictions import SPARSE, WINDOWS, divergence, transformers_predictions, write
from tests.support.workers import engines
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.quantize import dequantize_weight
from vllm_w8a8_bismooth.recipe import Recipe

DENSE = [t for t in MODEL_TYPES if t not in SPARSE]


@pytest.mark.engine
def test_dense_types_in_vllm(tmp_path, calibration_text):
    """Calibrated and bi-smoothed, and one of them per-group with its linears fused on disk: as good as INT8 can be."""
    expected, calibrated = {}, Recipe.of("bismooth", calibration_tokens=1024)
    mixed = Recipe.of("mixed", group_size=32, group_layers=r"layers\.1\.self_attn\.qkv_proj|down_proj")
    for model_type in DENSE:
        source = write(tmp_path / "sources" / model_type, model_type)
        expected[model_type] = transformers_predictions(source)
        convert(source, tmp_path / model_type, calibrated, read_text(calibration_text))
    convert(tmp_path / "sources" / "phi3", tmp_path / "phi3-mixed", mixed)
    expected["phi3-mixed"] = expected["phi3"]

    answers, log = engines.run(tmp_path, WINDOWS, {name: {"model": tmp_path / name} for name in expected})
    for name, (reference, yardstick) in expected.items():
        assert name in answers, f"{name}: {log[-3000:]}"
        answer = answers[name]
        assert answer.get("quantization") == "w8a8_bismooth", (name, answer)
        # qkv, o, gate_up and down of three blocks
        assert answer["schemes"] == ({"32": 4, "None": 8} if "mixed" in name else {"None": 12}), name
        cost = divergence(reference, answer["logprobs"]).mean()
        assert cost < 0.01 * yardstick, (name, cost, yardstick)


@pytest.mark.engine
def test_stacked_and_transposed_in_vllm(tmp_path, calibration_text):
    """What the files have as parts of other tensors, or transposed, as vLLM's loaders take it in INT8."""
    expected, calibrated = {}, Recipe.of("bismooth", calibration_tokens=1024)
    grouped = replace(calibrated, group_size=32, group_layers=r"\.experts\.")
    for model_type in ("gpt2", "granitemoe", "llama4_text"):
        source = write(tmp_path / "sources" / model_type, model_type)
        expected[model_type] = transformers_predictions(source)
        convert(source, tmp_path / model_type, calibrated, read_text(calibration_text))
        if model_type != "gpt2":
            convert(source, tmp_path / f"{model_type}-g32", grouped, read_text(calibration_text))
            expected[f"{model_type}-g32"] = expected[model_type]

    answers, log = engines.run(tmp_path, WINDOWS, {name: {"model": tmp_path / name} for name in expected})
    for name, (reference, yardstick) in expected.items():
        assert name in answers, f"{name}: {log[-3000:]}"
        answer = answers[name]
        assert answer.get("quantization") == "w8a8_bismooth", (name, answer)
        # A token whose router hesitates may be sent to another expert by any rounding at all.
        cost = np.median(divergence(reference, answer["logprobs"]))
        assert cost < 0.01 * yardstick, (name, cost, yardstick)
        model_type, _, size = name.partition("-g")
        layers = {"gpt2": 0, "granitemoe": 3, "llama4_text": 2}[model_type]
        assert answer["experts"] == ({size or "None": layers} if layers else {})


@pytest.mark.parametrize("model_type", SPARSE)
def test_experts_keep_their_accuracy(tmp_path, calibration_text, model_type):
    """By emulation, which test_moe.py holds vLLM to.

    The median over the tokens: one whose router hesitates may be sent to another expert by any rounding at all.
    """
    source = write(tmp_path / "source", model_type)
    reference, yardstick = transformers_predictions(source)
    report = convert(source, tmp_path / "out", Recipe.of("bismooth"), read_text(calibration_text))
    assert sum(".experts." in name for name in report.linears) == 4 * 3 * (3 if model_type == "mixtral" else 2)
    cost = np.median(divergence(reference, emulate.log_probabilities(emulate.load(tmp_path / "out"), WINDOWS)))
    assert cost < 0.01 * yardstick, (cost, yardstick)


@pytest.mark.parametrize("model_type", SPARSE)
def test_routers_and_head_are_all_that_is_ignored(tmp_path, model_type):
    """As compressed-tensors itself matches names, among all that the checkpoint has."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    convert(write(tmp_path / "source", model_type), tmp_path / "out", Recipe.of("rtn"))
    written = Checkpoint(tmp_path / "out", dtypes=("BF16", "F32", "I8"))
    ignore = QuantizationConfig.model_validate(written.config["quantization_config"]).ignore
    linear = torch.nn.Linear(1, 1, device="meta")
    matrices = {n.removesuffix(".weight") for n, h in written.headers.items() if n.endswith(".weight") and h.shape[1:]}
    quantized = {n.removesuffix(".weight_scale") for n in written.headers if n.endswith(".weight_scale")}
    ignored = {name for name in matrices if any(is_match(name, linear, target) for target in ignore)}
    assert ignored == matrices - quantized - {"model.embed_tokens"}
    blocks = range(3) if model_type == "mixtral" else (1, 2)
    routers = {
        "mixtral": ["block_sparse_moe.gate"],
        "qwen2_moe": ["mlp.gate", "mlp.shared_expert_gate"],
        "qwen3_moe": ["mlp.gate"],
    }
    assert ignored == {"lm_head", *(f"model.layers.{i}.{router}" for i in blocks for router in routers[model_type])}


@pytest.mark.parametrize("model_type", ["gemma2", "llama"])
def test_transformers_reads_the_result(tmp_path, calibration_text, model_type):
    """``from_pretrained`` by itself has exactly our weights; its activations are rounded on another grid.

    compressed-tensors divides a token by its largest magnitude over 127.5, this package and vLLM over 127.
    """
    source, out = write(tmp_path / "source", model_type), tmp_path / "out"
    reference, yardstick = transformers_predictions(source)
    convert(source, out, Recipe.of("bismooth"), read_text(calibration_text))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.int8
    predictions = emulate.log_probabilities(model, WINDOWS)  # the first forward decompresses
    ours = emulate.load(out)
    tensors = model.state_dict()
    for name, module in ours.named_modules():
        if isinstance(module, emulate.W8A8Linear):
            exact = dequantize_weight(module.weight, module.weight_scale)
            assert torch.equal(tensors.pop(f"{name}.weight"), exact), name
            assert torch.equal(tensors.pop(f"{name}.weight_scale"), module.weight_scale), name
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensors.pop(name), tensor), name
    assert not tensors
    assert divergence(emulate.log_probabilities(ours, WINDOWS), predictions).mean() < 0.01 * yardstick
    assert divergence(reference, predictions).mean() < 0.01 * yardstick
