"""The part of a recipe that goes into the checkpoint's config.json: which linears are quantized, and how."""

import re
from collections.abc import Sequence
from typing import Any

from vllm_w8a8_bismooth import FORMAT, MARKER, NAME, ROWS_FORMAT
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.model.configs import predictors_of
from vllm_w8a8_bismooth.model.fusions import fused_among
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.model.names import Names
from vllm_w8a8_bismooth.recipe import Recipe

_HEAD = r"re:(.*\.)?lm_head$"  # by its name: the class of vLLM's heads is no linear


def _arguments(strategy: str, group_size: int | None, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


def _group(targets: list[str], group_size: int | None) -> dict[str, Any]:
    grouped = group_size is not None
    return {
        "targets": targets,
        "weights": _arguments("group" if grouped else "channel", group_size, dynamic=False),
        "input_activations": _arguments("group" if grouped else "token", group_size, dynamic=True),
        "output_activations": None,
    }


def expressions(chosen: Sequence[set[str]], layers: Sequence[Layer], names: Names) -> list[str]:
    """Regular expressions for compressed-tensors that name some of the linears, fused names included.

    Readers match either the parts (transformers) or the fused linear (vLLM before 0.32 only the latter), so the
    expression of a fused linear names both. Unanchored names would be wrong: ``v_proj`` is the end of ``qkv_proj``.
    A block's experts, which are chosen together, are named by the list that they are in: vLLM may call what is in them
    otherwise (Llama 4, whose gate and up are one), and what the list is in (MiniMax-M2).

    Args:
        chosen: names of linears inside each block, with all that must be alike.
        layers: those of the same blocks, for the fused names.
        names: of the checkpoint; transformers calls the blocks of a bare decoder as it does, vLLM as a causal LM's.
    """
    where: dict[str, list[int]] = {}
    for index, (linears, layer) in enumerate(zip(chosen, layers, strict=True)):
        fusions = {**fused_among(layer.routers), **layer.fused}
        unit_of = {part: (fused, *parts) for fused, parts in fusions.items() for part in parts}
        units = {"|".join(map(re.escape, sorted(unit_of.get(name, (name,))))) for name in linears - layer.experts}
        units = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", unit) for unit in units}
        for unit in units | set(map(_all_experts, linears & layer.experts)):
            where.setdefault(unit, []).append(index)
    blocks = _blocks(names)
    return [rf"re:{blocks}\.({'|'.join(map(str, indices))})\.({unit})$" for unit, indices in sorted(where.items())]


def _all_experts(linear: str) -> str:
    """An expression for whatever is in an expert of the same list as a linear of one, wherever in the block it is."""
    return r"(.*\.|)" + re.sub(r"(?:.*\.)?([^.]+)\.\d+\..*", r"\1", linear) + r"\.\d.*"  # few repeats, see guard.py


def _blocks(names: Names) -> str:
    """A regular expression for what the name of a tensor in any block begins with."""
    return (r".*\." if names.trunk else r"(.*\.)?") + re.escape(names.stack)


def _towers(outside: Sequence[str], names: Names) -> list[str]:
    """Parts beside the decoder that have blocks of their own, as for images or sound, of all modules outside it.

    vLLM calls what is in them otherwise, and merges some of it; their own names it keeps.
    """
    return sorted({_part(module, names) for module in outside if re.search(r"\.\d+\.", module)})


def _part(module: str, names: Names) -> str:
    """The first part of a module's name by which it differs from the decoder's."""
    parts, trunk = module.split("."), names.blocks.split(".")
    return next(part for i, part in enumerate(parts) if trunk[i : i + 1] != [part] or i == len(parts) - 1)


def _anywhere(module: str, names: Names) -> str:
    """A module's name, or an expression for all whose names differ from it in numbers alone.

    In the decoder, vLLM may have it deeper than the checkpoint says (Gemma 3n).
    """
    inside = module.removeprefix(names.trunk)
    if inside == module and not any(part.isdigit() for part in module.split(".")):
        return module
    around = "" if inside == module else r"(.*\.)?"
    return (
        f"re:{around}" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in inside.split(".")) + "$"
    )


def _in_any_expert(module: str) -> str:
    """An expression for a module inside a block; all experts, if it is a stack of them or belongs to one."""
    # vLLM asks for each expert of a stack by its number; DBRX has one module more around its stacks
    if stack := re.fullmatch(r"((?:.*\.)?experts)(?:\.mlp)?\.[^.]+", module):
        return re.escape(stack[1]) + r"\..*"
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module))


def float_modules(source: Layout, ignored: Sequence[set[str]], head: str | None = None) -> list[str]:
    """What stays in float: heads and other matrices outside the blocks, the routers of mixtures, and ``ignored``.

    The language model's ``head`` is not among it if that is :data:`INT8`.

    vLLM quantizes what is not named here, also the head of a classifier, and blocks that predict further tokens.
    """
    kinds = {id(layer): layer for layer in source.layers}.values()
    linears = {name for layer in kinds for name in layer.linears}
    floats = {name for layer in kinds for name in (*layer.routers, *fused_among(layer.routers))}
    routers = sorted(set(map(_in_any_expert, floats - linears)))
    somewhere = [i | (layer.routers.keys() & linears) for i, layer in zip(ignored, source.layers, strict=True)]
    places = {module: source.names.inside(module) for module in source.floats()}
    beyond = sorted({place[0] for place in places.values() if place} | set(_predictors(source)))
    towers = _towers([module for module, place in places.items() if place is None], source.names)
    heads = [module for module, place in places.items() if place is None and _part(module, source.names) not in towers]
    language = source.names.head.removesuffix(".weight")
    heads = [module for module in heads if not (head and module == language)]
    outside = sorted({_anywhere(module, source.names) for module in heads} - {"lm_head"})
    if any(module.rpartition(".")[2].isdigit() for module in heads):
        outside.append("re:^$")  # vLLM gives the parts of a reward model's head no names
    if beyond:
        outside.append(rf"re:{_blocks(source.names)}\.({'|'.join(map(str, beyond))})\..*$")
    return [
        *([] if head else ["lm_head"]),
        *outside,
        *(rf"re:(.*\.)?{re.escape(tower)}\..*" for tower in towers),
        *(rf"re:{_blocks(source.names)}\.\d+\.{router}$" for router in routers),
        *expressions(somewhere, source.layers, source.names),
    ]


def _predictors(source: Layout) -> range:
    """The numbers under which vLLM has blocks that predict further tokens, where the files call them otherwise: MiMo's
    are ``mtp_layers``, ERNIE's ``mtp_block``."""
    apart = [name for name in source.outside if ".mtp" in f".{name}"]
    count = min(predictors_of(source.checkpoint.config), len(apart))
    return range(len(source.layers), len(source.layers) + count)


def quantization_config(
    recipe: Recipe, grouped: Sequence[set[str]], ignored: Sequence[set[str]], source: Layout, version: str
) -> dict[str, Any]:
    """The ``quantization_config`` of the written ``config.json``: compressed-tensors ``int-quantized`` plus our marker.

    With 4-bit rows it says the same, as they stand for INT8 codes, but under the names of our own method and format,
    which nobody else takes for theirs.

    Args:
        recipe: the run's choices.
        grouped: each block's per-group linears.
        ignored: each block's linears that stay in float.
        source: of the same blocks.
        version: this package's.
    """
    layers = source.layers
    targets = expressions(grouped, layers, source.names)
    groups = [_group(targets, recipe.group_size)] if targets else []
    channels = any(g | i != set(layer.linears) for g, i, layer in zip(grouped, ignored, layers, strict=True))
    if targets := [*(["Linear"] if channels else []), *([_HEAD] if recipe.head else [])]:
        groups.append(_group(targets, None))
    packed = recipe.bits is not None
    rows = {"rows": {"bits": recipe.bits, "group_size": recipe.group_size}} if packed else {}
    return {
        "quant_method": NAME if packed else "compressed-tensors",
        "format": ROWS_FORMAT if packed else FORMAT,
        "quantization_status": "compressed",
        # Specific targets come first: readers stop at the first group that matches.
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": float_modules(source, ignored, recipe.head),
        "kv_cache_scheme": None,
        MARKER: {"version": version, "method": recipe.method, **rows},
    }
