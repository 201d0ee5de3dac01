"""What the ``bismooth`` command shows to people, and the JSON that it gives to programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_w8a8_bismooth.checkpoint.files import readable_size
from vllm_w8a8_bismooth.cli.advice import advice
from vllm_w8a8_bismooth.cli.calibrating import remarks
from vllm_w8a8_bismooth.cli.progress import duration
from vllm_w8a8_bismooth.report.names import in_few_words
from vllm_w8a8_bismooth.report.task import task_of
from vllm_w8a8_bismooth.shell import word

if TYPE_CHECKING:  # torch comes with them, and it is imported inside commands
    from rich.console import Console

    from vllm_w8a8_bismooth.conversion import inspect
    from vllm_w8a8_bismooth.conversion.merge import Merger
    from vllm_w8a8_bismooth.conversion.preview import Preview
    from vllm_w8a8_bismooth.doctor import Diagnosis
    from vllm_w8a8_bismooth.recipe import Recipe
    from vllm_w8a8_bismooth.report.labels import Labels
    from vllm_w8a8_bismooth.report.outcome import Outcome
    from vllm_w8a8_bismooth.verification import Verification

_LISTED = 8  # linears with groups
_DRY = "Nothing was written. Next: the same command without --dry-run"


def console(stderr: bool = False) -> "Console":
    """For lines that stay as they are, so that paths and commands can be copied."""
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False)


def with_sentences(found: "inspect.Survey | Diagnosis") -> dict[str, Any]:
    """Everything that was found, its problems as text."""
    return asdict(found) | {"problems": list(map(str, found.problems))}


def left_out(console: "Console", files: Mapping[str, int], notes: Sequence[str]) -> None:
    """What the user should know of the source: notes, and files that are not copied, those in one folder as one."""
    from rich.filesize import decimal
    from rich.markup import escape

    for note in notes:
        console.print(f"Note: {escape(note)}.", highlight=False)
    if not files:
        return
    sizes: dict[str, int] = {}
    for file, size in files.items():
        top = file.partition("/")[0] + ("/" if "/" in file else "")
        top = top if top.isprintable() else ascii(top)
        sizes[top] = sizes.get(top, 0) + size
    largest = sorted(sizes, key=lambda top: (-sizes[top], top))
    more = f" and {len(largest) - 8} more" if len(largest) > 8 else ""
    shown = ", ".join(largest[:8])
    count, total = "1 file" if len(files) == 1 else f"{len(files)} files", decimal(sum(files.values()))
    console.print(f"Left out, as serving does not need it: {count}, {total} ({escape(shown)}{more})", highlight=False)


def _already_float(console: "Console", names: Sequence[str]) -> None:
    if names:
        console.print(f"In float anyway, also without --ignore: {in_few_words(names)}", markup=False)


def preview(console: "Console", plan: "Preview", recipe: "Recipe", then: str | None = None) -> None:
    """The plan of a conversion for people, on stdout; ``then`` says what comes after it."""
    from rich.table import Table

    if plan.reused:
        _already_there(console, plan.destination, plan.relabelled, "would be")
        if then:
            console.print(then, markup=False, highlight=False)
        if plan.relabelled is not None:
            console.print(_DRY)
        return
    table = Table("shard", "GB")
    for file, size in (plan.shards or {}).items():
        table.add_row(file, f"{size / 1e9:.3f}")
    console.print(table)
    if plan.part is not None:
        console.print("A part: blocks {}:{}".format(*plan.part))
    by = "data-free" if plan.used is None else f"calibrated on {plan.used.words()}, computed in {plan.compute_dtype}"
    if recipe.head:
        by += ", the head in INT8"
    sizes = f"{readable_size(plan.source_bytes)} -> {readable_size(plan.written_bytes)}"
    console.print(f"{sizes}, method {recipe.method}, {by}", markup=False)
    remarks(console, plan.used)
    quantized(console, plan.quantized)
    _data_free(console, recipe)
    _rows(console, recipe)
    if plan.grouped is None:
        console.print(f"Per-group linears (g = {recipe.group_size}): the weights decide; sizes are without them")
    elif plan.grouped:
        console.print(f"{len(plan.grouped)} linears per-group (g = {recipe.group_size}): {in_few_words(plan.grouped)}")
    if plan.ignored:
        console.print(f"{len(plan.ignored)} linears left in float: {in_few_words(plan.ignored)}")
    _already_float(console, plan.already_float)
    left_out(console, plan.left_out, plan.notes)
    if plan.resumed:
        console.print(f"{plan.resumed} of {plan.blocks} blocks are done and will be skipped")
    memory, free = readable_size(plan.memory_bytes), readable_size(plan.free_bytes)
    console.print(f"About {duration(plan.seconds)}, {memory} of memory, {free} free")
    if then:
        console.print(then, markup=False, highlight=False)
    console.print(_DRY)


def merger_json(ready: "Merger") -> dict[str, Any]:
    labels = ready.relabelled()
    return {
        "destination": str(ready.destination),
        "reused": ready.reused,
        "relabelled": None if labels is None else asdict(labels),
        "parts": {str(part.folder): [part.blocks.start, part.blocks.stop] for part in ready.parts},
        "written_bytes": ready.nbytes(),
        "free_bytes": ready.free_bytes,
    }


def merger(console: "Console", ready: "Merger") -> None:
    """The plan of a merge for people, on stdout."""
    from rich.markup import escape
    from rich.table import Table

    if ready.reused:
        labels = ready.relabelled()
        _already_there(console, ready.destination, labels, "would be")
        if labels is not None:
            console.print(_DRY)
        return
    table = Table("part", "blocks")
    for part in ready.parts:
        table.add_row(escape(str(part.folder)), f"{part.blocks.start}:{part.blocks.stop}")
    console.print(table)
    console.print(
        f"{len(ready.source.layers)} blocks, method {ready.recipe.method}: the parts fit together; merging compares "
        "their SHA-256 too"
    )
    console.print(f"{readable_size(ready.nbytes())} to write, {readable_size(ready.free_bytes)} free")
    console.print(_DRY)


def report_json(report: "Outcome") -> dict[str, Any]:
    return {
        "destination": str(report.destination),
        "part": None if report.part is None else [report.part.start, report.part.stop],
        "reused": report.reused,
        "labels": asdict(report.labels),
        "source_bytes": report.source_bytes,
        "written_bytes": report.written_bytes,
        "source_quantized": report.quantized,
        "calibration": report.calibration(),
        "vulnerable": report.vulnerable(),
        "linears": report.linears,
        "ignored": report.ignored,
        "left_out": report.left_out,
        "already_float": report.already_float,
        "notes": report.notes,
        "sites": report.sites,
        "estimated_kl": report.estimated_kl,
        "granularity": [asdict(entry) for entry in report.granularity],
    }


def quantized(console: "Console", how: str | None) -> None:
    """What it means that the source is not the original."""
    if how:
        console.print(
            f"[yellow]Warning:[/yellow] the source's weights are quantized already ({how}). They are made float again, "
            "and INT8 adds its own error to theirs: convert the original in BF16, if there is one."
        )


def _data_free(console: "Console", recipe: "Recipe") -> None:
    """What nobody has compared: without text there is nothing to compare by."""
    if recipe.smoothing and recipe.calibration is None:
        console.print(
            "[yellow]Note:[/yellow] data-free factors are guesses, and can be worse than --method rtn, as they are on "
            "Qwen2.5-Coder-0.5B: --calibration bundled measures, and needs no text of yours; bismooth score compares."
        )


def _rows(console: "Console", recipe: "Recipe") -> None:
    """What rows have, and by what they were chosen."""
    if recipe.bits is None:
        return
    by = "cost the predictions" if recipe.calibration else "change in the weights alone"
    console.print(
        f"Rows have four bits, in groups of {recipe.group_size} columns, or eight, {recipe.bits:g} on average, by what "
        f"four bits {by}."
    )


def _granularity(console: "Console", report: "Outcome") -> None:
    """Which linears got groups, and why; nothing where that was not measured."""
    from rich.markup import escape

    chosen = [entry for entry in report.granularity if entry.chosen]
    for entry in chosen[:_LISTED]:
        console.print(f"  per-group: {escape(entry.unit)} {entry.reason}", highlight=False)
    if more := chosen[_LISTED:]:
        console.print(f"  and {len(more)} more, see report.json")
    if report.estimated_kl is not None:
        without = sum(entry.per_channel for entry in report.granularity)
        head = ", without what its INT8 head costs" if report.recipe and report.recipe.head else ""
        console.print(
            f"Estimated KL to the source: {report.estimated_kl:.2g} nats a token ({without:.2g} without groups){head}; "
            "bismooth score measures it"
        )
    if report.granularity and not chosen:
        console.print(f"  no per-group scales: the best, {report.granularity[0].unit}, {report.granularity[0].reason}")


def summary(console: "Console", report: "Outcome") -> None:
    from rich.markup import escape

    from vllm_w8a8_bismooth.report import card

    name, where = escape(str(report.destination)), word(report.destination)
    if report.reused:
        _already_there(console, report.destination, report.labels if report.relabelled else None, "was")
        return
    recipe = report.recipe
    assert recipe is not None
    per_group = [name for name, entry in report.linears.items() if entry["group_size"] is not None]
    grouped, share = len(per_group), report.written_bytes / report.source_bytes
    console.print(
        f"Wrote [bold]{name}[/bold]: {report.source_bytes / 1e9:.3f} GB -> "
        f"{report.written_bytes / 1e9:.3f} GB ({share:.0%}), {len(report.linears) - grouped} linears per-channel, "
        f"{grouped} per-group" + (f", {len(report.ignored)} left in float." if report.ignored else ".")
    )
    _rows(console, recipe)
    if per_group:
        console.print(f"Per-group (g = {recipe.group_size}): {in_few_words(per_group)}", markup=False)
    if report.ignored:
        console.print(f"Left in float: {in_few_words(report.ignored)}", markup=False)
    _already_float(console, report.already_float)
    if report.used is not None:
        console.print(f"Calibrated on {report.used.words()}.", markup=False)
    remarks(console, report.used)
    quantized(console, report.quantized)
    _data_free(console, recipe)
    _granularity(console, report)
    left_out(console, report.left_out, report.notes)
    what = "that is left" if recipe.bits is None else "that INT8 codes would leave"
    console.print(f"Mean relative error {what} in a column (healthy is about 0.01), the worst five linears:")
    for name in sorted(report.linears, key=lambda name: (-report.linears[name]["column_error"], name))[:5]:
        console.print(f"  {report.linears[name]['column_error']:.4f}  {escape(name)}", highlight=False)
    if bad := report.vulnerable():
        console.print(
            f"[yellow]Warning:[/yellow] {len(bad)} linears lose their weights to outlier columns. "
            + advice(recipe, report)
        )
    if report.part is not None:
        console.print(
            f"This is a part, blocks {report.part.start}:{report.part.stop} of {report.blocks}.\n"
            f"Next, with the parts of the other blocks: bismooth merge DST {where} ...",
            markup=False,
        )
        return
    if missing := card.missing(report.destination):
        console.print(
            f"The card names no {' and no '.join(missing)}; the same command with {' '.join(missing.values())} adds "
            f"{'it' if len(missing) == 1 else 'them'} in place."
        )
    runner = task_of(report.destination).runner
    console.print(f"Next: bismooth verify {where}\n      vllm serve {where}{runner}", markup=False)


def _already_there(console: "Console", destination: Path, labels: "Labels | None", when: str) -> None:
    """That nothing is to do, or that the card ``was`` or ``would be`` rewritten, to say what the labels say."""
    from rich.markup import escape

    todo = "nothing to do"
    if labels is not None:
        says = ", ".join(f"{key}: {value}" for key, value in asdict(labels).items() if value)
        todo = f"its card {when} rewritten" + (f" ({escape(says)})" if says else "")
    console.print(f"[bold]{escape(str(destination))}[/bold] already holds this conversion; {todo}.")


def verification_json(found: "Verification") -> dict[str, Any]:
    return {
        "ok": found.ok,
        "findings": [asdict(finding) for finding in found.findings],
        "notes": found.notes,
        "linears": found.linears,
        "ignored": found.ignored,
        "unscaled": found.unscaled,
    }


def verification(console: "Console", found: "Verification") -> None:
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
        ignored = f"{len(found.ignored)} left in float, " if found.ignored else ""
        console.print(f"[bold]{where}[/bold]: {len(found.linears)} INT8 linears, {ignored}nothing wrong.")
        if found.unscaled:
            weights = [name.removesuffix(".weight") for name in found.unscaled if name.endswith(".weight")]
            console.print(f"The residual stream is the source's, unscaled: {escape(in_few_words(weights))}.")


def diagnosis(console: "Console", found: "Diagnosis", plan: bool = False) -> None:
    """Plain lines, made to be pasted; with a ``plan``, who serves which linears by measurement, too."""

    def section(title: str, values: dict) -> None:
        console.print(f"[bold]{title}[/bold]")
        width = max(map(len, values), default=0)
        for name, value in values.items():
            console.print(f"  {name:<{width}}  {'-' if value is None else value}", markup=False, highlight=False)

    section("versions", found.versions)
    section("machine", found.machine)
    section("kernels", found.kernels)
    section("environment", found.environment)
    if found.serving is not None:
        section("vLLM", {name: found.serving[name] for name in ("platform", "device", "capability", "registered")})
        for device, test in found.serving["tests"].items():
            section("self-test", {device: test["words"]} | test["faults"])
        section("layers", {kind: f"{kernel} ({why})" for kind, (kernel, why, _) in found.serving["layers"].items()})
        if plan and not found.serving["plan_problem"]:
            section("plan", found.serving["plan"] or {"nothing": "was measured here, and nothing is given"})
    for problem in found.problems:
        console.print("[red]Problem:[/red] ", end="")
        console.print(f"{problem}.", markup=False, highlight=False)
    if not found.problems:
        console.print("Nothing is missing: w8a8_bismooth checkpoints are served on this package's kernels.")
