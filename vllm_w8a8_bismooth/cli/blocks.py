"""How a model's blocks, and the sites in them, are shown to people."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_w8a8_bismooth.model.kinds import Kind

_WIDE = 160


def show(console: "Console", found: Sequence["Kind"]) -> None:
    """What the blocks of each kind hold, and their sites."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vllm_w8a8_bismooth.model.kinds import in_words

    wide = Console(width=None if sys.stdout.isatty() else _WIDE, emoji=False)
    for kind in found:
        experts = f", {kind.experts} experts" if kind.experts else ""
        console.print(f"[bold]{_blocks(kind.blocks)}[/bold]{experts}")
        linears = ", ".join(f"{name} {rows} x {columns}" for name, (rows, columns) in kind.linears.items())
        console.print(f"  INT8: {escape(linears or 'nothing')}")
        why: dict[str, list[str]] = {}
        for name, reason in kind.floats.items():
            why.setdefault(reason, []).append(name)
        for reason, names in why.items():
            console.print(f"  float: {escape(', '.join(names))} ({escape(reason)})")
        if not kind.sites:
            console.print("  no sites")
            continue
        table = Table(box=None, padding=(0, 2))
        for heading in ("site", "producer", "consumers", "rows and columns"):
            table.add_column(heading, overflow="fold")
        for site in kind.sites:
            rows = kind.linears[site.producer][0] if site.producer in kind.linears else None
            cells = (site.name, site.producer, ", ".join(site.consumers), in_words(site, rows))
            table.add_row(*map(escape, cells))
        wide.print(table)


def counted(number: int, thing: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _blocks(numbers: Sequence[int]) -> str:
    """``blocks 0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
    return f"block{'' if len(numbers) == 1 else 's'} {shown}"
