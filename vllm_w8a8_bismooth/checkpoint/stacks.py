"""A model of which nothing is known but the names and shapes of its tensors: its blocks, and the linears in them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Header
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.floats import TOWER, reason_for
from vllm_w8a8_bismooth.model.fusions import fused_among
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.model.names import Names

_STACK = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<index>0|[1-9]\d*)\.(?P<inside>.+)")
_EMBEDDING = re.compile(r"embed|wte|word_emb|tok_emb", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|output_layer|head)\.weight$")
_EXPERT = re.compile(r"\.experts?\.\d+\.")


def names_among(headers: Mapping[str, Header]) -> Names:
    """What the tensors' names say: the stack of blocks that holds most, its embedding, head and norm.

    Raises:
        BismoothError: nothing looks like the blocks of a model.
    """
    weight: Counter[str] = Counter()
    for name, header in headers.items():
        if match := _STACK.fullmatch(name):
            weight[match["stack"]] += header.nbytes
    if not weight:
        example = next(iter(headers), "nothing")
        what = f"no tensor is called like one of a model's block, with a number in its name; they are like {example}"
        raise BismoothError.of("config.json", what, "give a checkpoint in the form in which transformers saves it")
    stack = max(weight, key=lambda stack: (not TOWER.search(stack), weight[stack], stack))
    outside = {n: h for n, h in headers.items() if not n.startswith(stack) and not TOWER.search(n)}
    matrices = [name for name, header in outside.items() if len(header.shape) == 2]
    head = next((name for name in matrices if _HEAD.search(name)), "lm_head.weight")
    tables = [name for name in matrices if _EMBEDDING.search(name) and name != head]
    tables = tables or [name for name in matrices if name != head]
    if not tables:
        what = f"no tensor outside {stack}* looks like an embedding"
        raise BismoothError.of("config.json", what, "give a checkpoint of a language model")
    embedding = max(tables, key=lambda name: outside[name].nbytes)
    norm = [name for name, header in outside.items() if "norm" in name and len(header.shape) == 1]
    return Names(stack, embedding, norm[-1] if norm else None, head)


def layers_among(headers: Mapping[str, Header], names: Names) -> list[Layer]:
    """What each block holds, without sites: nothing says what reads what.

    Raises:
        BismoothError: blocks are missing between others.
    """
    inside: dict[int, dict[str, Header]] = defaultdict(dict)
    for name, header in headers.items():
        if place := names.inside(name):
            inside[place[0]][place[1]] = header
    if sorted(inside) != list(range(len(inside))):
        missing = next(i for i in range(len(inside)) if i not in inside)
        raise BismoothError.of(f"{names.block(missing)}*", "is missing", "download the checkpoint again")
    kinds: dict[frozenset, Layer] = {}
    found = []
    for index in range(len(inside)):
        key = frozenset((name, header.shape, header.dtype) for name, header in inside[index].items())
        if key not in kinds:
            kinds[key] = _layer(inside[index])
        found.append(kinds[key])
    return found


def _layer(tensors: Mapping[str, Header]) -> Layer:
    linears: dict[str, tuple[int, int]] = {}
    routers: dict[str, str] = {}
    beside: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        beside[parent].add(leaf)
    for name, rows, columns in _matrices(tensors):
        if reason := reason_for(name, rows, columns, beside[name.rpartition(".")[0]]):
            routers[name] = reason
        else:
            linears[name] = rows, columns
    return Layer(
        tensors={name: header.shape for name, header in tensors.items()},
        linears=linears,
        sites=(),
        routers=routers,
        fused=fused_among(linears),
        experts=frozenset(name for name in linears if _EXPERT.search(name)),
    )


def _matrices(tensors: Mapping[str, Header]) -> Iterator[tuple[str, int, int]]:
    """Modules with a matrix, its rows and columns."""
    for name, header in tensors.items():
        if name.endswith(".weight") and len(header.shape) == 2 and header.dtype in (*FLOAT_DTYPES, "I8"):
            yield name.removesuffix(".weight"), *header.shape
