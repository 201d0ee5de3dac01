"""What ``bismooth analyze`` shows to people, and the JSON that it gives to programs."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_w8a8_bismooth.shell import word

if TYPE_CHECKING:  # torch comes with it, and it is imported inside commands
    from vllm_w8a8_bismooth.measure import weights


def analysis_json(found: "weights.Analysis") -> dict[str, Any]:
    return {
        "vulnerable": found.vulnerable(),
        "vulnerable_share": found.share(),
        "grouped": found.grouped,
        "linears": {name: {**asdict(m), "reason": m.reason()} for name, m in found.linears.items()},
    }


def analysis(
    found: "weights.Analysis", source: str, group_size: int | None, top: int, calibration: Sequence[str] = ()
) -> None:
    """The table on stdout: it is what was asked for; ``calibration`` is the text that was given."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
    bad = found.vulnerable()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("linear", overflow="fold")
    for heading in ("column\nerror", "SQNR,\ndB", "columns,\nx median", "rows,\nx median"):
        table.add_column(heading, justify="right", no_wrap=True)
    sizes = sorted({size for m in found.linears.values() for size in m.groups}, reverse=True)
    for size in sizes:
        table.add_column(f"error\ng = {size}", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for name in found.ranked()[:top]:
        m = found.linears[name]
        table.add_row(
            name,
            f"{m.column_error:.4f}",
            "exact" if m.sqnr is None else f"{m.sqnr:.1f}",
            f"{m.columns.ratio:.1f}",
            f"{m.rows.ratio:.1f}",
            *(f"{m.groups[size]:.4f}" if size in m.groups else "" for size in sizes),
            m.reason(),
            style="red" if m.vulnerable() else None,
        )
    console.print(table)
    if len(bad) > top:
        console.print(
            f"... and {len(bad) - top} more that are vulnerable; --top {len(bad)} shows them.", highlight=False
        )
    console.print(
        f"\n{len(bad)} of {len(found.linears)} linears are vulnerable, {found.share():.1%} of the linears' parameters.",
        style="bold",
        highlight=False,
    )
    for line in _advice(found, source, group_size, calibration or ["text.txt"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def perturbation(found: Mapping[str, Mapping[str, float]], top: int) -> None:
    """The table of ``analyze --calibration`` on stdout: where output error comes from, worst units first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("linear as served", overflow="fold")
    variants = list(next(iter(found.values())))
    for variant in variants:
        table.add_column(variant.replace("_", "\n"), justify="right", no_wrap=True)
    totals = {variant: sum(errors[variant] for errors in found.values()) for variant in variants}
    for unit in sorted(found, key=lambda unit: -found[unit][variants[-1]])[:top]:
        table.add_row(unit, *(f"{found[unit][variant]:.2e}" for variant in variants))
    table.add_section()
    table.add_row(f"sum of {len(found)}", *(f"{totals[variant]:.2e}" for variant in variants), style="bold")
    console.print(table)
    console.print(
        "Squared change of the block's output relative to its size when the linear alone is quantized (weights, "
        "activations, or both), before and after smoothing.",
        highlight=False,
        soft_wrap=True,
    )


def _advice(
    found: "weights.Analysis", source: str, group_size: int | None, calibration: Sequence[str]
) -> Iterator[str]:
    from vllm_w8a8_bismooth.measure.weights import VULNERABLE

    if not found.vulnerable():
        yield "The weights need no repair; the activations, which they do not show, still gain from smoothing:"
    else:
        yield "Repair by smoothing, which helps every linear:"
    options = " ".join(f"--calibration {file if file == '-' else word(file)}" for file in calibration)
    yield f"  bismooth convert {word(source)} DST {options}"
    if not found.grouped:
        return
    siblings = len(set(found.grouped) - set(found.vulnerable()))
    others = f", {siblings} of them because vLLM serves them alike" if siblings else ""
    which = f"{len(found.grouped)} linears{others}"
    repair = found.repair()
    if repair is None:
        what = f"K of a vulnerable linear, or of one served like it, is not a multiple of {group_size or 32}"
        yield f"Per-group scales do not fit: {what}."
    elif repair[1] <= VULNERABLE:
        yield f"Or by per-group scales on {which}, which would leave them a column error of {repair[1]:.3f} at most:"
        yield f"  bismooth convert {word(source)} DST --method mixed --group-size {repair[0]}"
    else:
        yield (
            f"Per-group scales of {repair[0]} on {which} (--method mixed) are not enough: "
            f"they would leave a column error of up to {repair[1]:.2f}; above {VULNERABLE} is vulnerable."
        )
