"""What a conversion writes for people: report.json, figures, and the model card."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from vllm_w8a8_bismooth import ROWS_FORMAT, __version__
from vllm_w8a8_bismooth.checkpoint.files import RECIPE, REPORT, disk_errors, read_json, write_atomically
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.bundled import NAME
from vllm_w8a8_bismooth.measure.weights import VULNERABLE
from vllm_w8a8_bismooth.model.names import block_of, kind_of
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import figures, front_matter, licence, record, section
from vllm_w8a8_bismooth.report.labels import Labels
from vllm_w8a8_bismooth.report.outcome import Outcome
from vllm_w8a8_bismooth.report.task import task_of

CARD, ORIGINAL_CARD, FIGURES = "README.md", "ORIGINAL_README.md", "figures"
OURS = (REPORT, ORIGINAL_CARD, f"{FIGURES}/{figures.ERRORS}", f"{FIGURES}/{figures.WEIGHTS}")
"""Files that we write beside the model, and that a source must therefore not have."""

_NONE = Labels()
_HERE = "PATH_TO_THIS_FOLDER"
_WORST = 10


def place_of(relative: Path) -> Path:
    """Where a side file of the source goes: its own place, except for the card, whose place ours takes."""
    return Path(ORIGINAL_CARD) if relative == Path(CARD) else relative


def write(folder: Path, outcome: Outcome, labels: Labels = _NONE) -> Labels:
    """Write report.json and the card of a finished conversion.

    Equal conversions give equal bytes, whatever the folders are called and however often they were resumed.

    Args:
        folder: to write into, with everything else of the checkpoint and its figures in it: the card is drawn up from
            the folder.
        outcome: the :class:`outcome.Outcome`.
        labels: what the source's files may not show of it.

    Returns:
        What the card says.
    """
    record.write(folder, outcome)
    (folder / CARD).write_bytes(draw_up(folder, labels).encode())
    return labels_of(folder)


def draw(folder: Path, outcome: Outcome) -> None:
    """Draw the figures of a conversion into a folder, before its card is written. Without matplotlib there are none."""
    if figures.available():
        figures.of_conversion(outcome.linears, outcome.sites, folder / FIGURES)


def labels_of(folder: Path) -> Labels:
    """What a finished checkpoint's card says now; values that labels cannot have are left out."""
    found: dict[str, str] = {}
    for key, value in front_matter.read(folder / CARD).items():
        if key in ("base_model", "license") and isinstance(value, str):
            with suppress(BismoothError):
                found |= {key: getattr(Labels(**{key: value}), key)}
    return Labels(**found)


def labels_to_write(folder: Path, labels: Labels) -> Labels | None:
    """What a finished checkpoint's card must be drawn up with, to say what these labels say; ``None`` if it does.

    Raises:
        BismoothError: the card would lose what somebody wrote into it.
    """
    card, before = folder / CARD, labels_of(folder)
    after = labels.over(before)
    if after == before and card.exists():
        return None
    if card.exists() and section.without(card.read_bytes()) != draw_up(folder, before).encode():
        changed = [f"{key}: {value}" for key, value in vars(after).items() if value != getattr(before, key)]
        what = f"not as bismooth {__version__} writes it, and what was changed in it would be lost"
        remedy = f"have it say {' and '.join(changed)} between its first two lines of ---, or move it away"
        raise BismoothError.of(card, what, f"{remedy} and run the same command again")
    return after


def missing(folder: Path) -> dict[str, str]:
    """What a finished checkpoint's card does not say in any way, in words -> the option that says it."""
    options = {"license": ("licence", "--license ID"), "base_model": ("base model", "--base-model ORG/NAME")}
    said = front_matter.read(folder / CARD)
    return dict(words for key, words in options.items() if not said.get(key))


def relabel(folder: Path, labels: Labels) -> bool:
    """Draw up a finished checkpoint's card anew where it does not say what these labels say.

    Returns:
        Whether it had to be.

    Raises:
        BismoothError: see :func:`labels_to_write`.
        Interrupted: it cannot be written.
    """
    if (after := labels_to_write(folder, labels)) is None:
        return False
    card = folder / CARD
    content = section.carried_over(card.read_bytes() if card.exists() else b"", draw_up(folder, after).encode())
    with disk_errors(folder):
        write_atomically(card, lambda path: path.write_bytes(content))
    return True


def for_repository(card: str, hub_id: str) -> str:
    """A card's text, with the commands as they are once the folder is the repository ``org/name`` on the Hub.

    One that was downloaded from there has them already, and stays as it is.
    """
    verify = f"bismooth verify {_HERE}"
    fetched = f"hf download {hub_id} --local-dir {_HERE}\n{verify}"
    served = card.replace(f"vllm serve {_HERE}", f"vllm serve {hub_id}")
    return served.replace(fetched, verify).replace(verify, fetched)


def draw_up(folder: Path, labels: Labels) -> str:
    """The model card of a folder that holds everything else of a checkpoint: YAML front matter, then Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    report, chosen = read_json(folder / REPORT), read_json(folder / RECIPE)
    recipe, provenance = Recipe(**chosen["recipe"]), chosen["provenance"]
    linears, ignored = report["linears"], report["ignored"]
    original, task = folder / ORIGINAL_CARD, task_of(folder)
    source = str(provenance["source"])  # a folder's name, which has no slash, or an id on the Hub
    base_model = labels.base_model or (source if "/" in source else None)
    base = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    data = ModelCardData(
        **_terms(front_matter.inherited(original), labels.license, licence.recognised(folder)) | base,
        library_name="vllm",
        pipeline_tag=task.pipeline,
        tags=[*(_TAGS if recipe.bits is None else _TAGS_OF_ROWS), "vllm", "bismooth", *task.tags],
    )
    name = _plain(base_model or source)
    grouped = sum(entry["group_size"] is not None for entry in linears.values())
    drawn = [f"{FIGURES}/{figure}" for figure in _CAPTIONS if (folder / FIGURES / figure).is_file()]
    before, after = report["source_bytes"], report["written_bytes"]
    body = _BODY.format(
        name=name,
        model=f"[{name}](https://huggingface.co/{name})" if base_model else name,
        version=provenance["vllm_w8a8_bismooth"],
        original=f"\nThe original's own card is [{ORIGINAL_CARD}]({ORIGINAL_CARD}).\n" if original.is_file() else "",
        quantized=_quantized(report.get("source_quantized")),
        method=_method(recipe)
        + _calibration(report)
        + (_EXEMPT if recipe.ignore else "")
        + (_HEAD if recipe.head else ""),
        recipe=json.dumps({key: value for key, value in asdict(recipe).items() if key in chosen["recipe"]}, indent=2),
        linears=len(linears),
        where=_WHERE[recipe.head is not None, recipe.bits is not None],
        ignored=len(ignored),
        grouped=f"{grouped} ({grouped / len(linears):.1%})",
        here=_HERE,
        runner=task.runner,
        plugin=_NEEDS_NOTHING
        if not grouped and recipe.bits is None
        else _NEEDS_PLUGIN.format(
            what="The per-group linears need" if recipe.bits is None else "Rows of four bits need"
        ),
        four="" if recipe.bits is None else _OF_ROWS,
        kind="INT8 W8A8" if recipe.bits is None else "W4A8 with rows of INT8",
        weights="8-bit integer weights" if recipe.bits is None else _ROWS.format(bits=recipe.bits),
        format="compressed-tensors `int-quantized`" if recipe.bits is None else f"bismooth's own, `{ROWS_FORMAT}`",
        before=f"{before / 1e9:.3f}",
        after=f"{after / 1e9:.3f}",
        share=f"{after / before:.0%}",
        threshold=VULNERABLE,
        verdict=_verdict(report),
        kinds=_kinds(linears),
        worst=_worst(linears),
        figures="".join(f"\n![{_CAPTIONS[Path(path).name]}]({path})\n" for path in drawn),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _terms(found: Mapping[str, Any], given: str | None, written: str | None) -> dict[str, Any]:
    """What was inherited, with the licence that somebody named, or else with the one whose text is there.

    A name and a link belong to the licence that they were inherited with.
    """
    inherited_license = found.get("license")
    license = given or inherited_license or written
    if license is None or license == inherited_license:
        return dict(found)
    return {key: value for key, value in found.items() if key == "language"} | {"license": license}


def _plain(name: str) -> str:
    """A name that Markdown cannot take for anything else."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:128]


def _quantized(how: str | None) -> str:
    """What is to be said of an original that is not in float."""
    return f"\nThe original's weights are {how}. They were made float, and then INT8.\n" if how else ""


def _method(recipe: Recipe) -> str:
    size = recipe.group_size
    if recipe.method == "rtn":
        return "Every linear was rounded as it was; nothing was done about outlier columns (`rtn`)."
    if recipe.method == "mixed":
        which = "match `group_layers`" if recipe.group_layers else "would lose columns to outliers"
        return f"Linears that {which} have one scale per group of {size} columns; nothing else was changed (`mixed`)."
    ranges = (
        "measured on calibration text, whose SHA-256 is below"
        if recipe.calibration
        else "estimated from the weights alone, without calibration text (data-free)"
    )
    rule = f"alpha = {recipe.alpha}" if recipe.smoothing == "alpha" else "for the least expected error of the outputs"
    which = "whose cost to the predictions it reduces most," if recipe.method == "auto" else "that match `group_layers`"
    grouped = f" Linears {which} have one scale per group of {size} columns." if size else ""
    rounded = _COMPENSATED if recipe.rounding == "gptq" else ""
    if recipe.bits is not None:
        why = _WORTH if recipe.calibration else "by how much four change them, which is a guess"
        grouped = f" Rows have four bits, with a step and an offset for each {size} columns, or eight, {why}."
    return (
        f"Bi-smoothing moved magnitude between weights and activations, in either direction, before rounding "
        f"(`{recipe.method}`, {rule}). The activations' ranges were {ranges}.{rounded}{grouped}"
    )


def _calibration(report: Mapping[str, Any]) -> str:
    """What of the calibration text was really used, in sentences, where the report says so."""
    used = report.get("calibration")
    if not used:
        return ""
    names = ", ".join(f"bismooth's {NAME}" if name == NAME else f"`{_plain(name)}`" for name in used["files"][:_WORST])
    more = f" and {len(used['files']) - _WORST} more files" if len(used["files"]) > _WORST else ""
    left = [
        f"{used[key]} {what}"
        for key, what in {
            "skipped": "rows that held no text were skipped",
            "plain_chats": "chats were joined by line ends, without a chat template",
            "left_out": "windows were left out for token ids that the embedding lacks",
        }.items()
        if used.get(key)
    ]
    return (
        f" The text was {names}{more}: {used['tokens']} tokens in {used['windows']} windows, from {used['documents']} "
        f"of {used['rows']} documents, computed in {used['compute_dtype']}." + (f" {'; '.join(left)}." if left else "")
    )


def _decibels(sqnr: float | None) -> str:
    return "exact" if sqnr is None else f"{sqnr:.1f}"


def _verdict(report: Mapping[str, Any]) -> str:
    bad = report["vulnerable"]
    if not bad:
        return f"No linear is above {VULNERABLE}."
    return f"**{len(bad)} of {len(report['linears'])} linears are above {VULNERABLE}: expect a worse model.**"


def _kinds(linears: Mapping[str, Mapping[str, Any]]) -> str:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in linears.items():
        kinds.setdefault(kind_of(name)[0] if block_of(name) else name, []).append(entry)
    lines = ["| linear | number | column error, median | worst | SQNR in dB, median |", "|---|--:|--:|--:|--:|"]
    for kind, entries in sorted(kinds.items(), key=lambda item: figures.rank(item[0])):
        errors = [entry["column_error"] for entry in entries]
        ratios = [entry["sqnr"] for entry in entries if entry["sqnr"] is not None]
        middle = _decibels(median(ratios) if ratios else None)
        lines.append(f"| `{kind}` | {len(entries)} | {median(errors):.4f} | {max(errors):.4f} | {middle} |")
    return "\n".join(lines)


def _worst(linears: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| linear | scales | column error | SQNR in dB |", "|---|---|--:|--:|"]
    for name in sorted(linears, key=lambda name: (-linears[name]["column_error"], name))[:_WORST]:
        entry = linears[name]
        scales = "per channel" if entry["group_size"] is None else f"per group of {entry['group_size']}"
        lines.append(f"| `{name}` | {scales} | {entry['column_error']:.4f} | {_decibels(entry['sqnr'])} |")
    return "\n".join(lines)


_TAGS, _TAGS_OF_ROWS = ("int8", "w8a8", "compressed-tensors"), ("int4", "int8", "w4a8")
_WHERE = {
    (False, False): "linears of its decoder blocks",
    (True, False): "linears, its head among them,",
    (False, True): "linears of its decoder blocks",
    (True, True): "linears, its head among them (in 8 bits),",
}
"""Whether the head is INT8, and whether rows have four bits -> which linears."""
_COMPENSATED = (
    " Weights were rounded column by column, so that later columns make up for the errors of earlier ones (GPTQ)."
)
_NEEDS_NOTHING = (
    "vLLM detects the quantization by itself and needs nothing else; do not pass `--quantization`. With\n"
    "`vllm-w8a8-bismooth` installed, its kernels are used."
)
_NEEDS_PLUGIN = (
    "{what} the plugin `vllm-w8a8-bismooth`; vLLM without it refuses the checkpoint. In vLLM's\n"
    "environment, in a copy of the plugin's repository:\n\n"
    "```\npip install .\n```\n\n"
    "vLLM detects the quantization by itself; `--quantization` need not be given."
)
_ROWS = "integer weights, {bits:g} bits each on average (rows of them have four bits, or eight),"
_OF_ROWS = " Here it is that of INT8 codes: rows of four bits leave about ten times as much, which SQNR shows."
_WORTH = "where that is worth most to the predictions for the bits that it takes"
_EXEMPT = (
    " Exempt are linears that match `ignore`, with those that vLLM fuses with them: they keep the original's dtype."
)
_HEAD = " The language model's head was rounded as it was, with one scale for each token of the vocabulary."
_CAPTIONS = {
    figures.ERRORS: "Column error of each linear by block",
    figures.WEIGHTS: "Largest weights of the input columns before and after smoothing, by block",
}
_BODY = """\
# {name}, {kind}

{model}, converted by `bismooth` {version} for [vLLM](https://docs.vllm.ai): {linears} {where}
hold {weights} and get 8-bit integer activations, which are quantized while serving; everything else keeps
its dtype. The format is {format}.
{quantized}{original}
## Serve

```
vllm serve {here}{runner}
```

{plugin}

## Recipe

{method}

```json
{recipe}
```

| | |
|---|--:|
| linears | {linears} |
| of these with per-group scales | {grouped} |
| further linears, left in float | {ignored} |
| size before, GB | {before} |
| size after, GB | {after} ({share}) |

## What INT8 left of the weights

The column error is what rounding to the nearest code leaves in an input column, relative, averaged over the columns:
0 is exact, 1 means that all are lost. Healthy linears have about 0.01; above {threshold} a linear counts as vulnerable.
{verdict}{four}

{kinds}

The worst:

{worst}
{figures}
`report.json` has them all, and what smoothing did at each site; `recipe.json` says how to convert again.

## Verify

```
bismooth verify {here}
```

## Limits

The errors of linears are those of the weights, of every linear for itself; activations are rounded while serving. What
both do to the predictions is what `bismooth score` measures. No task was measured: compare with the original on your
own before you rely on it. The terms and the limits of the original hold here too.

## Citation

```bibtex
@article{{qin2024uniqueness,
  title   = {{The Uniqueness of LLaMA3-70B Series with Per-Channel Quantization}},
  author  = {{Qin, Minghai}},
  journal = {{arXiv preprint arXiv:2408.15301}},
  year    = {{2024}}
}}
@article{{frantar2022gptq,
  title   = {{GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers}},
  author  = {{Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan}},
  journal = {{arXiv preprint arXiv:2210.17323}},
  year    = {{2022}}
}}
@article{{xiao2022smoothquant,
  title   = {{SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models}},
  author  = {{Xiao, Guangxuan and Lin, Ji and Seznec, Mickael and Wu, Hao and Demouth, Julien and Han, Song}},
  journal = {{arXiv preprint arXiv:2211.10438}},
  year    = {{2022}}
}}
```
"""
