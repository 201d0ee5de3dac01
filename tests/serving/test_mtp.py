"""Heads that predict the token behind the next, carried along in float: vLLM drafts with them as with the source's."""

import pytest

from tests.support import mtp
from tests.support.agreement import CLOSE, assert_same_up_to_near_ties
from tests.support.workers import engine
from vllm_w8a8_bismooth.api import convert, verify

DRAFTS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
LINEARS = {"deepseek_v3": 12, "qwen3_next": 16}
"""Of the model without its head, as vLLM merges them."""
ASKED = {
    "deepseek_v3": {f"model.layers.2.{name}" for name in ("self_attn.fused_qkv_a_proj", "mlp.experts")},
    "qwen3_next": {f"mtp.{name}" for name in ("fc", "layers.0.self_attn.qkv_proj", "layers.0.mlp.experts")},
}
"""Some of the layers of a head that vLLM quantizes unless it is told not to."""
NOISE = 0.1
"""Of the share of accepted tokens: three standard errors of the difference between two counts of some 400."""


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, dict]:
    """Source and conversion of each family with their heads, and the conversion without it, in one process."""
    folder, options = tmp_path_factory.mktemp("mtp"), {}
    text = "".join(chr(97 + (i * i) % 26) for i in range(4000))
    (folder / "text.txt").write_text(text)
    for family in mtp.PLACES:
        source, out = mtp.write(family, folder / family), folder / f"{family}-out"
        convert(source, out, calibration=folder / "text.txt", calibration_tokens=512)
        assert verify(out, against=source, engine=False).findings == []
        for name, model, drafter in (("source", source, DRAFTS), ("ours", out, DRAFTS), ("alone", out, {})):
            options[f"{family} {name}"] = {"model": model, **drafter}
    # prefixes of linear attention cannot be cached without Triton
    common = {"enforce_eager": True, "enable_prefix_caching": False, "dtype": "bfloat16"}
    asked = {name: {"options": common | own, "lora": None} for name, own in options.items()}
    prompts = [text[40 * i : 40 * i + 16 + i] for i in range(24)]
    found, log = engine.run(folder, engines=asked, prompts=prompts, max_tokens=24)
    assert found is not None, log[-3000:]
    return found


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("family", mtp.PLACES)
def test_a_head_drafts_as_the_sources_does(engines, family):
    source, ours, alone = (engines[f"{family} {name}"] for name in ("source", "ours", "alone"))
    for found in (source, ours, alone):
        assert "error" not in found, found["error"]
    assert ours["linears"] == alone["linears"] == {"None": LINEARS[family]} and source["linears"] == {}
    assert source["methods"].keys() >= ASKED[family]
    assert source["methods"].items() <= ours["methods"].items()  # which has one for the KV cache, too
    assert all(method.startswith("Unquantized") for method in source["methods"].values())
    shares = [found["accepted"] / found["drafted"] for found in (source, ours)]
    assert min(shares) > NOISE and abs(shares[0] - shares[1]) < NOISE, shares
    assert_same_up_to_near_ties(ours, alone, CLOSE)
