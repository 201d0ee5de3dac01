"""The verb ``inspect``, and what it shows to people."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_w8a8_bismooth.checkpoint.files import readable_size
from vllm_w8a8_bismooth.cli import blocks, display
from vllm_w8a8_bismooth.cli.arguments import SourceArgument, TrustOption
from vllm_w8a8_bismooth.cli.blocks import counted
from vllm_w8a8_bismooth.cli.progress import Progress, duration
from vllm_w8a8_bismooth.shell import word

if TYPE_CHECKING:  # torch comes with it, and it is imported inside commands
    from rich.console import Console

    from vllm_w8a8_bismooth.conversion.inspect import Head, Survey


def inspect(
    source: SourceArgument,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a calibrated conversion.")
    ] = 16384,
    group_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Columns per scale, for which tensor parallelism is checked.")
    ] = 128,
    list_sites: Annotated[
        bool, typer.Option("--sites", help="List blocks, linears, and where magnitude can move between them.")
    ] = False,
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a conversion needs on this machine and everything that stands in its way, from headers alone.

    Exits with 2 if there are problems.
    """
    from vllm_w8a8_bismooth import api

    with Progress(display.console(stderr=True)) as progress:
        found = api.inspect(
            source,
            calibration_tokens=calibration_tokens,
            group_size=group_size,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print(json.dumps(display.with_sentences(found), indent=2))
    else:
        show(display.console(), found, source, list_sites)
    if found.problems:
        raise typer.Exit(2)


def show(console: "Console", found: "Survey", source: str, list_sites: bool) -> None:
    """The survey of a checkpoint for people, on stdout: nothing is left out but what is empty."""
    from rich.markup import escape

    sizes = found.sizes
    revision = f" (commit {found.revision})" if found.revision else ""
    console.print(f"[bold]{escape(source)}[/bold]{escape(revision)}")
    model = [escape(str(found.model_type))]
    if sizes:
        model += [
            f"{sizes['blocks']} blocks",
            f"hidden size {sizes['hidden']}",
            *([f"{sizes['heads']} heads ({sizes['kv_heads']} for keys and values)"] if "heads" in sizes else []),
        ]
        model += [f"{sizes['experts']} experts"] if "experts" in sizes else []
        model += [f"vocabulary {sizes['vocab']}", "tied head" if found.tied else "separate head"]
    rows = {"model": ", ".join(model)} if found.model_type is not None else {}
    rows |= {"layout": escape(_layout(found))} if found.kinds else {}
    if found.dtypes:
        rows["parameters"] = f"{found.parameters / 1e9:.3f} billion"
        dtypes = ", ".join(f"{escape(name)} in {dtype.tensors} tensors" for name, dtype in found.dtypes.items())
        rows["source"] = f"{readable_size(found.source_bytes)}: {dtypes}"
    for way, needs in found.needs.items():
        if found.unproven:  # nothing but plain rounding is possible
            if way == "calibrated":
                continue
            way = "rtn"
        rows["result"] = readable_size(needs.written_bytes)
        tokens = f" on {found.calibration_tokens} tokens" if way == "calibrated" else ""
        memory = readable_size(needs.memory_bytes) + (" (too much)" if needs.memory_bytes > found.memory_bytes else "")
        disk = readable_size(needs.disk_bytes) + (" (too much)" if needs.disk_bytes > found.free_bytes else "")
        rows[way] = f"about {duration(needs.seconds)}{tokens}, {memory} of memory, {disk} of disk"
    if found.head is not None:
        rows["head"] = _head(found.head)
    rows["this machine"] = (
        f"{readable_size(found.memory_bytes)} of memory, {readable_size(found.free_bytes)} free on this folder's disk"
    )
    for name, text in rows.items():
        console.print(f"  {name:<13} {text}")
    if list_sites:
        blocks.show(console, found.kinds)
    if found.per_channel:
        _tensor_parallel(console, found)
    display.quantized(console, found.quantized)
    display.left_out(console, found.left_out, found.notes)
    if found.problems:
        console.print(f"[red]{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}[/red]:")
        for problem in found.problems:
            console.print(f"  {escape(str(problem))}")
        console.print(f"Next, once that is mended: bismooth inspect {word(source)}", markup=False)
    else:
        how = " --method rtn" if found.unproven else ""
        console.print(f"Next: bismooth convert {word(source)} {word(found.proposal)}{how}", markup=False)


def _tensor_parallel(console: "Console", found: "Survey") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("tensor parallel", *map(str, found.per_channel))
    for name, answers in (("per-channel", found.per_channel), (f"g = {found.group_size}", found.per_group)):
        table.add_row(name, *("no" if reasons else "yes" for reasons in answers.values()))
    weights = found.needs["data-free"].written_bytes / 1e9
    table.add_row("GB a rank", *(f"{weights / ranks:.3g}" for ranks in found.per_channel))
    console.print(table)
    ranks_of: dict[str, list[str]] = {}
    for ranks, reasons in found.per_group.items():  # those of per_channel are among them
        for reason in reasons:
            ranks_of.setdefault(reason, []).append(str(ranks))
    for reason, sizes_with in ranks_of.items():
        console.print(f"  no on {', '.join(sizes_with)}: {escape(reason)}")


def _head(head: "Head") -> str:
    """What the head adds to the result, as it is and in INT8."""
    from rich.markup import escape

    before = readable_size(head.nbytes) if head.nbytes else "nothing beside the embedding"
    int8 = f"{readable_size(head.int8_nbytes)} with --head int8" if head.obstacle is None else escape(head.obstacle)
    return f"{before} of the result; {int8}"


def _layout(found: "Survey") -> str:
    """In one line where it is known from what the blocks hold."""
    count = sum(len(kind.sites) for kind in found.kinds)
    held = f"{counted(count, 'site')} in {counted(len(found.kinds), 'kind')} of blocks"
    if found.known_by == "names":
        return f"guessed by names and shapes, without sites, for --method rtn or mixed: {found.unproven}"
    return f"found out on a small model of its class, and proven: {held}"
