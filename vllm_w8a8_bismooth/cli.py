"""The ``bismooth`` command. The only module that prints; torch and transformers are imported inside commands."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.errors import BismoothError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _version(asked: bool) -> None:
    if asked:
        print(f"bismooth {__version__}")
        raise typer.Exit


@app.callback()
def bismooth(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """W8A8 INT8 checkpoints for vLLM that survive outlier columns, as in LLaMA3-70B."""


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a Hugging Face checkpoint (safetensors).")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist yet.")],
    method: Annotated[
        str,
        typer.Option(
            help="rtn: round as is. bismooth: balance weights and activations, per-channel throughout. "
            "mixed: per-group scales for vulnerable linears."
        ),
    ] = "bismooth",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|none", help='Text (.txt, or .jsonl with "text") for bismooth; none = data-free, the default.'
        ),
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Tokens taken from it.", show_default="16384")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of the activation range moved into the weights.", show_default="0.5")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns per scale in per-group linears.", show_default="128 for mixed")
    ] = None,
    group_layers: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Linears to make per-group, instead of finding them from the weights."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where blocks are worked on: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Convert a LLaMA, Mistral, Qwen2 or Qwen3 checkpoint to INT8 (compressed-tensors).

    Then: [bold]vllm serve DST[/bold]
    """
    from rich.console import Console

    from vllm_w8a8_bismooth import calibrate
    from vllm_w8a8_bismooth.convert import convert as run
    from vllm_w8a8_bismooth.recipe import Recipe

    console = Console(stderr=True, soft_wrap=True)  # paths and commands stay copyable
    text = None
    if calibration not in (None, "none"):
        if method != "bismooth":
            raise BismoothError(f"--calibration has no effect with --method {method}; leave it out")
        text = calibrate.read_text(Path(calibration))
    elif calibration_tokens is not None:
        raise BismoothError("--calibration-tokens has no effect without --calibration FILE; leave it out")
    recipe = Recipe.of(
        method, alpha=alpha, calibration_tokens=calibration_tokens, group_size=group_size, group_layers=group_layers
    )
    with _Progress(console) as progress:
        report = run(source, destination, recipe, text, device, progress)
    if as_json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _summary(console, report, recipe)


@app.command()
def analyze(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a Hugging Face checkpoint (safetensors).")],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Also measure what per-group scales of this size would leave.",
            show_default="256, 128, 64, 32 on vulnerable linears, until one repairs",
        ),
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the weights and errors as SVG.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    device: Annotated[str, typer.Option(help="Where weights are worked on: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured as JSON on stdout.")] = False,
) -> None:
    """Measure what INT8 does to each linear, from the weights alone, and say which are vulnerable and why."""
    import torch
    from rich.console import Console

    from vllm_w8a8_bismooth import figures as drawing
    from vllm_w8a8_bismooth.analyze import survey
    from vllm_w8a8_bismooth.recipe import Recipe
    from vllm_w8a8_bismooth.source import Source

    if group_size is not None:
        Recipe.of("mixed", group_size=group_size)  # the same bounds
    if figures is not None:
        drawing.require()
    console = Console(stderr=True, soft_wrap=True)
    with _Progress(console) as progress:
        found = survey(Source(source), torch.device(device), group_size, progress)
    if as_json:
        print(json.dumps({"source": str(source), **_survey_as_json(found)}, indent=2))
    else:
        _print_survey(found, str(source), group_size, top)
    for path in drawing.of_survey(found, figures) if figures is not None else []:
        console.print(f"Drew {path}", markup=False)


def _survey_as_json(found) -> dict:
    from dataclasses import asdict

    return {
        "vulnerable": found.vulnerable(),
        "vulnerable_share": found.share(),
        "grouped": found.grouped,
        "linears": {name: {**asdict(m), "reason": m.reason()} for name, m in found.linears.items()},
    }


def _print_survey(found, source: str, group_size: int | None, top: int) -> None:
    """The table on stdout: it is what was asked for."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
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
    for line in _advice(found, source, group_size):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _advice(found, source: str, group_size: int | None):
    from vllm_w8a8_bismooth.analyze import VULNERABLE

    if not found.vulnerable():
        yield "The weights need no repair; the activations, which they do not show, still gain from smoothing:"
    else:
        yield "Repair by smoothing, which helps every linear:"
    yield f"  bismooth convert {source} DST --calibration text.txt"
    if found.experts:
        yield f"Only this helps {len(found.experts)} of them: experts are served per-channel."
    if not found.grouped:
        return
    siblings = len(set(found.grouped) - set(found.vulnerable()))
    which = f"{len(found.grouped)} linears" + (f", {siblings} of them as fused siblings" if siblings else "")
    repair = found.repair()
    if repair is None:
        yield f"Per-group scales do not fit: a vulnerable linear's K is not a multiple of {group_size or 32}."
    elif repair[1] <= VULNERABLE:
        yield f"Or by per-group scales on {which}, which would leave them a column error of {repair[1]:.3f} at most:"
        yield f"  bismooth convert {source} DST --method mixed --group-size {repair[0]}"
    else:
        yield (
            f"Per-group scales of {repair[0]} on {which} (--method mixed) are not enough: "
            f"they would leave a column error of up to {repair[1]:.2f}; above {VULNERABLE} is vulnerable."
        )


class _Progress:
    """One bar a stage, with ETA, on a terminal; a line a stage elsewhere."""

    def __init__(self, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("blocks"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self.tasks: dict = {}

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.tasks:
            self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.bars.start()  # not before there is something to show; again has no effect
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total)
        self.bars.update(self.tasks[stage], completed=done)


def _as_json(report) -> dict:
    return {
        "destination": str(report.destination),
        "reused": report.reused,
        "source_bytes": report.source_bytes,
        "written_bytes": report.written_bytes,
        "vulnerable": report.vulnerable(),
        "linears": report.linears,
        "sites": report.sites,
    }


def _summary(console, report, recipe) -> None:
    from rich.markup import escape

    where = escape(str(report.destination))
    if report.reused:
        console.print(f"[bold]{where}[/bold] already holds this conversion; nothing to do.")
        return
    grouped = sum(entry["group_size"] is not None for entry in report.linears.values())
    share = report.written_bytes / report.source_bytes
    console.print(
        f"Wrote [bold]{where}[/bold]: {report.source_bytes / 1e9:.3f} GB -> {report.written_bytes / 1e9:.3f} GB "
        f"({share:.0%}), {len(report.linears) - grouped} linears per-channel, {grouped} per-group."
    )
    console.print("Mean relative error that is left in a column (healthy is about 0.01), the worst five linears:")
    for name in sorted(report.linears, key=lambda name: (-report.linears[name]["column_error"], name))[:5]:
        console.print(f"  {report.linears[name]['column_error']:.4f}  {escape(name)}", highlight=False)
    if bad := report.vulnerable():
        console.print(
            f"[yellow]Warning:[/yellow] {len(bad)} linears lose their weights to outlier columns. "
            + (
                "Try --method bismooth or mixed."
                if not recipe.group_size
                else f"Try a --group-size under {recipe.group_size}, or --method bismooth."
                if recipe.group_size > 32
                else "Try --method bismooth."
            )
        )
    console.print(f"Next: bismooth verify {where}\n      vllm serve {where}", highlight=False)


def main() -> None:
    """Console entry point: bad input ends with one message on stderr and exit code 2."""
    # torch reads it when it is imported: huge pages, because faulting in small ones takes longer than the work on them
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except (BismoothError, OSError) as error:  # OSError says which file and why: a name too long, no permission
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
