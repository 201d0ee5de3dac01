"""Who serves which linear, by what was timed: plain data, the rule, and the form that is stored.

A linear is served by one kernel whatever its batch, because vLLM's rounds in another order than ours: a choice by the
number of tokens would have a token depend on its batch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from vllm_w8a8_bismooth.ops import COMPILED, REFERENCE, TRITON

STOCK = "stock"
"""vLLM's own kernel, beside those of :mod:`ops`."""
KERNELS = STOCK, COMPILED, TRITON, REFERENCE
"""Between equals, the first serves."""
ACTIVATIONS = "token", "group", "tensor"
WEIGHTS: Mapping[int, float] = MappingProxyType(
    {tokens: min(1.0, 256 / tokens) for tokens in (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)}
)
"""Tokens of a call -> how often it counts.

Up to about 256 tokens a call takes the time in which the weights are read, beyond that the time of its arithmetic,
which is proportional to the tokens. So by these weights each count of tokens has about the same part in the sum: six
of decoding, five of prompts.
"""
LEAD = 0.03
"""What ours must save of vLLM's time to take its place: more than two measurements of one kernel differ by."""

Seconds = Mapping[str, Mapping[int, float]]
"""Kernel -> tokens -> seconds of a call."""


class Shape(NamedTuple):
    """A kind of linear.

    Attributes:
        rows, columns: N and K of its weight on one rank.
        groups: weight scales of a row; 1 is per-channel.
        activations: what shares an activation scale, one of :data:`ACTIVATIONS`: a token, a group of its channels, or
            the whole tensor, whose scale is fixed.
    """

    rows: int
    columns: int
    groups: int = 1
    activations: str = "token"

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.rows} x {self.columns}{groups}, activations per {self.activations}"


def total(times: Mapping[int, float]) -> float | None:
    """The weighted sum over all of :data:`WEIGHTS`, seconds; ``None`` if one is missing or is no time."""
    if not all(tokens in times and math.isfinite(times[tokens]) and times[tokens] > 0 for tokens in WEIGHTS):
        return None
    return math.fsum(weight * times[tokens] for tokens, weight in WEIGHTS.items())


def fastest(seconds: Seconds) -> str | None:
    """The kernel that serves a linear; ``None`` if none was timed whole.

    vLLM's own, unless another is faster by :data:`LEAD`; without it, the fastest.
    """
    totals = {kernel: sum_ for kernel in KERNELS if (sum_ := total(seconds.get(kernel, {}))) is not None}
    if not totals:
        return None
    best = min(totals, key=totals.__getitem__)
    return STOCK if STOCK in totals and totals[best] > (1 - LEAD) * totals[STOCK] else best


@dataclass(frozen=True)
class Entry:
    """What is known of a linear.

    Attributes:
        seconds: of the kernels that were timed.
        given: the kernel that somebody wrote down for it, whatever the times.
    """

    seconds: Seconds = field(default_factory=dict)
    given: str | None = None

    @property
    def kernel(self) -> str | None:
        """Who serves it; ``None`` is open."""
        return self.given or fastest(self.seconds)

    def words(self) -> str:
        """Why, in one line."""
        totals = {kernel: sum_ for kernel in KERNELS if (sum_ := total(self.seconds.get(kernel, {}))) is not None}
        times = ", ".join(f"{kernel} {sum_ * 1e6:.4g} us" for kernel, sum_ in totals.items())
        return f"{'given' if self.given else 'measured'}: {times or 'nothing'}" if times or not self.given else "given"


@dataclass(frozen=True)
class Plan:
    """Who serves which linear on a device.

    Attributes:
        entries: by shape.
        holds_for: the versions and the device that it was made with; ``None`` is any.
    """

    entries: Mapping[Shape, Entry] = field(default_factory=dict)
    holds_for: Mapping[str, Any] | None = None

    def kernel(self, shape: Shape) -> str | None:
        """Who serves a linear; ``None`` if the plan does not say."""
        entry = self.entries.get(shape)
        return entry.kernel if entry else None

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes; each shape with its kernel, ``null`` if that is open."""
        rows = [
            shape._asdict()
            | {"kernel": entry.given}
            | {"measured": fastest(entry.seconds)}
            | {"seconds": {kernel: {str(m): s for m, s in times.items()} for kernel, times in entry.seconds.items()}}
            for shape, entry in sorted(self.entries.items())
        ]
        return {"holds_for": self.holds_for, "shapes": rows}

    @classmethod
    def from_json(cls, stored: Any) -> "Plan":
        """Reads a plan. Of a shape, ``rows`` and ``columns`` must be there, and ``kernel`` or ``seconds``.

        Raises:
            ValueError: it is none; the message says what is wrong with it.
        """
        if not isinstance(stored, Mapping) or not isinstance(stored.get("shapes"), list):
            raise ValueError("it is no object with a list of shapes")
        if not isinstance(holds_for := stored.get("holds_for"), Mapping | None):
            raise ValueError("holds_for is no object")
        entries = {}
        for number, row in enumerate(stored["shapes"]):
            try:
                shape, entry = _entry(row)
            except ValueError as error:
                raise ValueError(f"shape {number}: {error}") from None
            if shape in entries:
                raise ValueError(f"shape {number}: {shape} is there twice")
            entries[shape] = entry
        return cls(entries, holds_for)


def _entry(row: Any) -> tuple[Shape, Entry]:
    if not isinstance(row, Mapping):
        raise ValueError("it is no object")
    if unknown := set(row) - {*Shape._fields, "kernel", "measured", "seconds"}:
        raise ValueError(f"{min(unknown)!r} is unknown")
    shape = Shape(row.get("rows", 0), row.get("columns", 0), row.get("groups", 1), row.get("activations", "token"))
    if not all(type(number) is int and number > 0 for number in shape[:3]):
        raise ValueError("rows, columns and groups must be positive integers")
    if shape.activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}")
    given, seconds = row.get("kernel"), row.get("seconds", {})
    if given is not None and given not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}")
    try:
        seconds = {kernel: {int(m): float(s) for m, s in times.items()} for kernel, times in seconds.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError("seconds must have numbers by tokens by kernel") from None
    if unknown := set(seconds) - set(KERNELS):
        raise ValueError(f"seconds: {min(unknown)!r} is no kernel; expected {', '.join(KERNELS)}")
    return shape, Entry(seconds, given)


def load(path: Path) -> Plan:
    """Reads the plan that somebody gives: its form alone, or a file of the cache, which has it beside its key.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    try:
        stored = json.loads(path.read_text())
        kept = isinstance(stored, Mapping) and {*stored} == {"key", "plan"}
        return Plan.from_json(stored["plan"] if kept else stored)
    except (OSError, ValueError) as error:  # a JSON error is a ValueError
        raise ValueError(f"{path} is no plan of kernels: {error}") from None
