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
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder of a converted checkpoint.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="SRC", help="The checkpoint that it was made from: compare weights and function with it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Check a converted checkpoint: config, tensors, values, hashes, vLLM's reading of it, and its source.

    Exit codes: 0 nothing wrong, 1 faults (all are listed), 2 nothing there to check.
    """
    from rich.console import Console

    from vllm_w8a8_bismooth.verify import verify as run

    console = Console(stderr=True, soft_wrap=True)
    with _Progress(console) as progress:
        found = run(folder, against, progress)
    if as_json:
        print(json.dumps(_verification(found), indent=2))
    else:
        _findings(console, found)
    raise typer.Exit(0 if found.ok else 1)


class _Progress:
    """One bar a stage, with ETA, on a terminal; a line a stage elsewhere."""

    def __init__(self, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
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
            self.tasks[stage] = self.bars.add_task(stage, total=total, unit="shards" if stage == "read" else "blocks")
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
    console.print(
        f"Wrote [bold]{where}[/bold]: {report.source_bytes / 1e9:.3f} GB -> {report.written_bytes / 1e9:.3f} GB, "
        f"{len(report.linears) - grouped} linears per-channel, {grouped} per-group."
    )
    bad = report.vulnerable()
    if bad:
        worst = ", ".join(f"{escape(n)} ({report.linears[n]['column_error']:.2f})" for n in bad[:5])
        console.print(
            f"[yellow]Warning:[/yellow] {len(bad)} linears lose their weights to outlier columns "
            f"(mean column error; healthy is about 0.01): {worst}{', ...' if len(bad) > 5 else ''}. "
            + (
                "Try --method bismooth or mixed."
                if not recipe.group_size
                else f"Try a --group-size under {recipe.group_size}, or --method bismooth."
                if recipe.group_size > 32
                else "Try --method bismooth."
            )
        )
    console.print(f"Next: vllm serve {where}")


def _verification(found) -> dict:
    return {
        "ok": found.ok,
        "findings": [vars(finding) for finding in found.findings],
        "notes": found.notes,
        "linears": found.linears,
    }


def _findings(console, found) -> None:
    from rich.markup import escape
    from rich.table import Table

    measured = sorted((entry["sqnr"], name) for name, entry in found.linears.items() if entry["sqnr"] is not None)
    if measured:
        table = Table("linear", "dB", "scales", title="Worst linears, weights against the source's")
        for sqnr, name in measured[:5]:
            group_size = found.linears[name]["group_size"]
            table.add_row(escape(name), f"{sqnr:.1f}", "per-channel" if group_size is None else f"g = {group_size}")
        console.print(table)
    for note in found.notes:
        console.print(f"Note: {escape(note)}.")
    for finding in found.findings:
        console.print(
            f"[red]Fault:[/red] [bold]{escape(finding.where)}[/bold]: {escape(finding.what)}. "
            f"{escape(finding.remedy[:1].upper() + finding.remedy[1:])}."
        )
    where, count = escape(str(found.folder)), len(found.findings)
    if count:
        console.print(f"[bold]{where}[/bold]: {count} fault{'s' if count > 1 else ''} found.")
    else:
        console.print(f"[bold]{where}[/bold]: {len(found.linears)} INT8 linears, nothing wrong.")


def main() -> None:
    """Console entry point: bad input ends with one message on stderr and exit code 2."""
    # torch reads it when it is imported: huge pages, because faulting in small ones takes longer than the work on them
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except (BismoothError, OSError) as error:  # OSError says which file and why: a name too long, no permission
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
