"""The whole check, from the config to the source, and what it found."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from vllm_w8a8_bismooth import MARKER
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, REPORT, Folder, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from vllm_w8a8_bismooth.conversion.part import PART
from vllm_w8a8_bismooth.engine import Silent
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.progress import Progress, silent
from vllm_w8a8_bismooth.verification import contents, served
from vllm_w8a8_bismooth.verification.fidelity import Comparison
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
    """

    folder: Path
    findings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    linears: dict[str, Linear] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def add(self, problems: Iterable[Problem]) -> None:
        self.findings += (replace(p, where=p.where.removeprefix(f"{self.folder}/")) for p in problems)


def verify(
    folder: Path,
    against: Path | Folder | None = None,
    progress: Progress = silent,
    engine: bool = True,
) -> Verification:
    """Check a converted checkpoint.

    Args:
        folder: the checkpoint, ours or another INT8 W8A8 one in compressed-tensors' ``int-quantized`` format.
        against: the checkpoint that it was made from; see :mod:`fidelity` for what is compared.
        progress: counts shards in the stage ``read``, blocks in the stage ``compare``.
        engine: whether to ask vLLM, if it is installed and nothing else is wrong; that takes 10 to 20 seconds.

    Raises:
        BismoothError: ``folder`` is no folder of a checkpoint, or ``against`` no checkpoint that could be converted.
    """
    if (folder / PART).is_file():
        remedy = "bismooth merge makes a checkpoint of all its parts"
        raise BismoothError.of(folder, "a part of a checkpoint", remedy)
    config = read_json(folder / CONFIG).get(KEY)
    source = Source(against) if against is not None else None
    found = Verification(folder)
    marked = isinstance(config, dict) and MARKER in config
    if isinstance(config, dict) and not marked:
        found.notes.append(f"{CONFIG} lacks the key {MARKER}: not made by bismooth, its rounding is not judged")
    found.add(config_problems(config))
    schemes = _schemes(found, config)
    try:
        checkpoint = Checkpoint(folder, dtypes=(*FLOAT_DTYPES, "I8"))
    except BismoothError as error:
        found.add(error.problems)
        found.notes.append("names, shapes and values were not checked: that needs files which can be opened")
        _compare_hashes(found, {path.name: sha256(path) for path in folder.glob("*.safetensors") if path.is_file()})
        return found
    structure = Structure(checkpoint, schemes, marked)
    found.add(structure.problems)
    found.linears = {name: {"group_size": size, "sqnr": None} for name, size in structure.linears.items()}
    found.ignored = structure.ignored
    digests, bad_values = contents.read(checkpoint, marked, progress)
    found.add(bad_values)
    _compare_hashes(found, digests)
    if source is not None:
        _compare_source(found, source, checkpoint, {problem.where for problem in bad_values}, marked, progress)
    else:
        names = checkpoint.names
        known = (names.embedding, names.norm, names.head)
        strange = [n for n in checkpoint.headers if not n.startswith(names.blocks) and n not in known]
        found.notes += [f"tensor {name} is outside the blocks and unknown; check it with --against" for name in strange]
    if engine:
        _ask_vllm(found, config, marked, structure)
    return found


def _schemes(found: Verification, config: object) -> Schemes | None:
    """``None`` where nothing can be read from the config."""
    try:
        return Schemes(config) if isinstance(config, dict) else None
    except BismoothError as error:
        found.add(error.problems)
        return None


def _compare_hashes(found: Verification, digests: dict[str, str]) -> None:
    try:
        noted = contents.noted(found.folder)
    except BismoothError as error:
        found.add(error.problems)
        return
    if noted is None:
        found.notes.append(f"{REPORT} is absent or holds no sha256: no hashes to compare the shards with")
    else:
        found.add(contents.changed(noted, digests))


def _compare_source(
    found: Verification, source: Source, result: Checkpoint, unreadable: set[str], marked: bool, progress: Progress
) -> None:
    comparison = Comparison(source, result, {*found.linears, *found.ignored}, unreadable)
    comparison.files()
    comparison.outside()
    comparison.blocks(marked, progress)
    found.add(comparison.problems)
    for name, linear in found.linears.items():
        linear["sqnr"] = comparison.sqnr.get(name)
    if not marked:
        found.notes.append("not made by bismooth: the linears' distance to the source was measured, not judged")


def _ask_vllm(found: Verification, config: Any, marked: bool, structure: Structure) -> None:
    if not found.ok:
        found.notes.append("vLLM was not asked, because of the faults found before")
        return
    try:
        found.add(served.problems(config, marked, structure))
    except Silent as reason:
        found.notes.append(f"{reason}: its reading of the checkpoint was not checked")
