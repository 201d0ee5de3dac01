"""Every choice of a conversion, as frozen data."""

import numbers
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from vllm_w8a8_bismooth import grouping, patterns
from vllm_w8a8_bismooth.errors import BismoothError

SMOOTHINGS = ("balanced", "alpha")
ROUNDINGS = ("nearest", "gptq")
COMPUTE_DTYPES = AUTO, FP32, BF16 = ("auto", "float32", "bfloat16")
"""The latter two are torch's names."""
FLOAT, INT8 = "float", "int8"
"""What the language model's head can be."""
_NUMBERS = {
    "alpha": float,
    "bits": float,
    "calibration_tokens": int,
    "group_size": int,
    "group_budget": float,
    "target_kl": float,
}
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
FEWEST_BITS, MOST_BITS = 4.125, 8.0
"""Of a weight of the decoder's linears, on average, where some of their rows have four."""
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
        "bits": None,
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
        bits: of a weight of the linears, on average, scales and all: rows have four or eight (``bismooth``), see
            :mod:`fourbits`. ``None`` is INT8.
        group_size: columns per scale in per-group linears, or per step and offset of 4-bit rows. ``auto`` and ``bits``
            take 128, 64 or 32, the largest that fits all linears, once the source is open.
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
    bits: float | None = None
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
        if options.get("bits") is not None and options["group_layers"] is not None:
            what = "4-bit rows have one scale each, and per-group linears eight bits"
            raise BismoothError.of("--bits and --group-layers", what, "leave out one of the two")
        grouped = method == "bismooth" and options["bits"] is None
        if grouped and (options["group_size"] is None) != (options["group_layers"] is None):
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
        _check_bits(self.bits, self.group_size)
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


def _check_bits(bits: float | None, group_size: int | None) -> None:
    if bits is None:
        return
    if not FEWEST_BITS <= bits <= MOST_BITS:
        what = f"outside {FEWEST_BITS:g} to {MOST_BITS:g}"
        raise BismoothError.of(f"--bits {bits:g}", what, "give an average, like 4.5")
    if group_size not in (None, *grouping.OF_FOUR_BITS):
        what = "no size of groups of 4-bit rows"
        remedy = f"give one of {', '.join(map(str, grouping.OF_FOUR_BITS))}"
        raise BismoothError.of(f"--bits and --group-size {group_size}", what, remedy)


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
