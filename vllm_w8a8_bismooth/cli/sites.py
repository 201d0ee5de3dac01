"""The verb ``sites``, and the option ``--sites`` of those that take what it prints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_w8a8_bismooth.cli import blocks, display
from vllm_w8a8_bismooth.cli.arguments import TrustOption, path
from vllm_w8a8_bismooth.cli.blocks import counted
from vllm_w8a8_bismooth.cli.progress import Progress, duration
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.shell import word

if TYPE_CHECKING:  # torch comes with them
    from rich.console import Console

    from vllm_w8a8_bismooth.conversion.sites import Sites
    from vllm_w8a8_bismooth.discovery.record import Proof

GivenOption = Annotated[
    Path | None,
    typer.Option(
        "--sites",
        parser=path,
        metavar="FILE",
        help="A record of the model's sites, as bismooth sites prints it, perhaps edited; it is proven before it is "
        "used.",
        show_default="found out",
    ),
]


def sites(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder of a Hugging Face checkpoint, a config.json, or org/name\\[@revision] on the Hub.",
        ),
    ],
    given: GivenOption = None,
    trust_remote_code: TrustOption = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", parser=path, metavar="FILE", help="Write the record there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")] = False,
) -> None:
    """Find out from a config alone where magnitude can move in a model, and prove it; no weights are read.

    What is printed as JSON can be edited and given to [bold]bismooth convert --sites FILE[/bold].
    """
    from vllm_w8a8_bismooth import api

    if output is not None and output.exists():
        raise BismoothError.of(output, "exists", "choose another name, or remove it")
    with Progress(display.console(stderr=True)) as progress:
        found = api.sites(source, sites=given, trust_remote_code=trust_remote_code, progress=progress)
    text = json.dumps(found.record.to_json(), indent=None)
    if output is not None:
        output.write_text(f"{text}\n")
    if as_json:
        print(text)
    else:
        show(display.console(), found, given, output)


def show(console: "Console", found: "Sites", given: Path | None, output: Path | None) -> None:
    """All of a record for people, on stdout."""
    from rich.markup import escape

    record = found.record
    console.print(f"[bold]{escape(found.source)}[/bold]: {escape(record.model_type)}, {len(record.blocks)} blocks")
    blocks.show(console, found.kinds)
    by = "This is the given record." if given is not None else "A conversion goes by this."
    for line in (*_proof(record.proof, record.seconds), by):
        console.print(line, markup=False)
    if output is not None:
        console.print(f"Wrote {word(output)}. Next: bismooth convert SRC DST --sites {word(output)}", markup=False)


def _proof(proof: "Proof", seconds: float) -> Iterator[str]:
    factors = " and ".join(map(str, proof.factors))
    yield (
        f"Proven on {proof.blocks} blocks with widths divided by {factors}, in fp64: all sites at once change blocks "
        f"by {proof.output:.1g} ({proof.large:.1g} with large weights"
        + (f", {proof.resized:.1g} at the other size" if proof.resized is not None else "")
        + f") and the logits by {proof.logits:.1g}, with {counted(len(proof.seeds), 'seed')} and texts of "
        f"{' and '.join(map(str, proof.lengths))} tokens; "
        + (f"it took {duration(seconds)}." if seconds else "kept from an earlier run.")
    )
    for place, why in proof.dropped.items():
        yield f"Not used, block {place}: {why}."
    if proof.unseen:
        yield f"Nothing was seen to be multiplied with {', '.join(proof.unseen)}."
