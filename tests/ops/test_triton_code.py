"""What Triton makes of our kernels for devices that are not here: the right instruction, no spills. Nothing ran."""

import re

import pytest

from tests.support import aside
from tests.support.sweep import sweep

pytest.importorskip("triton", "3.9")

PRODUCTS = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::i8",
    "sm_120": r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    "gfx942": r"v_mfma_i32_\w+_i8",
    "gfx1100": r"v_wmma_i32_16x16x16_iu8",
}
"""Target -> the instruction that multiplies."""
MATRIX = r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma|v_wmma|v_dot)[\w.:]*"
FUSED = {"sm": r"\bFFMA\b", "gf": r"\bv_(?:pk_)?fmac?_f32|\bv_mad_f32|\bv_dual_fmac"}
"""How machine code of either maker spells a product and a sum that are rounded once."""
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
"""KiB of shared memory that a program can have on every device that takes the target's tiles: 8.6 with sm_80."""


@pytest.fixture(scope="module")
def targets():
    with aside.process("tests.support.workers.targets") as call:
        yield call


def check_product(code, target):
    found = set(re.findall(MATRIX, code.listing))
    assert found and all(re.fullmatch(PRODUCTS[target], name) for name in found), (code.kernel, found)
    assert not any(code.memory), (code.kernel, code.memory)
    assert code.shared <= SHARED[target] << 10, (code.kernel, code.shared)
    assert not re.search(FUSED[target[:2]], code.machine), code.kernel


@pytest.mark.parametrize(("target", "slice"), sweep([(target, i) for i in range(2) for target in PRODUCTS], 6))
def test_products(targets, target, slice):
    """The first tile of each table for every commit, all for CI; per-channel, per-group, and experts."""
    first, last = (0, 1) if slice == 0 else (1, 99)
    codes = targets("products", target, first, last)
    assert {code.kernel.split()[0] for code in codes} == {"_product", "_products"}
    assert len({code.kernel for code in codes}) >= 5 * (last == 1)
    for code in codes:
        check_product(code, target)


@pytest.mark.parametrize("target", sweep(PRODUCTS, 0))
def test_quantizations(targets, target):
    codes = targets("quantizations", target)
    assert {code.kernel.split()[0] for code in codes} == {"_quantize", "_inverse_rms"}
    for code in codes:
        assert not any(code.memory), (code.kernel, code.memory)
        if target.startswith("sm"):  # IEEE divisions and roots, and subnormal numbers kept
            assert "div.rn.f32" in code.listing and ".ftz" not in code.listing and ".approx" not in code.listing
        else:
            assert "v_div_fixup_f32" in code.listing
        # Narrowing rounds to the nearest even, or, one sum or product of two 16-bit numbers, is that operation's own.
        assert not re.search(r"cvt\.(?!rn\b|rni\b)\w+\.(?:bf16|f16)\w*\.f32", code.listing), code.kernel


def test_experts_ask_no_device_for_numbers(targets):
    """So a CUDA graph can hold them."""
    assert targets("sort_without_values") == [(14,), (14,), (5,), (4,), (4,)]


def test_devices_without_products_are_named(targets):
    assert targets("unsupported", "sm_90") == targets("unsupported", "gfx942") == ""
    message = "Triton has no INT8 product for compute capability 7.5; 8.0 (Ampere) is the first"
    assert targets("unsupported", "sm_75") == message
    assert targets("unsupported", "gfx1030") == "Triton has no INT8 product for gfx1030"


def test_every_target_is_in_the_list(targets):
    assert targets("table").keys() == PRODUCTS.keys()


SIZES = {16, 32, 64, 128}


def test_every_size_has_a_tile_for_groups(targets):
    """Experts count on it: their two products share a list of tiles, and one of them may have groups."""
    assert all(sizes == [SIZES, SIZES] for sizes in targets("tokens").values())


@pytest.mark.parametrize("target", PRODUCTS)
def test_tiles_follow_the_rule(targets, target):
    cases = [(m, n, groups) for m in (1, 16, 17, 64, 65, 5000) for n in (64, 4096, 28672) for groups in (1, 32)]
    for (m, n, _), (tokens, weights) in zip(cases, targets("choices", target, cases), strict=True):
        assert tokens == min((size for size in SIZES if size >= m), default=128)
        assert weights in (64, 128) and (n > 64 or tokens > 64 or weights == 64)
