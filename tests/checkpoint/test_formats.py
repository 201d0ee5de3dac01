"""What configs and headers say of FP8 and FP4, however odd: found, refused in words, or left alone; never a crash."""

import math
from dataclasses import dataclass

from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.quantization import JSON
from vllm_w8a8_bismooth.checkpoint.formats import Weights


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    dtype: str
    nbytes: int = 0


NAMES = [
    "a.weight", "a.weight_scale", "a.weight_scale_inv", "a.input_scale", "a.bias", "x", "x_blocks", "x_scales",
    "b.weight", "b.weight_scale",
]  # fmt: skip
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 128, 300]), max_size=4).map(tuple)
HEADERS = st.builds(Header, SIZES, st.sampled_from(["F8_E4M3", "F8_E5M2", "BF16", "F32", "U8", "I8"]))
PACKED = [
    "a.weight",
    "a.weight_scale",
    *(f"a.weight_{part}" for part in ("packed", "multiplier", "offset", "rows", "low")),
]
FITTING = {
    "a.weight_packed": Header((3, 32), "U8"),
    "a.weight_multiplier": Header((3, 2), "U8"),
    "a.weight_offset": Header((3, 2), "I8"),
    "a.weight_rows": Header((2,), "I32"),
    "a.weight_low": Header((2, 32), "U8"),
}
CONFIGS = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "awq"]) | JSON},
    optional={
        "format": st.sampled_from(["float-quantized", "int-quantized"]) | JSON,
        "weight_block_size": st.lists(st.integers(-1, 2**70), min_size=2, max_size=2) | JSON,
        "config_groups": st.dictionaries(
            st.text(), st.fixed_dictionaries({"weights": st.dictionaries(st.just("block_structure"), JSON)}) | JSON
        )
        | JSON,
    },
)


# A scale whose weight lies in a shard that is missing.
@example({"quant_method": "fp8"}, {"a.weight_scale": Header((), "F8_E4M3")}, {"a.weight"})
@given(CONFIGS | JSON, st.dictionaries(st.sampled_from(NAMES), HEADERS), st.sets(st.sampled_from(NAMES)))
def test_anything_may_be_said(says, stored, lost):
    lost -= stored.keys()
    found = Weights.of({"quantization_config": says}, stored, lost)
    assert not found.encodings.keys() & found.lost
    shown = found.shown(stored, "BF16", 2)
    assert found.encodings.keys() <= shown.keys() and not shown.keys() & found.hidden
    for name, encoding in found.encodings.items():
        codes, scales = stored[encoding.codes], stored[encoding.scales]
        assert (shown[name].dtype, shown[name].nbytes) == ("BF16", 2 * math.prod(encoding.shape))
        numbers = {"F8_E4M3": 1, "U8": 2}[codes.dtype] * math.prod(codes.shape)
        assert math.prod(encoding.shape) == numbers > 0 and numbers % encoding.unit == 0
        assert 0 < math.prod(scales.shape) <= numbers, "what is allocated follows from the headers"
    if not found:
        assert shown == stored
    for name in found.lost - lost:
        beside = {name + end for end in ("_scale", "_scale_inv", "_blocks", "_scales")}
        assert found.problems or beside & lost, "for each that is lost something is said"


@example({"bits": 4.5, "group_size": 32}, {}, set())
@example({"bits": 4.5, "group_size": 32}, {"a.weight_rows": None, "a.weight_low": None}, set())
@given(
    st.just({"bits": 4.5, "group_size": 32}) | JSON,
    st.dictionaries(
        st.sampled_from(PACKED), st.none() | st.builds(Header, SIZES, st.sampled_from(["U8", "I8", "I32"]))
    ),
    st.sets(st.sampled_from(PACKED)),
)
def test_anything_may_be_beside_packed_rows(rows, changes, lost):
    """Tensors that fit, but for some, which are absent where nothing is said of them."""
    stored = {name: header for name, header in (FITTING | changes).items() if header is not None}
    lost -= stored.keys()
    says = {"quant_method": "w8a8_bismooth", "format": "int4-int8-rows", "bismooth": {"rows": rows}}
    found = Weights.of({"quantization_config": says}, stored, lost)
    shown = found.shown(stored, "BF16", 2)
    assert not shown.keys() & found.hidden and not any(name in shown for name in FITTING)
    if found.encodings:
        (encoding,) = found.encodings.values()
        assert (shown["a.weight"].dtype, shown["a.weight"].nbytes) == ("I8", math.prod(encoding.shape))
        assert not found.problems and not found.are_float and set(encoding.parts) <= stored.keys()
    elif stored.keys() & FITTING.keys():
        assert found.problems or lost
    if not changes and rows == {"bits": 4.5, "group_size": 32}:
        assert found.encodings["a.weight"].shape == (3, 64)
