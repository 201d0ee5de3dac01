"""Which matrices of a block stay in float, and why: by name and shape, as what serves them expects it."""

import re

ROUTER = "a router or gate, which decides by small differences"
_RULES = (
    (r"(^|\.)(router|gate|gate_network|shared_expert_gate|router\.layer|wg|switch)$", ROUTER),
    (r"(^|\.)conv\w*$|(^|\.)\w*conv1d$", "a convolution"),
    (r"(^|\.)(x_proj|dt_proj)$", "of a Mamba-1 mixer, which vLLM does not quantize"),
    (r"(^|\.)indexer\.(wk|weights_proj)$", "of the index of sparse attention, which vLLM keeps in float"),
    (r"norm\w*$|(^|\.)ln_\w+$", "a norm"),
    (r"embed", "an embedding"),
    (r"rel(ative)?_(pos|attn)\w*|pos_(bias|emb)", "of positions"),
)  # fmt: skip
"""Name of the module -> reason."""
TOWER = re.compile(r"(^|\.|_)(vis\w*|vit|image\w*|audio\w*|speech\w*|multi_modal\w*|encoder|mtp)(\.|_|$)")
"""Parts of other models than the one that predicts text."""
_SMALLEST = 16
"""INT8 kernels take a multiple of it for K; fewer rows than it are gates."""


def reason_for(module: str, rows: int, columns: int) -> str | None:
    """Why the matrix of a module inside a block stays in float; ``None`` if it becomes INT8.

    Args:
        module: its name inside the block.
        rows, columns: of its matrix.
    """
    for pattern, reason in _RULES:
        if re.search(pattern, module):
            return reason
    if rows < _SMALLEST:
        return f"has only {rows} rows"
    if columns % _SMALLEST:
        return f"K = {columns} is no multiple of {_SMALLEST}, which INT8 kernels need"
    return None
