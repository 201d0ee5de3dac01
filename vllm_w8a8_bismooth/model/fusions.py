"""What vLLM merges into one linear: its parts must share factor and granularity."""

from collections.abc import Collection, Mapping

_PARTS = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("wq", "wk", "wv")),
    ("qkv_proj", ("query", "key", "value")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("gate_up_proj", ("c_fc_0", "c_fc_1")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
"""Last part of a fused linear's name -> those of its parts, as the models of vLLM 0.26 to 0.33 have them."""
_EXPERTS = ".experts."


def fused_among(linears: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """Fused linear -> its parts, of the linears of a block by name inside it. Experts are fused by other rules."""
    found: dict[str, tuple[str, ...]] = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in linears if _EXPERTS not in f".{name}"):
        before = f"{parent}." if parent else ""
        for fused, parts in _PARTS:
            if all(before + part in linears for part in parts):
                found[before + fused] = tuple(before + part for part in parts)
    return found
