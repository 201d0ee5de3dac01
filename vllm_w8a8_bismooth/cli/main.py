"""The ``bismooth`` command; torch and transformers are imported inside commands. What is printed is in display.py."""

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.cli import display, publication
from vllm_w8a8_bismooth.cli.progress import Progress
from vllm_w8a8_bismooth.errors import BismoothError


class _Verbs(typer.core.TyperGroup):
    """Ends Ctrl-C with one line and exit code 130."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            goes_on = (
                "; the same command goes on from there"
                if ctx.invoked_subcommand in ("convert", "merge", "push")
                else ""
            )
            print(f"Interrupted{goes_on}", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Folder of a Hugging Face checkpoint (safetensors), or org/name[@revision] on the Hub."
    ),
]

_WITHOUT_TEXT = "--calibration-tokens has no effect without --calibration FILE"


def _share(text: str) -> float:
    """``3%`` or ``0.03``."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no share; write 3% or 0.03") from None


def _blocks(text: str) -> slice:
    """``42:84``, ``:42`` or ``84:``."""
    if not (match := re.fullmatch(r"(?a:(\d*):(\d*))", text)):
        raise typer.BadParameter(f"{text!r} are no blocks; write 42:84 for the blocks 42 to 83")
    return slice(*(int(end) if end else None for end in match.groups()))


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
def inspect(
    source: _SourceArgument,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a calibrated conversion.")] = 16384,
    group_size: Annotated[
        int, typer.Option(min=1, help="Columns per scale, for which tensor parallelism is checked.")
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show from headers alone what a conversion needs and everything that stands in its way; no weights are read.

    Exits with 2 if there are problems.
    """
    from rich.console import Console

    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.conversion.inspect import survey

    found = survey(hub.find(source), calibration_tokens, group_size)
    if as_json:
        print(json.dumps(display.with_sentences(found), indent=2))
    else:
        display.inspection(Console(soft_wrap=True, highlight=False), found, source)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def convert(
    source: _SourceArgument,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist yet.")],
    method: Annotated[
        str,
        typer.Option(
            help="rtn: round as is. bismooth: balance weights and activations, per-channel throughout. "
            "mixed: per-group scales for vulnerable linears. auto: bismooth, and per-group scales where they pay."
        ),
    ] = "bismooth",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|none", help='Text (.txt, or .jsonl with "text"); none = data-free, the default of bismooth.'
        ),
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Tokens taken from it.", show_default="16384")] = None,
    smoothing: Annotated[
        str | None,
        typer.Option(
            help="balanced: factors of least expected output error. alpha: by a fixed share (SmoothQuant's rule).",
            show_default="balanced",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="With --smoothing alpha: share of the activation range moved into the weights.", show_default="0.5"
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns per scale in per-group linears.", show_default="128 for mixed, auto")
    ] = None,
    group_layers: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Linears to make per-group, instead of finding them from the weights."),
    ] = None,
    group_budget: Annotated[
        float | None,
        typer.Option(
            parser=_share,
            metavar="SHARE",
            help="With auto: share of the linears that may get per-group scales, 3% or 0.03.",
            show_default="3%",
        ),
    ] = None,
    ignore: Annotated[str | None, typer.Option(metavar="REGEX", help="Linears to leave in the source's dtype.")] = None,
    blocks: Annotated[
        slice | None,
        typer.Option(
            parser=_blocks,
            metavar="FIRST:END",
            help="Convert only these decoder blocks, 0:42 here and 42:84 elsewhere; bismooth merge joins the parts.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where blocks are worked on: cpu, cuda, cuda:1.")] = "cpu",
    base_model: publication.BaseModelOption = None,
    license: publication.LicenseOption = None,
    push_to_hub: publication.PushOption = None,
    public: publication.PublicOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report, or the plan, as JSON on stdout.")] = False,
) -> None:
    """Convert a checkpoint to INT8 (compressed-tensors). A run that was interrupted goes on where it stopped.

    Then: [bold]vllm serve DST[/bold]
    """
    from rich.console import Console

    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.recipe import DEFAULTS, Recipe
    from vllm_w8a8_bismooth.report.labels import Labels

    console = Console(stderr=True, soft_wrap=True)  # paths and commands stay copyable
    text = None
    if calibration not in (None, "none"):
        if "calibration_tokens" not in DEFAULTS.get(method, {}):
            raise BismoothError.of(f"--method {method}", "--calibration has no effect", "leave it out")
        from vllm_w8a8_bismooth.measure.text import read_text

        text = read_text(Path(calibration))
    elif calibration_tokens is not None:
        raise BismoothError.of("convert", _WITHOUT_TEXT, "leave it out")
    recipe = Recipe.of(
        method,
        smoothing=smoothing,
        alpha=alpha,
        calibration_tokens=calibration_tokens,
        group_size=group_size,
        group_layers=group_layers,
        group_budget=group_budget,
        ignore=ignore,
    )
    labels = Labels(base_model, license)
    publication.check(destination, push_to_hub, public, blocks is not None)
    if dry_run:
        if (folder := hub.cached(source)) is None:
            remedy = "bismooth inspect shows size, needs and problems from the headers alone"
            raise BismoothError.of(source, "not downloaded yet, and --dry-run writes nothing", remedy)
        from vllm_w8a8_bismooth.conversion.preparation import prepare
        from vllm_w8a8_bismooth.conversion.preview import preview

        plan = preview(prepare(folder, destination, recipe, text, device, blocks, labels))
        if as_json:
            print(json.dumps(asdict(plan) | {"destination": str(destination)}, indent=2))
        else:
            display.preview(Console(soft_wrap=True, highlight=False), plan, recipe)
        return
    folder = hub.fetch(source)
    from vllm_w8a8_bismooth.conversion.pipeline import convert as run
    from vllm_w8a8_bismooth.conversion.preparation import prepare

    ready = prepare(folder, destination, recipe, text, device, blocks, labels)
    with Progress(console) as progress:
        report = run(ready, progress)
    if not as_json:
        display.summary(console, report, recipe)
    pushed = publication.send(destination, push_to_hub, public, console) if push_to_hub is not None else None
    if as_json:
        print(json.dumps(display.report_json(report) | ({"push": pushed} if pushed else {}), indent=2))


@app.command()
def merge(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist yet.")],
    parts: Annotated[
        list[Path], typer.Argument(metavar="PART...", help="Folders of all parts, as convert --blocks wrote them.")
    ],
    base_model: publication.BaseModelOption = None,
    license: publication.LicenseOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check that the parts fit together; read no tensors and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report, or the plan, as JSON on stdout.")] = False,
) -> None:
    """Join the parts of a checkpoint that several machines converted. A merge that was interrupted goes on.

    The result is what one machine would have written, byte for byte. The parts stay as they are.
    """
    from rich.console import Console

    from vllm_w8a8_bismooth.conversion.merge import merge as run
    from vllm_w8a8_bismooth.conversion.merge import prepare
    from vllm_w8a8_bismooth.report.labels import Labels

    ready = prepare(parts, destination, Labels(base_model, license))
    if dry_run:
        if as_json:
            print(json.dumps(display.merger_json(ready), indent=2))
        else:
            display.merger(Console(soft_wrap=True, highlight=False), ready)
        return
    console = Console(stderr=True, soft_wrap=True)
    with Progress(console) as progress:
        report = run(ready, progress)
    if as_json:
        print(json.dumps(display.report_json(report), indent=2))
    else:
        display.summary(console, report, ready.recipe)


@app.command()
def analyze(
    source: _SourceArgument,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Also measure what per-group scales of this size would leave.",
            show_default="256, 128, 64, 32 on vulnerable linears, until one repairs",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Also measure on this text which linears' errors come from weights or activations."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens taken from it.", show_default="16384")
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the weights and errors as SVG.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    device: Annotated[str, typer.Option(help="Where weights are worked on: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured as JSON on stdout.")] = False,
) -> None:
    """Measure what INT8 does to each linear, from the weights alone, and say which are vulnerable and why.

    With --calibration also how far each linear moves its block's output, before and after smoothing.
    """
    from rich.console import Console

    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.checkpoint.blocks import Run
    from vllm_w8a8_bismooth.checkpoint.layout import Source
    from vllm_w8a8_bismooth.conversion.preparation import device_of
    from vllm_w8a8_bismooth.measure import perturbation
    from vllm_w8a8_bismooth.measure.text import read_text, tokenize
    from vllm_w8a8_bismooth.measure.weights import analyze as measure
    from vllm_w8a8_bismooth.method import balance
    from vllm_w8a8_bismooth.recipe import Recipe
    from vllm_w8a8_bismooth.report import figures as drawing

    if group_size is not None:
        Recipe.of("mixed", group_size=group_size)  # the same bounds
    if figures is not None:
        drawing.require()
    if calibration_tokens is not None and calibration is None:
        raise BismoothError.of("analyze", _WITHOUT_TEXT, "leave it out")
    text = read_text(Path(calibration)) if calibration is not None else None
    console, where, moved = Console(stderr=True, soft_wrap=True), device_of(device), None
    with Progress(console) as progress:
        over = Run(Source(hub.fetch(source)), where, progress=progress)
        found = measure(over, group_size)
        if text is not None:
            tokens = tokenize(text, over.source.checkpoint, calibration_tokens or 16384)
            moved = perturbation.view(over, tokens, balance.by_error)
    if as_json:
        print(json.dumps({"source": source, **display.analysis_json(found), "perturbation": moved}, indent=2))
    else:
        display.analysis(found, source, group_size, top)
        if moved is not None:
            display.perturbation(moved, top)
    for path in drawing.of_analysis(found, figures) if figures is not None else []:
        console.print(f"Drew {path}", markup=False)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder of a converted checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The checkpoint that it was made from: compare weights and function with it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Check a converted checkpoint: config, tensors, values, hashes, vLLM's reading of it, and its source.

    Exit codes: 0 nothing wrong, 1 faults (all are listed), 2 nothing there to check.
    """
    from rich.console import Console

    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.verification import verify as run

    console = Console(stderr=True, soft_wrap=True)
    with Progress(console) as progress:
        found = run(folder, hub.fetch(against) if against is not None else None, progress)
    if as_json:
        print(json.dumps(display.verification_json(found), indent=2))
    else:
        display.verification(console, found)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say which kernels would serve which layers here, and why: versions, machine, vLLM, and what is missing.

    The first thing to paste into a bug report. Exit codes: 0 nothing is missing, 1 something is.
    """
    from rich.console import Console

    from vllm_w8a8_bismooth.doctor import diagnose

    with Console(stderr=True).status("asking vLLM"):
        found = diagnose()
    if as_json:
        print(json.dumps(display.with_sentences(found), indent=2))
    else:
        display.diagnosis(Console(soft_wrap=True), found)
    raise typer.Exit(1 if found.problems else 0)


app.command()(publication.push)


def main() -> None:
    """Console entry point: bad input ends with one message on stderr and exit code 2."""
    # torch reads it when it is imported: huge pages, because faulting in small ones takes longer than the work on them
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except (BismoothError, OSError) as error:  # OSError says which file and why: a name too long, no permission
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
