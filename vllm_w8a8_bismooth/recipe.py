"""Every choice of a conversion, as frozen data, and the part of it that goes into the checkpoint's config.json."""

import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from vllm_w8a8_bismooth import FORMAT, MARKER, patterns
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.configs import predictors_of
from vllm_w8a8_bismooth.model.fusions import fused_among
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.model.names import Names

SMOOTHINGS = ("balanced", "alpha")
ROUNDINGS = ("nearest", "gptq")
COMPUTE_DTYPES = AUTO, FP32, BF16 = ("auto", "float32", "bfloat16")
"""The latter two are torch's names."""
FLOAT, INT8 = "float", "int8"
"""What the language model's head can be."""
_NUMBERS = {"alpha": float, "calibration_tokens": int, "group_size": int, "group_budget": float, "target_kl": float}
_WORDS = {
    "smoothing": SMOOTHINGS,
    "rounding": ROUNDINGS,
    "compute_dtype": COMPUTE_DTYPES,
    "head": (FLOAT, INT8),
}
PATTERNS = ("group_layers", "ignore")
"""The fields that name linears."""
ALPHA = 0.5
GROUP_SIZE = 128
BUDGET = 0.25
"""Of the multiplications, where no target says how many are needed: on CPUs they take a tenth longer with groups."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"ignore": None, "head": None},
    "bismooth": {
        "smoothing": "balanced",
        "alpha": None,
        "rounding": None,
        "calibration_tokens": 16384,
        "compute_dtype": AUTO,
        "group_size": None,
        "group_layers": None,
        "ignore": None,
        "head": None,
    },
    "mixed": {"group_size": GROUP_SIZE, "group_layers": None, "ignore": None, "head": None},
    "auto": {
        "smoothing": "balanced",
        "alpha": None,
        "rounding": None,
        "calibration_tokens": 16384,
        "compute_dtype": AUTO,
        "group_size": None,
        "group_budget": None,
        "target_kl": None,
        "ignore": None,
        "head": None,
    },
}
"""Method -> the options that go with it and their defaults."""


@dataclass(frozen=True)
class Recipe:
    """The choices of one run; two runs with equal recipes write equal checkpoints.

    Attributes:
        method: ``rtn`` (per-channel as is), ``bismooth`` (smoothed per-channel), ``mixed`` (per-group where weights
            need it), ``auto`` (smoothed, and per-group where that pays).
        smoothing: rule for the factors, one of :data:`SMOOTHINGS` (``bismooth``, ``auto``).
        alpha: share of the activation range moved into the weights (``smoothing`` ``alpha``).
        rounding: of the weights, one of :data:`ROUNDINGS` (``bismooth``, ``auto``); ``gptq`` needs calibration, and is
            the default where there is some.
        calibration_tokens: token budget of the calibration (``bismooth``, ``auto``).
        compute_dtype: in which calibration computes, one of :data:`COMPUTE_DTYPES` (``bismooth``, ``auto``). Once the
            source is open it is ``auto`` no more, see :func:`arithmetic.arithmetic`; ``None`` is data-free.
        group_size: columns per scale in per-group linears. ``auto`` takes 128, 64 or 32, the
            largest that fits all linears, once the source is open.
        group_layers: patterns of linears, see :mod:`patterns`; ``None`` lets the weights decide (``mixed``). A text, or
            several, becomes a tuple of single patterns, here and in ``ignore``.
        group_budget: share of the linears' multiplications that may have per-group scales, 0 to 1, or a text like
            ``15%`` (``auto``). :data:`BUDGET` by default, and all of them with a target.
        target_kl: estimated KL divergence to the source, in nats a token, at which no more groups are given (``auto``).
        ignore: patterns of linears that keep the source's dtype; ``None`` is none.
        head: :data:`INT8` makes the language model's head per-channel, too; ``None`` is :data:`FLOAT`.
        source: fingerprint of the source checkpoint, once it is open.
        calibration: SHA-256 of the calibration file; ``None`` is data-free.
        sites: SHA-256 of the record of sites that was given; ``None`` if they are known or found out.

    Raises:
        BismoothError: a value is out of range, or an option does not go with the method.
        TypeError: a value is of another kind than it should be.
    """

    method: str
    smoothing: str | None = None
    alpha: float | None = None
    rounding: str | None = None
    calibration_tokens: int | None = None
    compute_dtype: str | None = None
    group_size: int | None = None
    group_layers: tuple[str, ...] | None = None
    group_budget: float | None = None
    target_kl: float | None = None
    ignore: tuple[str, ...] | None = None
    head: str | None = None
    source: str | None = None
    calibration: str | None = None
    sites: str | None = None

    @classmethod
    def of(cls, method: str, **given: Any) -> "Recipe":
        """A recipe from what a user gave (``None`` or nothing in a list = not given) and the method's defaults."""
        if not isinstance(method, str) or method not in DEFAULTS:
            raise BismoothError.of(f"--method {method!r}", "unknown", f"choose one of {', '.join(DEFAULTS)}")
        given = {key: value for key, value in given.items() if not (value is None or _holds_nothing(value))}
        known = {key for options in DEFAULTS.values() for key in options}
        if unknown := sorted(given.keys() - known):
            raise TypeError(f"{unknown[0]} is no option; those are {', '.join(sorted(known))}")
        for key in given:
            if key not in DEFAULTS[method]:
                raise BismoothError.of(f"--method {method}", f"{option_of(key)} has no effect", "leave it out")
        options = {**DEFAULTS[method], **given}
        options["head"] = None if options["head"] == FLOAT else options["head"]
        if options.get("smoothing") == "alpha":
            options["alpha"] = options["alpha"] if options["alpha"] is not None else ALPHA
        elif "alpha" in given:
            remedy = "leave it out, or say --smoothing alpha"
            raise BismoothError.of("--smoothing balanced", "--alpha has no effect", remedy)
        if options["head"] and options.get("target_kl") is not None:
            what = "the estimate is of the blocks' linears, and knows nothing of an INT8 head"
            raise BismoothError.of("--target-kl and --head int8", what, "leave out one of the two")
        if method == "auto" and options["group_budget"] is None:
            options["group_budget"] = BUDGET if options["target_kl"] is None else 1.0
        if method == "bismooth" and (options["group_size"] is None) != (options["group_layers"] is None):
            what = "needs both --group-layers and --group-size, or neither"
            raise BismoothError.of("--method bismooth", what, "give the other one too")
        return cls(method, **options)

    def __post_init__(self) -> None:
        for field, kind in _NUMBERS.items():
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, _number(field, value, kind))
        for field, known in _WORDS.items():
            if (value := getattr(self, field)) not in (None, *known):
                raise BismoothError.of(f"{option_of(field)} {value!r}", "unknown", f"choose one of {', '.join(known)}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise BismoothError.of(f"--alpha {self.alpha}", "outside 0 to 1", "give a share, like 0.5")
        if self.calibration_tokens is not None and self.calibration_tokens < 1:
            raise BismoothError.of(
                f"--calibration-tokens {self.calibration_tokens}", "not positive", "give a number of tokens, like 16384"
            )
        if self.group_size is not None and (self.group_size < 32 or self.group_size % 32):
            raise BismoothError.of(
                f"--group-size {self.group_size}", "not a positive multiple of 32", "give one, like 128"
            )
        if self.group_budget is not None and not 0 <= self.group_budget <= 1:
            raise BismoothError.of(f"--group-budget {self.group_budget}", "outside 0 to 1", "give a share, 15% or 0.15")
        if self.target_kl is not None and not 0 < self.target_kl < inf:
            raise BismoothError.of(f"--target-kl {self.target_kl}", "not positive", "give nats a token, like 0.003")
        for field in PATTERNS:
            if (given := getattr(self, field)) is not None:
                object.__setattr__(self, field, _patterns(field, given))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields in which a stored recipe (a dict from recipe.json) differs from this one, as readable lines."""
        mine, stored = asdict(self), dict(other)
        for field in PATTERNS:
            if isinstance(given := stored.get(field), str | list):  # 0.1.0 stored a text
                stored[field] = patterns.split(map(str, given) if isinstance(given, list) else given)
        return [
            f"{key}: {_shown(stored.get(key))} there, {_shown(mine.get(key))} now"
            for key in sorted(mine.keys() | stored.keys())
            if mine.get(key) != stored.get(key)
        ]


def names_of_hashes(recipe: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, str]:
    """Hash -> what a person calls that which has it: the calibration file, and the source."""
    pairs = ((recipe.get(key), provenance.get(key)) for key in ("calibration", "source"))
    return {digest: name for digest, name in pairs if isinstance(digest, str) and isinstance(name, str)}


def option_of(field: str) -> str:
    """What the command calls a field."""
    return f"--{field.replace('_', '-')}"


def _number(field: str, value: Any, kind: type) -> Any:
    if field == "group_budget" and isinstance(value, str):
        try:
            return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            remedy = "write 15% or 0.15"
            raise BismoothError.of(f"{option_of(field)} {value}", f"{value!r} is no share", remedy) from None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        raise TypeError(f"{field} must be {'an integer' if kind is int else 'a number'}, not {value!r}")
    return kind(value)


def _patterns(field: str, given: Any) -> tuple[str, ...] | None:
    """Single patterns from a text, or several."""
    if not isinstance(given, str | list | tuple) or not all(isinstance(text, str) for text in given):
        raise TypeError(f"{field} must be a string or a list of strings, not {given!r}")
    single = patterns.split(given)
    for pattern in single:
        _check_pattern(option_of(field), pattern)
    return single or None


def _check_pattern(option: str, pattern: str) -> None:
    if not pattern.removeprefix("re:"):
        raise BismoothError.of(option, "one of its patterns is empty", "leave that one out, with its comma")
    if '"' in pattern or "'" in pattern:  # ["lm_head"], as an expression, is any one of these letters
        what = "has quotation marks, which no name has"
        raise BismoothError.of(f"{option} {pattern!r}", what, "write patterns without, with commas between them")
    try:
        patterns.found_by(pattern, ())
    except (re.error, OverflowError, RecursionError) as error:
        remedy = "mend it, or write \\ before a comma that is meant"
        raise BismoothError.of(f"{option} {pattern!r}", f"no regular expression ({error})", remedy) from None


def _holds_nothing(value: Any) -> bool:
    return isinstance(value, list | tuple) and not value


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else repr(value)


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
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        # Specific targets come first: readers stop at the first group that matches.
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": float_modules(source, ignored, recipe.head),
        "kv_cache_scheme": None,
        MARKER: {"version": version, "method": recipe.method},
    }
