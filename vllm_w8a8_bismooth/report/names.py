"""Names of linears for people: many of them in few words."""

from collections.abc import Iterable, Sequence

from vllm_w8a8_bismooth.model.names import block_of, kind_of


def in_few_words(names: Iterable[str]) -> str:
    """Full names by kind and blocks: ``q_proj, k_proj, v_proj in block 2; down_proj in blocks 0, 3-5; lm_head``."""
    kinds: dict[str, set[int]] = {}
    for name in names:
        kind, block = kind_of(name) if block_of(name) else (name, None)
        kinds.setdefault(kind, set()).update([] if block is None else [block])
    alike: dict[tuple[int, ...], list[str]] = {}
    for kind, blocks in kinds.items():
        alike.setdefault(tuple(sorted(blocks)), []).append(kind)
    return "; ".join(", ".join(same) + _in_blocks(blocks) for blocks, same in alike.items())


def _in_blocks(blocks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block - 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f" in block{'s' if len(blocks) > 1 else ''} {shown}" if blocks else ""
