"""What the installed vLLM, in a process of its own, would do with each linear."""

from collections.abc import Collection, Iterator
from typing import Any

from vllm_w8a8_bismooth import NAME
from vllm_w8a8_bismooth.engine import ask
from vllm_w8a8_bismooth.errors import Problem
from vllm_w8a8_bismooth.model.names import Names
from vllm_w8a8_bismooth.verification.structure import Structure


def _in_vllm(names: Names) -> Names:
    """vLLM's own names, which are those of a causal LM for the bare decoder too."""
    return names if names.trunk else Names()


def problems(config: dict[str, Any], marked: bool, structure: Structure) -> list[Problem]:
    """Where vLLM refuses or misreads a checkpoint.

    Args:
        config: its ``quantization_config``.
        marked: whether vLLM must hand it to the plugin without being asked to.
        structure: without problems.

    Raises:
        Silent: vLLM gives no answer.
    """
    linears, layers = structure.linears, structure.layers
    names = _in_vllm(structure.names)
    head = names.head.removesuffix(".weight")
    # A head that is not stored is the embedding, which is float. Others may have made head and routers INT8.
    in_float = {head} - linears.keys()
    for i, layer in enumerate(layers):
        in_float |= {names.block(i) + n for n in layer.routers if structure.names.block(i) + n not in linears}
    stock = ["compressed-tensors"] if config["quant_method"] != NAME and not any(linears.values()) else []
    quantized = {name: linears[stored] for name, stored in _names(structure, linears)}
    answers = ask(
        "probe",
        {
            "config": config,
            "marked": marked,
            "methods": [*stock, NAME],
            "linears": quantized | ({head: linears[head]} if head in linears else {}),
            "float": sorted(in_float.union(name for name, _ in _names(structure, structure.ignored))),
            "head": head,
            "fused": {_last(f): [_last(p) for p in parts] for layer in layers for f, parts in layer.fused.items()},
        },
    )
    return [Problem(where, what, "mend config.json, or use a vLLM from 0.26 to 0.33") for where, what in answers]


def _names(structure: Structure, linears: Collection[str]) -> Iterator[tuple[str, str]]:
    """Linears by the names that they have in vLLM, and by their own; of experts, the first, as vLLM asks it."""
    names = _in_vllm(structure.names)
    for i, layer in enumerate(structure.layers):
        block = structure.names.block(i)
        name_of = {part: fused for fused, parts in layer.fused.items() for part in parts}
        for linear in layer.linears:
            if (linear not in layer.experts or ".experts.0." in linear) and block + linear in linears:
                yield names.block(i) + name_of.get(linear, linear), block + linear


def _last(name: str) -> str:
    return name.rpartition(".")[2]
