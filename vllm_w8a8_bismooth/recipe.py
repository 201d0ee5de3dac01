"""Every choice of a conversion, as frozen data, and the part of it that goes into the checkpoint's config.json."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_w8a8_bismooth import FORMAT, MARKER
from vllm_w8a8_bismooth.checkpoint.architectures import Layer
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.checkpoint.names import Names
from vllm_w8a8_bismooth.errors import BismoothError

SMOOTHINGS = ("balanced", "alpha")
ALPHA = 0.5
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"ignore": None},
    "bismooth": {
        "smoothing": "balanced",
        "alpha": None,
        "calibration_tokens": 16384,
        "group_size": None,
        "group_layers": None,
        "ignore": None,
    },
    "mixed": {"group_size": 128, "group_layers": None, "ignore": None},
    "auto": {
        "smoothing": "balanced",
        "alpha": None,
        "calibration_tokens": 16384,
        "group_size": 128,
        "group_budget": 0.03,
        "ignore": None,
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
        calibration_tokens: token budget of the calibration (``bismooth``, ``auto``).
        group_size: columns per scale in per-group linears.
        group_layers: regular expression on full linear names; ``None`` lets the weights decide (``mixed``).
        group_budget: share of the linears that may get per-group scales, 0 to 1 (``auto``).
        ignore: regular expression on full names of linears that keep the source's dtype; ``None`` is none.
        source: fingerprint of the source checkpoint, once it is open.
        calibration: SHA-256 of the calibration file; ``None`` is data-free.

    Raises:
        BismoothError: a value is out of range, or an option does not go with the method.
    """

    method: str
    smoothing: str | None = None
    alpha: float | None = None
    calibration_tokens: int | None = None
    group_size: int | None = None
    group_layers: str | None = None
    group_budget: float | None = None
    ignore: str | None = None
    source: str | None = None
    calibration: str | None = None

    @classmethod
    def of(cls, method: str, **given: Any) -> "Recipe":
        """A recipe from what a user gave (``None`` = not given) and the method's defaults."""
        if method not in DEFAULTS:
            raise BismoothError.of(f"--method {method!r}", "unknown", f"choose one of {', '.join(DEFAULTS)}")
        given = {key: value for key, value in given.items() if value is not None}
        for key in given:
            if key not in DEFAULTS[method]:
                option = f"--{key.replace('_', '-')}"
                raise BismoothError.of(f"--method {method}", f"{option} has no effect", "leave it out")
        options = {**DEFAULTS[method], **given}
        if options.get("smoothing") == "alpha":
            options["alpha"] = options["alpha"] if options["alpha"] is not None else ALPHA
        elif "alpha" in given:
            remedy = "leave it out, or say --smoothing alpha"
            raise BismoothError.of("--smoothing balanced", "--alpha has no effect", remedy)
        if method == "bismooth" and (options["group_size"] is None) != (options["group_layers"] is None):
            what = "needs both --group-layers and --group-size, or neither"
            raise BismoothError.of("--method bismooth", what, "give the other one too")
        return cls(method, **options)

    def __post_init__(self) -> None:
        if self.smoothing not in (None, *SMOOTHINGS):
            raise BismoothError.of(
                f"--smoothing {self.smoothing!r}", "unknown", f"choose one of {', '.join(SMOOTHINGS)}"
            )
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
            raise BismoothError.of(f"--group-budget {self.group_budget}", "outside 0 to 1", "give a share, 3% or 0.03")
        for option, pattern in {"--group-layers": self.group_layers, "--ignore": self.ignore}.items():
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise BismoothError.of(f"{option} {pattern!r}", f"no regular expression ({error})", "mend it") from None

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields in which a stored recipe (a dict from recipe.json) differs from this one, as readable lines."""
        mine = asdict(self)
        return [
            f"{key}: {other.get(key)!r} there, {mine.get(key)!r} now"
            for key in sorted(mine.keys() | other.keys())
            if mine.get(key) != other.get(key)
        ]


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
    Experts are named by any number, as a block's are chosen together.

    Args:
        chosen: names of linears inside each block, closed under fusion.
        layers: those of the same blocks, for the fused names.
        names: of the checkpoint; transformers calls the blocks of a bare decoder as it does, vLLM as a causal LM's.
    """
    where: dict[str, list[int]] = {}
    for index, (linears, layer) in enumerate(zip(chosen, layers, strict=True)):
        unit_of = {part: (fused, *parts) for fused, parts in layer.fused.items() for part in parts}
        units = {"|".join(map(re.escape, sorted(unit_of.get(name, (name,))))) for name in linears}
        for unit in {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", unit) for unit in units}:
            where.setdefault(unit, []).append(index)
    blocks = _blocks(names)
    return [rf"re:{blocks}\.({'|'.join(map(str, indices))})\.({unit})$" for unit, indices in sorted(where.items())]


def _blocks(names: Names) -> str:
    """A regular expression for what the name of a tensor in any block begins with."""
    return r".*\.layers" if names.trunk else r"(.*\.)?layers"


def _of_any_number(module: str) -> str:
    """A module's name, or an expression for all whose names differ from it in numbers alone."""
    parts = module.split(".")
    if not any(part.isdigit() for part in parts):
        return module
    return "re:" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts) + "$"


def float_modules(source: Layout, ignored: Sequence[set[str]]) -> list[str]:
    """What stays in float: heads and other matrices outside the blocks, the routers of mixtures, and ``ignored``.

    vLLM quantizes what is not named here, also the head of a classifier, and blocks that predict further tokens.
    """
    routers = sorted({router for layer in source.layers for router in layer.routers})
    places = {module: source.names.inside(module) for module in source.floats()}
    beyond = sorted({place[0] for place in places.values() if place})
    heads = [module for module, place in places.items() if place is None]
    outside = sorted({_of_any_number(module) for module in heads} - {"lm_head"})
    if any(module.rpartition(".")[2].isdigit() for module in heads):
        outside.append("re:^$")  # vLLM gives the parts of a reward model's head no names
    if beyond:
        outside.append(rf"re:{_blocks(source.names)}\.({'|'.join(map(str, beyond))})\..*$")
    return [
        "lm_head",
        *outside,
        *(rf"re:{_blocks(source.names)}\.\d+\.{re.escape(router)}$" for router in routers),
        *expressions(ignored, source.layers, source.names),
    ]


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
    if any(g | i != set(layer.linears) for g, i, layer in zip(grouped, ignored, layers, strict=True)):
        groups.append(_group(["Linear"], None))
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        # Specific targets come first: readers stop at the first group that matches.
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": float_modules(source, ignored),
        "kv_cache_scheme": None,
        MARKER: {"version": version, "method": recipe.method},
    }
