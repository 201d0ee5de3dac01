"""The whole check, from the config to the source, and what it found."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from vllm_w8a8_bismooth import MARKER
from vllm_w8a8_bismooth.checkpoint.basis import NAMES, Basis, Means
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, RECIPE, REPORT, Folder, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.journal import partial_folder
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from vllm_w8a8_bismooth.conversion.head import notes_with_values
from vllm_w8a8_bismooth.conversion.part import PART
from vllm_w8a8_bismooth.engine import Silent
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.progress import Progress, silent
from vllm_w8a8_bismooth.recipe import INT8
from vllm_w8a8_bismooth.report.names import in_few_words
from vllm_w8a8_bismooth.verification import contents, served, sites
from vllm_w8a8_bismooth.verification.fidelity import Comparison, is_zero
from vllm_w8a8_bismooth.verification.schemes import KEY, Schemes, config_problems
from vllm_w8a8_bismooth.verification.structure import Structure


class Linear(TypedDict):
    """An INT8 linear: its group size (``None`` = per-channel), and in dB what it is against the folded source.

    ``sqnr`` is ``None`` without a source, or where nothing was lost.
    """

    group_size: int | None
    sqnr: float | None


@dataclass
class Verification:
    """What a check found.

    Attributes:
        folder: the checkpoint.
        findings: the faults. Files are named relative to the folder.
        notes: what could not be checked, or is unusual without being wrong.
        linears: what is known of each INT8 linear in which files and config agree.
        ignored: linears that are float, as config.json says.
        ours: whether bismooth made it, as config.json says.
        unscaled: with a source and ``ours``, the tensors seen to be the source's, up to rounding, outside the blocks
            and where blocks write into the residual stream; all of them if nothing is wrong.
    """

    folder: Path
    findings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    linears: dict[str, Linear] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    ours: bool = False
    unscaled: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            # Nobody has published what was made here: it is to be made, or copied, once more.
            remedy = contents.AGAIN if self.ours and problem.remedy.startswith("download") else problem.remedy
            where = problem.where.removeprefix(f"{self.folder}/")
            self.findings.append(replace(problem, where=where, remedy=remedy))


def verify(
    folder: str | Path,
    against: str | Path | Folder | None = None,
    progress: Progress = silent,
    engine: bool = True,
    trusted: bool = False,
) -> Verification:
    """Check a converted checkpoint.

    Args:
        folder: the checkpoint, ours or another INT8 W8A8 one in compressed-tensors' ``int-quantized`` format.
        against: the checkpoint that it was made from; see :mod:`fidelity` for what is compared.
        progress: counts shards in the stage ``read``, blocks in the stage ``compare``, and vLLM's reading in ``vllm``.
        trusted: whether the model's own code may run, to find its sites again.
        engine: whether to ask vLLM, if it is installed and nothing else is wrong; that takes 10 to 20 seconds.

    Raises:
        BismoothError: ``folder`` is no folder of a checkpoint, or of one of others that is quantized in another way, or
            ``against`` no checkpoint that could be converted.
    """
    folder = Path(folder)
    _refuse_unfinished(folder)
    config = read_json(folder / CONFIG).get(KEY)
    marked = isinstance(config, dict) and MARKER in config
    found = Verification(folder, ours=marked)
    basis = _noted(found) if marked else None
    guessed = basis is not None and basis.by == NAMES  # by names they are found again: the code did not run then
    means = Means(known=basis, trusted=trusted and not guessed, progress=progress)
    head = marked and _head(folder)
    source = Source(against, replace(means, untied=head)) if against is not None else None
    if isinstance(config, dict) and not marked:
        found.notes.append(f"{CONFIG} lacks the key {MARKER}: not made by bismooth, its rounding is not judged")
    found.add(config_problems(config))
    schemes = _schemes(found, config)
    if isinstance(config, dict) and not marked:
        _refuse_unknown(found, schemes)
    try:
        checkpoint = Checkpoint(folder, dtypes=(*FLOAT_DTYPES, "I8"))
    except BismoothError as error:
        found.add(error.problems)
        found.notes.append("names, shapes and values were not checked: that needs files which can be opened")
        _compare_hashes(found, {path.name: sha256(path) for path in folder.glob("*.safetensors") if path.is_file()})
        return found
    structure = Structure(checkpoint, schemes, marked, means)
    found.add(structure.problems)
    if basis is not None and structure.layers:
        problems, notes = sites.compare(basis, structure.basis, checkpoint, means)
        found.add(problems)
        found.notes += notes
    found.linears = {name: {"group_size": size, "sqnr": None} for name, size in structure.linears.items()}
    found.ignored = structure.ignored
    values = contents.read(checkpoint, marked, progress)
    found.add(values.problems)
    exact = _compare_hashes(found, values.digests, checkpoint, source is None)
    unreadable = {problem.where for problem in values.problems}
    unreadable |= {name for name, packed in checkpoint.encodings.items() if unreadable & {*packed.parts}}
    if source is not None:
        exact = {name for name in values.silent if is_zero(source.checkpoint, name)}
    unreadable |= _judge_silent(found, values.silent, exact, source is not None)
    routers = {structure.names.block(i) + name for i, layer in enumerate(structure.layers) for name in layer.routers}
    if stored := sorted(routers & found.linears.keys()):
        found.notes.append(f"routers in INT8 ({in_few_words(stored)}): whether vLLM serves them so was not checked")
    if source is not None:
        _compare_source(found, source, checkpoint, unreadable, marked, head, progress)
    else:
        names = checkpoint.names
        strange = [n for n in checkpoint.headers if not n.startswith(names.blocks) and n not in structure.around]
        found.notes += [f"tensor {name} is outside the blocks and unknown; check it with --against" for name in strange]
    if not {structure.names.head, structure.names.embedding} & unreadable:
        found.notes += notes_with_values(checkpoint, structure.tied)
    if isinstance(config, dict):
        asked = [key for key in ("kv_cache_scheme", "sparsity_config") if config.get(key)]
        found.notes += [f"{KEY}.{key} in {CONFIG} asks vLLM for more, which was not checked" for key in asked]
    if engine:
        _ask_vllm(found, config, marked, structure, progress)
    return found


def _refuse_unfinished(folder: Path) -> None:
    """Raises :class:`BismoothError` where there is no more than a part of a checkpoint."""
    partial = partial_folder(folder)
    if not folder.exists() and partial.is_dir():
        remedy = "run the same bismooth convert again, which goes on from there"
        raise BismoothError.of(folder, f"its conversion has not ended, {partial.name} holds what is done", remedy)
    if (folder / PART).is_file():
        remedy = "bismooth merge makes a checkpoint of all its parts"
        raise BismoothError.of(folder, "a part of a checkpoint", remedy)


def _head(folder: Path) -> bool:
    """Whether the head was made INT8, by recipe.json; what is wrong with that is said elsewhere."""
    try:
        recipe = read_json(folder / RECIPE).get("recipe")
    except BismoothError:
        return False
    return isinstance(recipe, dict) and recipe.get("head") == INT8


def _noted(found: Verification) -> Basis | None:
    """What the layout rests on, by recipe.json."""
    try:
        return sites.noted(found.folder)
    except BismoothError as error:
        found.add(error.problems)
        return None


def _refuse_unknown(found: Verification, schemes: Schemes | None) -> None:
    """Raises :class:`BismoothError` for a checkpoint of others that is none of those that can be checked here.

    It may be in order all the same: what it holds would be called faults, and the remedies would spoil it.
    """
    what = found.findings[0].what if found.findings else schemes.unknown() if schemes is not None else None
    if what is not None:
        remedy = "it may be in order, but verify knows only INT8 with one scale per row or group, and per token"
        raise BismoothError.of(found.folder / CONFIG, f"not made by bismooth, and {what}", remedy)


def _schemes(found: Verification, config: object) -> Schemes | None:
    """``None`` where nothing can be read from the config."""
    try:
        return Schemes(config) if isinstance(config, dict) else None
    except BismoothError as error:
        found.add(error.problems)
        return None


def _compare_hashes(
    found: Verification, digests: dict[str, str], checkpoint: Checkpoint | None = None, alone: bool = False
) -> set[str]:
    """Compare the files with what the conversion noted; the weights of which it is known that nothing was lost."""
    try:
        noted = contents.Noted.of(found.folder)
    except BismoothError as error:
        found.add(error.problems)
        return set()
    if alone:  # else the source says it
        said = {problem.where for problem in found.findings}
        lost = contents.lost(found.folder, noted.beside)
        found.add(problem for problem in lost if Path(problem.where).parent.as_posix() not in said)
    if noted.digests is None:
        found.notes.append(f"{REPORT} is absent or holds no sha256: no hashes to compare the shards with")
        return set()
    found.add(contents.changed(noted.digests, digests))
    whole = {file for file, digest in digests.items() if noted.digests.get(file) == digest}
    headers = checkpoint.headers if checkpoint is not None else {}
    return {
        name
        for name in (f"{linear}.weight" for linear in noted.exact)
        if name in headers and headers[name].file in whole
    }


def _judge_silent(found: Verification, silent: list[str], exact: set[str], compared: bool) -> set[str]:
    """Linears that do nothing: a note where the source's do nothing either. Returns the weights that are at fault."""
    if right := [name.removesuffix(".weight") for name in silent if name in exact]:
        how = "as in the source" if compared else f"as in the source, by what {REPORT} says"
        found.notes.append(f"all weights are 0, {how}: {in_few_words(right)}")
    wrong = set(silent) - exact
    for name in sorted(wrong):
        what = "has no code but 0; the linear does nothing"
        if compared:
            found.add([Problem(name, f"{what}, and the source's does something", contents.AGAIN)])
        else:
            remedy = f"name the source with --against, in case its weights are 0 too; if not, {contents.AGAIN}"
            found.add([Problem(name, what, remedy)])
    return wrong


def _compare_source(
    found: Verification,
    source: Source,
    result: Checkpoint,
    unreadable: set[str],
    marked: bool,
    head: bool,
    progress: Progress,
) -> None:
    comparison = Comparison(source, result, {*found.linears, *found.ignored}, unreadable)
    comparison.files()
    comparison.outside(marked, head)
    comparison.blocks(marked, progress)
    found.add(comparison.problems)
    found.unscaled = comparison.unscaled if marked else []
    for name, linear in found.linears.items():
        linear["sqnr"] = comparison.sqnr.get(name)
    if not marked:
        found.notes.append("not made by bismooth: the linears' distance to the source was measured, not judged")


def _ask_vllm(found: Verification, config: Any, marked: bool, structure: Structure, progress: Progress) -> None:
    if not found.ok:
        found.notes.append("vLLM was not asked, because of the faults found before")
        return
    progress("vllm", 0, 1)
    try:
        found.add(served.problems(config, marked, structure))
        progress("vllm", 1, 1)
    except Silent as reason:
        found.notes.append(f"{reason}: its reading of the checkpoint was not checked")
