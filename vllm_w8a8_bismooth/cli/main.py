"""The ``bismooth`` command; torch and transformers are imported inside commands. What is printed is in display.py."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.cli import analysis, calibrating, display, inspection, publication, scoring, sites
from vllm_w8a8_bismooth.cli.arguments import SourceArgument, TrustOption, Verbs, path
from vllm_w8a8_bismooth.cli.progress import Progress
from vllm_w8a8_bismooth.errors import BismoothError

_COMPUTE = (["convert"], ["analyze"])
_SPINS = "100"
"""As libgomp has it where threads outnumber cores. It cannot see that ours do, beside which torch's would spin for
milliseconds after each step: on a busy machine that was nine tenths of a calibration."""

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


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


app.command()(inspection.inspect)


@app.command()
def convert(
    source: SourceArgument,
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; it must be absent or empty.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="rtn: round as is. bismooth: balance weights and activations, per-channel throughout. "
            "mixed: per-group scales for vulnerable linears. auto: bismooth, and per-group scales where they pay.",
        ),
    ] = "bismooth",
    calibration: calibrating.ConvertOption = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens taken from it.", show_default="16384")
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="In which they run through the model: float32, bfloat16, or auto, the faster one for a model in bf16.",
            show_default="auto",
        ),
    ] = None,
    smoothing: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="balanced: factors of least expected output error. alpha: by a fixed share (SmoothQuant's rule).",
            show_default="balanced",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --smoothing alpha: share of the activation range moved into the weights.",
            show_default="0.5",
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Of weights. nearest: each for itself. gptq: later columns make up for earlier ones' errors.",
            show_default="gptq with calibration",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Average bits of a weight, 4.2 to 8: rows have 4, or 8 where that pays."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Columns per scale in per-group linears, or per step of 4-bit rows.",
            show_default="128 for mixed; else 128, 64 or 32, which fits",
        ),
    ] = None,
    group_layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERNS",
            help="Linears to make per-group, instead of finding them from the weights; written as with --ignore. "
            "Of a block's experts, one stands for all.",
        ),
    ] = None,
    group_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="With auto: share of the multiplications that may have per-group scales, 15% or 0.15.",
            show_default="25%, or all of them with --target-kl",
        ),
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="With auto: give no more groups than bring the estimated KL to the source down to this.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERNS",
            help="Linears to leave in the source's dtype: regular expressions for their full names, with commas "
            "between them or each with its own --ignore. One after re: must match from the name's beginning.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="int8: the language model's head too, per-channel; one that is the embedding becomes a tensor of its "
            "own. float: leave it.",
            show_default="float",
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:END",
            help="Convert only these decoder blocks, 0:42 here and 42:84 elsewhere; bismooth merge joins the parts.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where blocks are worked on: cpu, cuda, cuda:1.")
    ] = "cpu",
    sites: sites.GivenOption = None,
    trust_remote_code: TrustOption = False,
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
    from vllm_w8a8_bismooth import api
    from vllm_w8a8_bismooth.conversion import pipeline
    from vllm_w8a8_bismooth.conversion.preview import preview

    publication.check(Path(destination), push_to_hub, public, blocks is not None)
    console = display.console(stderr=True)
    with Progress(console) as progress:
        ready = api.prepare(
            source,
            destination,
            method=method,
            calibration=calibrating.for_convert(calibration),
            calibration_tokens=calibration_tokens,
            compute_dtype=compute_dtype,
            smoothing=smoothing,
            alpha=alpha,
            rounding=rounding,
            bits=bits,
            group_size=group_size,
            group_layers=group_layers,
            group_budget=group_budget,
            target_kl=target_kl,
            ignore=ignore,
            head=head,
            blocks=blocks,
            device=device,
            sites=sites,
            trust_remote_code=trust_remote_code,
            base_model=base_model,
            license=license,
            progress=progress,
            download=not dry_run,
        )
    if dry_run:
        plan = preview(ready)
        if as_json:
            print(json.dumps(asdict(plan) | {"destination": str(plan.destination)}, indent=2))
        else:
            display.preview(display.console(), plan, ready.recipe, publication.planned(push_to_hub, public))
        return
    with Progress(console) as progress:
        report = pipeline.convert(ready, progress)
    if not as_json:
        display.summary(console, report)
    pushed = publication.send(report.destination, push_to_hub, public, console) if push_to_hub is not None else None
    if as_json:
        print(json.dumps(display.report_json(report) | ({"push": pushed} if pushed else {}), indent=2))


@app.command()
def merge(
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; it must be absent or empty.")],
    parts: Annotated[
        list[Path],
        typer.Argument(parser=path, metavar="PART", help="Folders of all parts, as convert --blocks wrote them."),
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
    from vllm_w8a8_bismooth.conversion.merge import merge as run
    from vllm_w8a8_bismooth.conversion.merge import prepare
    from vllm_w8a8_bismooth.report.labels import Labels

    ready = prepare(parts, destination, Labels(base_model, license))
    if dry_run:
        if as_json:
            print(json.dumps(display.merger_json(ready), indent=2))
        else:
            display.merger(display.console(), ready)
        return
    console = display.console(stderr=True)
    with Progress(console) as progress:
        report = run(ready, progress)
    if as_json:
        print(json.dumps(display.report_json(report), indent=2))
    else:
        display.summary(console, report)


@app.command()
def analyze(
    source: SourceArgument,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Also measure what per-group scales of this size would leave.",
            show_default="256, 128, 64, 32 on vulnerable linears, until one repairs",
        ),
    ] = None,
    calibration: calibrating.AnalyzeOption = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens taken from it.", show_default="16384")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(parser=path, metavar="DIR", help="Draw the weights and errors as SVG.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rows of the table.", show_default="20")] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where weights are worked on: cpu, cuda, cuda:1.")
    ] = "cpu",
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured as JSON on stdout.")] = False,
) -> None:
    """Measure what INT8 does to each linear, from the weights alone, and say which are vulnerable and why.

    With --calibration also how far each linear moves its block's output, before and after smoothing.
    """
    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.checkpoint.basis import Means
    from vllm_w8a8_bismooth.checkpoint.blocks import Run
    from vllm_w8a8_bismooth.checkpoint.layout import Source
    from vllm_w8a8_bismooth.conversion.preparation import device_of
    from vllm_w8a8_bismooth.measure import perturbation
    from vllm_w8a8_bismooth.measure.text import sample
    from vllm_w8a8_bismooth.measure.weights import analyze as measure
    from vllm_w8a8_bismooth.method import balance
    from vllm_w8a8_bismooth.recipe import Recipe
    from vllm_w8a8_bismooth.report import figures as drawing

    if group_size is not None:
        Recipe.of("mixed", group_size=group_size)  # the same bounds
    if top is not None and as_json:
        raise BismoothError.of("--top", "has no effect with --json, which prints everything", "leave it out")
    rows = top or 20
    if figures is not None:
        drawing.require()
    text = calibrating.for_analyze(calibration, calibration_tokens)
    console, where, moved, used = display.console(stderr=True), device_of(device), None, None
    with Progress(console) as progress:
        means = Means(trusted=trust_remote_code, progress=progress)
        over = Run(Source(hub.fetch(source, means), means), where, progress=progress)
        found = measure(over, group_size)
        if text is not None:
            taken = sample(text, over.source.checkpoint, calibration_tokens or 16384)
            moved, used = perturbation.view(over, taken.tokens, balance.by_error), taken.used
    calibrating.remarks(console, used)
    if as_json:
        measured = {"perturbation": moved, "calibration": used.json() if used is not None else None}
        print(json.dumps({"source": source, **analysis.analysis_json(found), **measured}, indent=2))
    else:
        analysis.analysis(found, source, group_size, rows, calibrating.files(calibration))
        if moved is not None:
            analysis.perturbation(moved, rows)
    for drawn in drawing.of_analysis(found, figures) if figures is not None else []:
        console.print(f"Drew {drawn}", markup=False)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="DST", help="Folder of a converted checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The checkpoint that it was made from: compare weights and function with it."),
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Check a converted checkpoint: config, tensors, values, hashes, vLLM's reading of it, and its source.

    Exit codes: 0 nothing wrong, 1 faults (all are listed), 2 nothing there to check.
    """
    from vllm_w8a8_bismooth import api

    console = display.console(stderr=True)
    with Progress(console) as progress:
        found = api.verify(folder, against=against, trust_remote_code=trust_remote_code, progress=progress)
    if as_json:
        print(json.dumps(display.verification_json(found), indent=2))
    else:
        display.verification(console, found)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def doctor(
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Have the compiled kernels run their self-test now."),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print who serves which linears by measurement, and the times.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say which kernels would serve which layers here, and why: versions, machine, vLLM, and what is missing.

    The first thing to paste into a bug report. Exit codes: 0 nothing is missing, 1 something is.
    """
    from vllm_w8a8_bismooth.doctor import diagnose

    with display.console(stderr=True).status("asking vLLM"):
        found = diagnose(self_test)
    if as_json:
        print(json.dumps(display.with_sentences(found), indent=2))
    else:
        display.diagnosis(display.console(), found, plan)
    raise typer.Exit(1 if found.problems else 0)


app.command()(sites.sites)
app.command()(scoring.score)
app.command()(publication.push)


def main() -> None:
    """Console entry point: bad input ends with one message on stderr and exit code 2."""
    # Read when torch is imported: huge pages, because faulting in small ones takes longer than the work on them
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.argv[1:2] in _COMPUTE and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    try:
        app()
    except (BismoothError, OSError) as error:  # OSError says which file and why: a name too long, no permission
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
