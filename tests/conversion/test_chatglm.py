"""A type whose code is its own, as publishers store it: found out, converted in every way, checked, and served."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vllm_w8a8_bismooth as b
from tests.support import chatglm
from tests.support.command import run
from tests.support.folding import smoothed_copy
from tests.support.predictions import divergence
from tests.support.workers import engines
from vllm_w8a8_bismooth.checkpoint.basis import Means
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.method.rows import Threads

TRUSTED = {"trust_remote_code": True}
TOKENS = torch.randint(2, 150, (3, 40), generator=torch.Generator().manual_seed(2))
SITES = {
    "query_key_value->dense",
    "dense_h_to_4h->dense_4h_to_h",
    "norm->query_key_value",
    "norm->dense_h_to_4h",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return chatglm.write(tmp_path_factory.mktemp("chatglm") / "source")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "chatglm-cache"))


def model_of(folder: Path) -> torch.nn.Module:
    model = chatglm.build(folder)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def test_what_is_found_out(source):
    found = b.inspect(source, **TRUSTED)
    assert found.known_by == "discovery" and not found.problems
    assert [{site.name for site in kind.sites} for kind in found.kinds] == [SITES]
    assert (found.sizes["heads"], found.sizes["kv_heads"], found.sizes["blocks"]) == (6, 2, 2)
    layout = Source(source, Means(trusted=True))
    assert layout.names.head == "transformer.output_layer.weight" and not layout.notes


def test_without_trust_it_is_rounded(source, tmp_path):
    code, text = run("convert", source, tmp_path / "out")
    assert code == 0 and "does not run without --trust-remote-code" in text and "without smoothing" in text
    assert "--runner" not in text  # its class is called ChatGLMModel, and generates text
    code, text = run("sites", source)
    assert code == 2 and "does not run without --trust-remote-code; give that if you trust it" in text
    for trust in (False, True):  # what was guessed then is checked as it was
        checked = b.verify(tmp_path / "out", against=source, engine=False, trust_remote_code=trust)
        assert checked.findings == []


@pytest.mark.parametrize("way", ["rtn", "data-free", "calibrated"])
def test_every_way_of_conversion(source, tmp_path, calibration_text, way):
    given = {
        "rtn": {"method": "rtn"},
        "data-free": {"calibration": "none"},
        "calibrated": {"calibration": calibration_text, "calibration_tokens": 512},
    }[way]
    outcome = b.convert(source, tmp_path / "out", **given, **TRUSTED)
    assert len(outcome.linears) == 8
    assert b.verify(tmp_path / "out", against=source, engine=False, **TRUSTED).findings == []


def test_the_sites_keep_the_function(source, tmp_path):
    smoothed_copy(source, tmp_path / "folded", Means(trusted=True))
    with torch.no_grad():
        before, after = (model_of(folder).double()(TOKENS).logits for folder in (source, tmp_path / "folded"))
    assert (after - before).norm() < 1e-5 * before.norm()


def test_calibration_carries_states_whose_first_axis_is_the_length(source):
    layout, seen, model = Source(source, Means(trusted=True)), [], model_of(source)
    calibration = Calibration(layout, TOKENS, torch.device("cpu"))
    for block in model.transformer.encoder.layers:
        block.register_forward_hook(lambda module, inputs, out: seen.append(out[0].transpose(0, 1)))
    with torch.no_grad(), Threads() as threads:
        model(TOKENS)
        for index, expected in enumerate(seen):
            prefix = layout.names.block(index)
            tensors = {name: layout.checkpoint.read(prefix + name) for name in layout.blocks[index]}
            calibration.advance(index, tensors, threads)
            torch.testing.assert_close(calibration.hidden, expected)


@pytest.mark.engine
@pytest.mark.slow
def test_vllm_serves_it_with_a_class_of_its_own(source, tmp_path, calibration_text):
    out, windows = tmp_path / "out", TOKENS.numpy()
    b.convert(source, out, calibration=calibration_text, calibration_tokens=512, **TRUSTED)
    options = {"dtype": "float32", **TRUSTED}
    models = {name: {"model": folder, "options": options} for name, folder in (("source", source), ("ours", out))}
    found, log = engines.run(tmp_path, windows, models)
    assert found.keys() == models.keys(), log[-3000:]
    with torch.no_grad():
        whole = model_of(source)(TOKENS).logits[:, :-1].log_softmax(-1).numpy()
    before, ours = (found[name]["logprobs"][..., : whole.shape[-1]] for name in models)
    assert np.abs(before - whole).max() < 1e-4
    assert found["ours"]["schemes"] == {"None": 8}
    assert divergence(before, ours).mean() < 0.005
