"""What a config promises, held against the names and shapes in the headers."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint, Promise
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.heads import head_problems
from vllm_w8a8_bismooth.checkpoint.reader import BUFFER_DTYPES, FLOAT_DTYPES, Header, Headers
from vllm_w8a8_bismooth.checkpoint.strays import stray_problems, strays
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.model.configs import count_of, predictors_of
from vllm_w8a8_bismooth.model.layers import View
from vllm_w8a8_bismooth.model.names import Names

_MTP = ("eh_proj", "enorm", "hnorm", "shared_head", "mtp", "embed_tokens", "token_layernorm", "final_layernorm")
"""What blocks that predict further tokens hold beside an ordinary block's tensors (DeepSeek, GLM, MiMo)."""
_TRACES = {"weight_scale", "weight_scale_inv", "qweight", "qzeros", "absmax", "quant_map", "SCB", "weight_packed"}
"""Parts of names that only quantized weights have."""
_STACKED = (".experts.gate_up_proj", ".experts.down_proj")
"""Endings of tensors that hold all experts of a block."""
_AS_PUBLISHED = f"give the checkpoint as its publisher stores it, or mend model_type or what else is wrong in {CONFIG}"
"""Not to load and save it: transformers fills what it does not find with random numbers, and only warns."""


def check_unquantized(config: Mapping, dtypes: Mapping[str, str]) -> None:
    """Raises :class:`BismoothError` if the config says that the weights are quantized, whether that is so or not.

    Args:
        config: of the checkpoint.
        dtypes: tensor -> dtype, as safetensors names it.
    """
    keys = [key for key in ("quantization_config", "compression_config") if config.get(key)]
    for key in keys:
        method = config[key].get("quant_method", "?") if isinstance(config[key], dict) else "?"
        says = f"{key}.quant_method = {method!r}"
        floats = sorted({dtype for name, dtype in dtypes.items() if name.endswith(".weight")})
        traces = {part for name in dtypes for part in name.split(".")} & _TRACES
        if floats and set(floats) <= set(FLOAT_DTYPES) and not traces:
            raise BismoothError.of(
                CONFIG,
                f"it says that the checkpoint is quantized ({says}), but all weights are float ({', '.join(floats)})",
                f"if that is left from another run, remove {' and '.join(keys)} from {CONFIG}, of a copy if the model "
                "is not yours",
            )
        raise BismoothError.of(
            CONFIG,
            f"the checkpoint is already quantized ({says})",
            "convert the original bf16, fp16 or fp32 checkpoint instead",
        )


def audit(checkpoint: Headers, blueprint: Blueprint, tensors: Mapping[str, Header]) -> Iterator[Problem]:
    """Compare what the config promises with the headers; yields one problem at a time.

    Tensors that are ``lost`` are known to be missing: they count as part of the checkpoint and are no further problem.

    Optional are the head of tied models and of those whose ``architectures`` name none, rotary tables, and buffers,
    which are passed through; anything else inside a block is a problem, because converting it as if it were not there
    would be silently wrong. Blocks behind the last one are passed through if they predict further tokens (MTP).

    Args:
        checkpoint: its config and names count.
        blueprint: what follows from the config.
        tensors: those to be looked at.
    """
    config, names, lost = checkpoint.config, blueprint.names, checkpoint.lost
    bound = len(tensors) + len(lost)
    promise = Promise.of(blueprint, bound)
    missing = {n: shape for n, shape in promise.required.items() if n not in tensors and n not in lost}
    apart = strays(checkpoint, missing.__contains__) if missing else {}
    yield from stray_problems(checkpoint, apart)
    missing = {n: shape for n, shape in missing.items() if not any(n in held for held in apart.values())}
    blocks = [name for name in promise.required if name.startswith(names.blocks)]
    if not lost and not promise.endless and all(name in missing for name in blocks):
        yield _foreign(config, blocks[0], tensors)
        return
    kind, strange = config["model_type"], _strange(names, promise, blueprint.sizes["blocks"], tensors)
    around = {place[0] for place in map(names.inside, strange) if place and not promise.endless}
    replaced = [name for name in missing if (place := names.inside(name)) and place[0] in around]
    if replaced:
        yield _replaced(kind, replaced, strange)
    missing = {name: shape for name, shape in missing.items() if name not in set(replaced)}
    yield from _missing(config, names, missing, promise, blueprint.views)
    if promise.endless:
        yield Problem(
            CONFIG, f"implies many more tensors than the {bound} in the files", "mend it or download the rest"
        )
        return
    yield from head_problems(checkpoint, blueprint.tied, tensors)
    beyond: dict[int, list[str]] = {}
    for name, header in tensors.items():
        expected = promise.required.get(name) or promise.optional.get(name)
        place = names.inside(name)
        if expected is not None and header.dtype in BUFFER_DTYPES:
            remedy = "save the model again in BF16, F16 or F32, with model.to(torch.bfloat16).save_pretrained(FOLDER)"
            yield Problem(name, f"has dtype {header.dtype}, which no weight can have here", remedy)
        elif expected is not None:
            if header.shape != expected:
                what = f"has shape {list(header.shape)}, {CONFIG} implies {list(expected)}"
                yield Problem(name, what, "mend the one that is wrong")
        elif place is not None and place[0] >= blueprint.sizes["blocks"]:
            beyond.setdefault(place[0], []).append(place[1])
    for name in strange if not replaced else ():
        yield Problem(
            name,
            f"tensor of shape {list(tensors[name].shape)} is not part of a {kind} model with this {CONFIG}",
            f"mend {CONFIG} (model_type, or the switch for it) if the model was trained with it, and remove the tensor "
            "only if it was not",
        )
    if beyond and not predicts(config, beyond.values()):
        key = count_of(config)[0]
        own = {index: inside for index, inside in beyond.items() if not predicts({}, [inside])}
        if sorted(own) == list(range(blueprint.sizes["blocks"], max(own) + 1)):
            remedy = f"set {key} to {max(own) + 1} in {CONFIG} if the model has so many blocks, or remove"
        else:
            remedy = "download the checkpoint again if the model has so many blocks, or remove"
        yield Problem(
            f"{names.block(min(own))}*",
            f"{sum(map(len, own.values()))} tensors belong to no block, because {CONFIG} says {key} = "
            f"{blueprint.sizes['blocks']}",
            f"{remedy} the tensors if they are left from another model",
        )


def _strange(names: Names, promise: Promise, blocks: int, tensors: Mapping[str, Header]) -> list[str]:
    """Tensors inside the blocks that are no part of such a model, and no buffers."""
    found = []
    for name, header in tensors.items():
        place = names.inside(name)
        if name in promise.required or name in promise.optional or (place and place[0] >= blocks):
            continue
        is_weight = header.dtype not in BUFFER_DTYPES and "rotary_emb." not in name
        if name.startswith(names.blocks) and (place is None or is_weight):
            found.append(name)
    return found


def predicts(config: Mapping, beyond: Collection[Collection[str]]) -> bool:
    """Whether blocks behind the last one predict further tokens (MTP): the config counts so many, or each holds what
    only such blocks do.

    Args:
        config: of the checkpoint.
        beyond: names inside each of them.
    """
    return predictors_of(config) >= len(beyond) or all(any(name.startswith(_MTP) for name in names) for names in beyond)


def _replaced(kind: str, missing: Sequence[str], strange: Sequence[str]) -> Problem:
    """The problem that blocks hold other tensors than they should."""
    stacked = [name for name in strange if name.endswith(_STACKED)]
    first = next((name for name in missing if ".experts." in name), missing[0]) if stacked else missing[0]
    here, there = (
        f"{name}{f' (and {count - 1} more)' if count > 1 else ''}"
        for name, count in ((first, len(missing)), ((stacked or strange)[0], len(strange)))
    )
    if stacked:
        what = f"missing, while {there} holds stacked experts, as transformers 5 keeps them in memory"
        return Problem(here, what, "download the original checkpoint, which has one tensor an expert")
    return Problem(here, f"missing, while {there} is not part of a {kind} model with this {CONFIG}", _AS_PUBLISHED)


def _foreign(config: Mapping, expected: str, tensors: Mapping[str, Header]) -> Problem:
    """The problem that no block is there at all."""
    example = next((name for name in tensors if re.search(r"\.\d+\.", name)), next(iter(tensors), "nothing"))
    return Problem(
        CONFIG,
        f"model_type is {config['model_type']!r}, but none of the tensors of such a model's blocks is in the files; "
        f"they are called like {example}, and not like {expected}",
        _AS_PUBLISHED,
    )


def _counted(number: int, thing: str) -> str:
    return f"1 {thing} is" if number == 1 else f"{number} {thing}s are"


def _missing(
    config: Mapping,
    names: Names,
    missing: Mapping[str, tuple[int, ...]],
    promise: Promise,
    views: Mapping[str, View],
) -> Iterator[Problem]:
    """Tensors that are not there; blocks of which nothing is there are one problem, and so are stacks."""
    wanted: Counter[int] = Counter(place[0] for place in map(names.inside, promise.required) if place)
    absent: Counter[int] = Counter(place[0] for place in map(names.inside, missing) if place)
    whole = {block for block, count in absent.items() if count == wanted[block]}
    stacks = {views[name].tensor for name in promise.required if name in views and name not in missing}
    said = set()
    for name, shape in missing.items():
        place = names.inside(name)
        if name in views and views[name].tensor not in stacks:  # as a publisher would store it
            name, shape = views[name].tensor, views[name].whole
        if name not in said and (place is None or place[0] not in whole):
            said.add(name)
            what = f"tensor of shape {list(shape)} is missing"
            yield Problem(name, what, f"download the checkpoint again or mend {CONFIG}")
    if whole and not promise.endless:
        key = count_of(config)[0]
        present = sorted(wanted.keys() - whole)
        fewer = present == list(range(len(present)))
        yield Problem(
            f"{names.block(min(whole))}*",
            f"{_counted(len(whole), 'whole block')} missing, because {CONFIG} says {key} = {len(wanted)}",
            "download the checkpoint again"
            + (f", or set {key} to {len(present)} in {CONFIG} if the model has no more" if fewer else ""),
        )
