"""AMD's and Intel's GPUs: vLLM's own platforms, made to believe that one is here, and who serves by its selection."""

import pytest

from tests.support import aside

pytest.importorskip("triton", "3.9")

OURS, STOCKS, EXPERTS, NONE = "our Triton kernel", "vLLM's own kernel", "vLLM's own method", "none, refused at load"
slow = pytest.mark.slow
SERVED = [
    ("MI300X", "RocmPlatform", "cuda"),
    ("Max 1550", "XPUPlatform", "xpu"),
    pytest.param("RX 7900 XTX", "RocmPlatform", "cuda", marks=slow),
]


@pytest.mark.parametrize(("gpu", "platform", "device"), SERVED)
def test_vllm_accepts_the_method_and_its_selection_finds_who_serves(gpu, platform, device):
    """Triton's kernels with groups, vLLM's own Triton kernels per-channel; nothing is missing, so nobody is warned."""
    with aside.process("tests.support.workers.platforms", PRETENDED=gpu) as call:
        assert call("platform") == (platform, device, "")
        assert set(call("registered").values()) == {("triton", True)}
        assert call("linear", False) == ("CompressedTensorsW8A8Int8", "TritonInt8ScaledMMLinearKernel")
        assert call("linear", True) == ("W8A8Scheme", None) and call("refused") == ""
        assert call("experts", False) == ("StockExperts", "TritonExperts")
        assert call("experts", True) == ("Experts", None)
        found = call("doctor")
    assert (found["platform"], found["device"], found["registered"], found["problem"]) == (device, gpu, True, None)
    assert [kernel for kernel, _, _ in found["layers"].values()] == [STOCKS, OURS, EXPERTS, OURS, OURS]
    assert all(meant for *_, meant in found["layers"].values()), found["layers"]
    assert found["tests"] == {}  # nothing is compiled, so there is nothing to test


@pytest.mark.slow
def test_a_radeon_without_int8_products_serves_per_channel_alone():
    reason = "Triton has no INT8 product for gfx1030"
    with aside.process("tests.support.workers.platforms", PRETENDED="RX 6900 XT") as call:
        assert call("linear", False) == ("CompressedTensorsW8A8Int8", "TritonInt8ScaledMMLinearKernel")
        assert call("refused") == reason
        assert call("experts", False) == ("StockExperts", "TritonExperts")
        assert call("experts", True).endswith(f"per-group experts cannot be served here: {reason}")
        layers = call("doctor")["layers"]
    assert [kernel for kernel, _, _ in layers.values()] == [STOCKS, NONE, EXPERTS, NONE, NONE]
    assert layers["per-group"][1] == layers["per-group experts"][1] == reason
