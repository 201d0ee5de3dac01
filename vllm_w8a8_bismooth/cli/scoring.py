"""The verb ``score``, and what it shows."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_w8a8_bismooth.cli import display
from vllm_w8a8_bismooth.cli.arguments import path
from vllm_w8a8_bismooth.cli.progress import Progress, duration
from vllm_w8a8_bismooth.errors import BismoothError, refuse_empty
from vllm_w8a8_bismooth.shell import word

if TYPE_CHECKING:  # torch comes with it
    from rich.console import Console

    from vllm_w8a8_bismooth.scoring.result import Score
    from vllm_w8a8_bismooth.scoring.score import Preparation


def score(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="CKPT", help="Folder of a checkpoint for vLLM.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="The checkpoint that it was made from, a folder or org/name\\[@revision] on the Hub.",
            show_default="the one that its recipe.json names, if it is here",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|-",
            help="Text for both to predict, or rows of texts or chats (.txt, .jsonl, .json, .parquet, also .gz; - is "
            "what is piped in). Several files add up. Not the text of the calibration.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens taken from it.")] = 8192,
    window: Annotated[int, typer.Option(metavar="N", help="Tokens that are predicted in one go.")] = 512,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="In which vLLM computes: auto (each checkpoint's own), bfloat16, float32 or float16.",
        ),
    ] = "auto",
    tensor_parallel_size: Annotated[
        int, typer.Option(metavar="N", help="Over how many GPUs vLLM spreads each, as in vllm serve.")
    ] = 1,
    write_card: Annotated[
        bool, typer.Option("--write-card", help="Put the table into the checkpoint's README.md.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Compare a checkpoint's predictions with its source's, in vLLM: KL divergence, best tokens, perplexity.

    What the source predicts is kept for the next score; a run that was interrupted goes on.
    Exit codes: 0 scored, 2 could not be scored.
    """
    from vllm_w8a8_bismooth import given
    from vllm_w8a8_bismooth.scoring.score import run

    ready = given.prepare_score(folder, against, _files(text), tokens, window, dtype, tensor_parallel_size, write_card)
    console = display.console(stderr=True)
    _beforehand(console, ready)
    with Progress(console) as progress:
        found = run(ready, progress)
    _afterwards(console, found, write_card)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _table(found)


def _files(given: list[str] | None) -> list[str]:
    for file in given or []:
        refuse_empty("--text", file, "give a file, or - for what is piped in")
    if (given or []).count("-") > 1:
        raise BismoothError.of("--text -", "given twice, and can be read once", "leave out one of the two")
    return given or []


def _beforehand(console: "Console", ready: "Preparation") -> None:
    """What the disk is needed for, before minutes are spent."""
    count, length = ready.windows.tokens.shape
    kept = f", {ready.kept} of them kept from an earlier run" if ready.kept else ""
    console.print(
        f"{count} windows of {length} tokens{kept}; up to {ready.nbytes / 1e9:.2f} GB go to {ready.root}", markup=False
    )


def _afterwards(console: "Console", found: "Score", written: bool) -> None:
    from rich.markup import escape

    for note in found.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}.", highlight=False)
    if written:
        console.print(f"The table is in {found.folder / 'README.md'}", markup=False)
    console.print(
        f"Took {duration(found.seconds)}. The source's scores stay for the next run, until: rm -r {word(found.store)}",
        markup=False,
    )


def _table(found: "Score") -> None:
    """The table on stdout: it is what was asked for."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vllm_w8a8_bismooth.scoring import table

    console = Console(width=None if sys.stdout.isatty() else 160, emoji=False, highlight=False)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column(f"{escape(str(found.folder))} against {escape(str(found.source))}", overflow="fold")
    shown.add_column("", justify="right", no_wrap=True)
    shown.add_column("95 % confidence", justify="right", no_wrap=True)
    for row in table.rows(found):
        shown.add_row(*row)
    console.print(shown)
    for sentence in filter(None, (table.worst(found), table.basis(found))):
        console.print(f"{sentence}.", markup=False, soft_wrap=True)
