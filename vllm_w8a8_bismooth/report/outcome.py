"""What a conversion did, as data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.measure import weights
from vllm_w8a8_bismooth.measure.granularity import Evidence
from vllm_w8a8_bismooth.measure.used import Used
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report.labels import Labels


@dataclass
class Outcome:
    """What a conversion did.

    Attributes:
        destination: the written folder.
        estimated_kl: to the source, in nats a token, as the evidence for granularity lets expect; ``None`` without any.
        granularity: what spoke for and against per-group scales, if that was measured.
        source_bytes, written_bytes: sizes of all tensors, as they are stored.
        quantized: how the source stores weights in FP8 or FP4; ``None`` if it does not.
        linears: full linear name -> ``group_size`` (``None`` = per-channel), ``column_error`` and ``sqnr`` in dB of
            what was written.
        ignored: full names of the linears that were left in float.
        already_float: full names of what the recipe ignores although it is never quantized: the head, routers, norms.
        floats: matrices inside the blocks that are never quantized, numbers as ``*`` -> why.
        sites: block index -> what was folded at each site. ``unread`` marks those inside experts that no calibration
            token was sent to: they were measured on what the others were given.
        files: shard -> SHA-256.
        beside: files that were copied from the source, by the names that they have in the result.
        used: what of the calibration text was really used; ``None`` is data-free.
        resumed: blocks that an earlier, interrupted run had done.
        reused: the destination already held this very conversion; what was done then is read back from it.
        labels: what its card says.
        relabelled: whether the card of a reused one was drawn up anew.
        part: its blocks, if a part was made; ``None`` is a whole checkpoint.
        blocks: how many the model has.
        left_out: files of the source that were not copied -> bytes.
        notes: what the user should know of the source.
        recipe: what was done; ``None`` until it is known.
    """

    destination: Path
    source_bytes: int = 0
    written_bytes: int = 0
    quantized: str | None = None
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    already_float: list[str] = field(default_factory=list)
    floats: dict[str, str] = field(default_factory=dict)
    sites: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    estimated_kl: float | None = None
    granularity: list[Evidence] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    used: Used | None = None
    resumed: int = 0
    reused: bool = False
    labels: Labels = Labels()
    relabelled: bool = False
    part: range | None = None
    blocks: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recipe: Recipe | None = None

    def calibration(self) -> dict[str, Any] | None:
        """What was used of the calibration text, and how, for JSON; ``None`` is data-free."""
        if self.used is None or self.recipe is None:
            return None
        return {**self.used.json(), "compute_dtype": self.recipe.compute_dtype}

    def unread(self) -> list[str]:
        """A sentence without its full stop on experts that no calibration token was sent to; none if there is none."""
        found = {i: [site["site"] for site in sites if site.get("unread")] for i, sites in self.sites.items()}
        some = [f"{name} in block {i}" for i, names in found.items() for name in names]
        if not some:
            return []
        which = ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")
        what = f"no calibration token was sent to the experts of the sites {which}"
        return [f"{what}: they were measured on what other experts were given; more text may reach them"]

    def vulnerable(self) -> list[str]:
        """Linears whose weights did not survive what was done to them, worst first."""
        bad = [(-entry["column_error"], name) for name, entry in self.linears.items()]
        return [name for error, name in sorted(bad) if -error > weights.VULNERABLE]
