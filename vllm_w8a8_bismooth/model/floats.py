"""Which matrices of a block stay in float, and why: by name and shape, as what serves them expects it."""

import re
from collections.abc import Collection

ROUTER = "a router or gate, which decides by small differences"
MAMBA1 = "a Mamba-1 mixer, which vLLM does not quantize"
INDEXER = "of the index of sparse attention, which vLLM keeps in float"
PER_LAYER = "per-layer embeddings, which vLLM keeps in float"
_RULES = (
    (r"per_layer", PER_LAYER),
    (r"(^|\.)(router|gate|gate_network|shared_expert_gate|router\.layer|wg|switch)$", ROUTER),
    (r"(^|\.)conv\w*$|(^|\.)\w*conv1d$", "a convolution"),
    (r"(^|\.)indexer\.(wk|weights_proj|k_proj)$", INDEXER),
    (r"norm\w*$|(^|\.)ln_\w+$", "a norm"),
    (r"embed", "an embedding"),
    (r"rel(ative)?_(pos|attn)\w*|pos_(bias|emb)", "of positions"),
)  # fmt: skip
"""Name of the module -> reason."""
TOWER = re.compile(r"(^|\.|_)(vis\w*|vit|image\w*|audio\w*|speech\w*|multi_modal\w*|encoder|mtp)(\.|_|$)")
"""Parts of other models than the one that predicts text."""
MULTIPLE = 16
"""INT8 kernels take a multiple of it for K; fewer rows than it are gates."""


def is_mamba1(beside: Collection[str]) -> bool:
    """Whether a mixer with these parts is Mamba's first, and so all its matrices stay in float."""
    return {"x_proj", "dt_proj"} <= set(beside)


def reason_for(module: str, rows: int, columns: int, beside: Collection[str]) -> str | None:
    """Why the matrix of a module inside a block stays in float; ``None`` if it becomes INT8.

    Args:
        module: its name inside the block.
        rows, columns: of its matrix.
        beside: names of the modules in the same module.
    """
    if is_mamba1(beside):
        return MAMBA1
    for pattern, reason in _RULES:
        if re.search(pattern, module):
            return reason
    if rows < MULTIPLE:
        return f"has only {rows} rows"
    if columns % MULTIPLE:
        return f"K = {columns} is no multiple of {MULTIPLE}, which INT8 kernels need"
    return None
