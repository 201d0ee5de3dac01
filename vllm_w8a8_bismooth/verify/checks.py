"""The check of a converted checkpoint: config, names and shapes, values, hashes, vLLM's own reading, and its source.

Everything that is wrong is collected; nothing stops at the first fault. Memory is bounded by a few pieces of tensors.
"""

import copy
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import FORMAT, MARKER
from vllm_w8a8_bismooth.checkpoint.architectures import BLOCK, EMBEDDING, HEAD, NORM, Layer
from vllm_w8a8_bismooth.checkpoint.audit import architecture_of, audit, layers_of, sizes_of
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, INDEX, REPORT, Folder, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from vllm_w8a8_bismooth.convert.part import PART
from vllm_w8a8_bismooth.engine import Silent, ask
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.verify import fidelity

AGAIN = "copy the file again from where it is whole, or convert the source again"
_KEY, _SCALE = "quantization_config", ".weight_scale"
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 127

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``: shards of stage ``read``, blocks of stage ``compare``."""


@dataclass(frozen=True)
class Finding:
    """One fault: the tensor or file, what is wrong with it (with the value), and the remedy."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


@dataclass
class Verification:
    """What a check found.

    Attributes:
        folder: the checkpoint.
        findings: the faults.
        notes: what could not be checked, or is unusual without being wrong.
        linears: INT8 linear -> ``group_size`` (``None`` = per-channel) and ``sqnr`` in dB against the folded source
            (``None`` without a source, or where nothing was lost).
        ignored: linears that are float, as config.json says.
    """

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def fault(self, where: str, what: str, remedy: str = AGAIN) -> None:
        self.findings.append(Finding(where, what, remedy))

    def quote(self, message: str) -> None:
        """Take over another module's sentence: ``tensor NAME what is wrong; remedy``, or ``FILE: what; remedy``."""
        what, _, remedy = message.removeprefix(f"{self.folder}/").rpartition("; ")
        what, remedy = (what, remedy) if what else (remedy, AGAIN)
        parts = re.match(r"tensor (\S+) (.*)", what, re.DOTALL) or re.match(r"(\S+): (.*)", what, re.DOTALL)
        self.fault(*(parts.groups() if parts else (CONFIG, what)), remedy)


def verify(
    folder: Path,
    against: Path | Folder | None = None,
    progress: Progress = lambda stage, done, total: None,
    engine: bool = True,
) -> Verification:
    """Check a converted checkpoint.

    Args:
        folder: the checkpoint, ours or another INT8 W8A8 one in compressed-tensors' ``int-quantized`` format.
        against: the checkpoint that it was made from; see :mod:`fidelity` for what is compared.
        progress: see :data:`Progress`.
        engine: whether to ask vLLM, if it is installed and nothing else is wrong; that takes 10 to 20 seconds.

    Raises:
        BismoothError: ``folder`` is no folder of a checkpoint, or ``against`` no checkpoint that could be converted.
    """
    if (folder / PART).is_file():
        raise BismoothError(f"{folder}: a part of a checkpoint; bismooth merge makes a checkpoint of all its parts")
    config = read_json(folder / CONFIG)
    source = Source(against) if against is not None else None
    found = Verification(folder)
    schemes = _config(found, config.get(_KEY))
    marked = isinstance(config.get(_KEY), dict) and MARKER in config[_KEY]
    try:
        checkpoint = Checkpoint(folder, dtypes=(*FLOAT_DTYPES, "I8"))
    except BismoothError as error:
        found.quote(str(error))
        found.notes.append("names, shapes and values were not checked: that needs files which can be opened")
        _hashes(found, {path.name: sha256(path) for path in folder.glob("*.safetensors") if path.is_file()})
        return found
    layers = _layers(found, checkpoint)
    found.linears = {name: {"group_size": g, "sqnr": None} for name, g in _linears(found, checkpoint, schemes, marked)}
    _names(found, checkpoint, layers, schemes, marked)
    _index(found, checkpoint)
    digests, unreadable = _contents(found, checkpoint, marked, progress)
    _hashes(found, digests)
    if source is not None:
        linears = found.linears | {name: {} for name in found.ignored}
        comparison = fidelity.Comparison(source, checkpoint, linears, unreadable, found.fault)
        comparison.files()
        comparison.outside()
        comparison.blocks(marked, progress)
        if not marked:
            found.notes.append("not made by bismooth: the linears' distance to the source was measured, not judged")
    else:
        known = (EMBEDDING, NORM, HEAD)
        strange = [n for n in checkpoint.headers if not n.startswith(BLOCK.format("")[:-1]) and n not in known]
        found.notes += [
            f"tensor {name} is outside the blocks and unknown; only --against tells more" for name in strange
        ]
    if engine:
        _ask_vllm(found, config.get(_KEY), layers, marked)
    return found


class _Schemes:
    """What ``quantization_config`` says of each linear, as compressed-tensors itself reads and matches it.

    Raises:
        Exception: whatever that library or ``re`` says of a config that cannot be read.
    """

    def __init__(self, config: Mapping[str, Any]):
        from compressed_tensors.quantization import QuantizationConfig

        parsed = QuantizationConfig.model_validate(copy.deepcopy(config))
        self._linear = torch.nn.Linear(1, 1, bias=False, device="meta")
        self._ignore = parsed.ignore or []
        self._targets: dict[str, Any] = {}
        for scheme in parsed.config_groups.values():
            for target in scheme.targets:
                self._targets.setdefault(target, scheme)
        for pattern in (*self._ignore, *self._targets):
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")

    def of(self, linear: str) -> tuple[bool, int | None]:
        """Whether a linear is INT8, and its group size (``None`` = per-channel).

        Raises:
            ValueError: it is quantized in another way, named by the message.
        """
        from compressed_tensors.utils.match import is_match, match_targets

        matched = match_targets(linear, self._linear, self._targets)
        if not matched or is_match(linear, self._linear, self._ignore):
            return False, None
        weights, inputs = self._targets[matched[0]].weights, self._targets[matched[0]].input_activations
        for side, arguments, dynamic in (("weights", weights, False), ("input_activations", inputs, True)):
            if arguments is None:
                raise ValueError(f"target {matched[0]!r} leaves {side} in float; it is not W8A8")
            kind = (arguments.num_bits, arguments.type, bool(arguments.symmetric), bool(arguments.dynamic))
            if kind != (8, "int", True, dynamic):
                raise ValueError(
                    f"target {matched[0]!r} has {side} of num_bits, type, symmetric, dynamic = {kind}; "
                    f"expected {(8, 'int', True, dynamic)}"
                )
        strategies = (weights.strategy, inputs.strategy)
        if strategies == ("channel", "token"):
            return True, None
        if strategies == ("group", "token") or (
            strategies == ("group", "group") and weights.group_size == inputs.group_size
        ):
            return True, weights.group_size
        raise ValueError(
            f"target {matched[0]!r} has strategies {strategies} with group_size {weights.group_size} and "
            f"{inputs.group_size}; expected channel and token, or group and group of one size"
        )


def _config(found: Verification, config: Any) -> _Schemes | None:
    """Check ``quantization_config`` by itself; ``None`` where nothing can be read from it."""
    if not isinstance(config, dict):
        found.fault(CONFIG, f"{_KEY} is {config!r}: not a quantized checkpoint", "give the folder of a converted one")
        return None
    if MARKER not in config:
        found.notes.append(f"{CONFIG} lacks the key {MARKER}: not made by bismooth, its rounding is not judged")
    for key, expected in (("quant_method", "compressed-tensors"), ("format", FORMAT)):
        if config.get(key) != expected:
            found.fault(CONFIG, f"{_KEY}.{key} is {config.get(key)!r}, not {expected!r}", "convert the source again")
    try:
        return _Schemes(config)
    except Exception as error:  # of the library, whose kinds are its own
        lines = " ".join(str(error).split())
        found.fault(CONFIG, f"{_KEY} is not read by compressed-tensors ({lines})", "convert the source again")
        return None


def _layers(found: Verification, checkpoint: Checkpoint) -> list[Layer]:
    """What each block should hold, after the audit of names and shapes; empty if the config does not tell."""
    config = {k: v for k, v in checkpoint.config.items() if k not in (_KEY, "compression_config")}
    shapes = {name: header.shape for name, header in checkpoint.headers.items() if not name.endswith(_SCALE)}
    try:
        architecture = architecture_of(config)
        sizes = sizes_of(config, architecture)
        for problem in audit(config, architecture, sizes, shapes):
            found.quote(problem)
        if max(sizes["blocks"], sizes.get("experts", 0)) <= len(shapes):  # else the audit has said so
            return layers_of(config, architecture, sizes, sizes["blocks"])
    except BismoothError as error:
        found.quote(str(error))
    return []


def _linears(
    found: Verification, checkpoint: Checkpoint, schemes: _Schemes | None, marked: bool
) -> Iterator[tuple[str, int | None]]:
    """Check every INT8 weight with its scales; yields those in which files and config agree, with the group size."""
    headers = checkpoint.headers
    for name, header in headers.items():
        if not name.endswith(".weight") or header.dtype != "I8":
            continue
        linear = name.removesuffix(".weight")
        scale = headers.get(f"{name}_scale")
        if len(header.shape) != 2:
            found.fault(name, f"is INT8 of shape {list(header.shape)}; only matrices can be", "convert again")
            continue
        if scale is None:
            found.fault(f"{name}_scale", f"is missing; {name} is INT8", AGAIN)
            continue
        rows, columns = header.shape
        try:
            quantized, group_size = schemes.of(linear) if schemes is not None else (True, _group_size(header, scale))
        except ValueError as error:
            found.fault(linear, f"{CONFIG}: {error}", "convert the source again")
            continue
        if not quantized:
            found.fault(
                linear,
                f"is stored as INT8, but {CONFIG} leaves it in float (by {_KEY}.ignore, or no target names it)",
                f"mend {CONFIG} or convert the source again",
            )
            continue
        shape = (rows, 1) if group_size is None else (rows, columns // group_size)
        if scale.shape != shape or (group_size is not None and columns % group_size):
            says = "per-channel" if group_size is None else f"per group of {group_size} columns"
            found.fault(
                f"{name}_scale",
                f"has shape {list(scale.shape)}; {CONFIG} says {says}, which is {list(shape)} for {rows} x {columns}",
                "mend the targets in config.json or convert the source again",
            )
            continue
        if scale.dtype not in (("F32",) if marked else FLOAT_DTYPES):
            found.fault(f"{name}_scale", f"has dtype {scale.dtype}, not F32", "convert the source again")
            continue
        yield linear, group_size


def _group_size(weight, scale) -> int | None:
    """What the shapes alone say, where no config does."""
    groups = scale.shape[-1] if scale.shape else 1
    return None if groups == 1 else max(1, weight.shape[1] // max(1, groups))


def _names(
    found: Verification,
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    schemes: _Schemes | None,
    marked: bool,
) -> None:
    """Check that INT8 is what should be, that float is what config.json leaves in float, and that siblings agree.

    Notes the linears that are float.
    """
    headers = checkpoint.headers
    linears = {BLOCK.format(i) + n: n in layer.experts for i, layer in enumerate(layers) for n in layer.linears}
    modules = {*linears, *(BLOCK.format(i) + n for i, layer in enumerate(layers) for n in layer.routers)}
    modules |= {HEAD.removesuffix(".weight")}
    for name, header in headers.items():
        module = name.removesuffix("_scale").removesuffix(".weight")
        if name.endswith(_SCALE):
            weight = headers.get(f"{module}.weight")
            if weight is None or weight.dtype != "I8":
                found.fault(name, f"is the scale of no INT8 weight ({module}.weight)", "remove it or convert again")
        elif header.dtype == "I8" and layers and not (name.endswith(".weight") and module in modules):
            found.fault(name, "is INT8, but no linear", "convert the source again")
        elif header.dtype != "I8" and name.endswith(".weight") and module in modules:
            if schemes is not None and not _is_quantized(schemes, module):
                if module in linears:
                    found.ignored.append(module)
            elif marked and module in linears:
                found.fault(name, f"is stored as {header.dtype}, not INT8", "convert the source again")
            elif schemes is not None:
                found.fault(
                    module,
                    f"is stored as {header.dtype}, but {CONFIG} says INT8",
                    f"name it in {_KEY}.ignore or convert the source again",
                )
    for i, layer in enumerate(layers):
        for fused, parts in layer.fused.items():
            _check_siblings(found, BLOCK.format(i), fused, parts, schemes if marked else None)
        experts = {BLOCK.format(i) + n for n in layer.experts}
        if 0 < len(floats := sorted(experts.intersection(found.ignored))) < len(experts):
            found.fault(
                floats[0],
                f"is float as {len(floats)} of its block's {len(experts)} experts' linears; vLLM serves all alike",
                "convert again",
            )
    for linear, entry in found.linears.items():
        if entry["group_size"] is not None and linears.get(linear):
            found.fault(linear, "is an expert with per-group scales, which vLLM does not serve", "convert again")


def _is_quantized(schemes: _Schemes, module: str) -> bool:
    try:
        return schemes.of(module)[0]
    except ValueError:
        return True


def _check_siblings(
    found: Verification, block: str, fused: str, parts: Sequence[str], schemes: _Schemes | None
) -> None:
    """vLLM merges ``parts`` into ``fused``: they must have one granularity, which that name must be given too."""
    kinds = {part: (True, found.linears[block + part]["group_size"]) for part in parts if block + part in found.linears}
    kinds |= {part: (False, None) for part in parts if block + part in found.ignored}
    if len(kinds) < len(parts):
        return
    if len(set(kinds.values())) > 1:
        found.fault(block + fused, f"its parts differ in (INT8, group_size): {kinds}; vLLM fuses them", "convert again")
    elif schemes is not None:
        try:
            answer = schemes.of(block + fused)
        except ValueError as error:
            answer = error
        if answer != next(iter(kinds.values())):
            found.fault(
                block + fused,
                f"{CONFIG} gives the name under which vLLM fuses {', '.join(parts)} another granularity ({answer})",
                "convert the source again",
            )


def _index(found: Verification, checkpoint: Checkpoint) -> None:
    """Check the index's total, and that no shard lies beside those that it names (vLLM reads them all)."""
    files = {header.file for header in checkpoint.headers.values()}
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        if path.name not in files:
            found.fault(path.name, "holds no tensor of this checkpoint, but lies in its folder", "remove it")
    if not (checkpoint.folder / INDEX).exists():
        return
    metadata = read_json(checkpoint.folder / INDEX).get("metadata")
    stored = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(header.nbytes for header in checkpoint.headers.values())
    if stored != total:
        found.fault(INDEX, f"metadata.total_size is {stored!r}, the tensors have {total} bytes", AGAIN)


def _contents(
    found: Verification, checkpoint: Checkpoint, marked: bool, progress: Progress
) -> tuple[dict[str, str], set[str]]:
    """Read every shard once; returns its SHA-256 and the tensors with values that cannot be worked with."""
    files: dict[str, list[str]] = {}
    for name in sorted(checkpoint.headers, key=lambda name: checkpoint.headers[name].offset):
        files.setdefault(checkpoint.headers[name].file, []).append(name)
    digests, bad = {}, set()
    with Threads() as threads:
        shards = threads.map(lambda file: _read_shard(checkpoint, file, files[file], marked), files)
        for done, (file, (digest, problems)) in enumerate(zip(files, shards, strict=True), 1):
            digests[file] = digest
            for name, what in problems:
                bad.add(name)
                found.quote(what) if what.startswith("tensor ") else found.fault(name, what)
            progress("read", done, len(files))
    return digests, bad


def _read_shard(
    checkpoint: Checkpoint, file: str, names: Sequence[str], marked: bool
) -> tuple[str, list[tuple[str, str]]]:
    """SHA-256 of a shard, and what is wrong with the values in it, as (tensor, sentence)."""
    path, digest, problems, whole = checkpoint.folder / file, hashlib.sha256(), [], True
    with open(path, "rb") as head:
        digest.update(head.read(checkpoint.headers[names[0]].offset))
    for name in names:
        try:
            problems += [(name, what) for what in _values(checkpoint, name, digest, marked)]
        except Interrupted:
            raise
        except BismoothError as error:  # NaN or infinity; the rest of the tensor has not been read
            problems.append((name, str(error)))
            whole = False
    return digest.hexdigest() if whole else sha256(path), problems


def _values(checkpoint: Checkpoint, name: str, digest, marked: bool) -> Iterator[str]:
    """What is wrong with the finite values of one tensor."""
    header, first, used, count, example = checkpoint.headers[name], 0, False, 0, ""
    is_scale = name.endswith(_SCALE)
    for piece in checkpoint.pieces(name, digest):
        wrong = None
        if header.dtype == "I8":
            low, high = piece.aminmax()
            used = used or bool(low) or bool(high)
            wrong = piece == -128 if marked and low == -128 else None  # others may use it
        elif is_scale:
            wrong = (piece < _SMALLEST) | (piece > _LARGEST)
        if wrong is not None and wrong.any():
            at = int(wrong.nonzero()[0])
            place = [int(i) for i in torch.unravel_index(torch.tensor(first + at), header.shape)]
            example = example or f"{piece[at].item()} at {place}"
            count += int(wrong.sum())
        first += len(piece)
    if count:
        says = "scales outside 1.2e-38 to 2.7e36" if is_scale else "codes outside -127 to 127"
        yield f"holds {says}: {example} ({count} such values)"
    if header.dtype == "I8" and first and not used:
        yield "has no code but 0; the linear does nothing"


def _hashes(found: Verification, digests: Mapping[str, str]) -> None:
    """Compare each shard's SHA-256 with the one that the conversion noted."""
    path = found.folder / REPORT
    if not path.exists():
        found.notes.append(f"{path.name} is absent: no hashes to compare the shards with")
        return
    try:
        noted = read_json(path).get("sha256")
    except BismoothError as error:
        return found.quote(str(error))
    if not isinstance(noted, dict):
        found.notes.append(f"{path.name} holds no sha256: no hashes to compare the shards with")
        return
    for file in sorted(noted.keys() | digests.keys()):
        if file not in digests:
            found.fault(file, f"is named by {path.name} but absent")
        elif file not in noted:
            found.fault(file, f"is not among the shards that {path.name} names")
        elif noted[file] != digests[file]:
            found.fault(file, f"has SHA-256 {digests[file]}, {path.name} noted {noted[file]} when it was written")


def _ask_vllm(found: Verification, config: Mapping[str, Any], layers: Sequence[Layer], marked: bool) -> None:
    """Let the installed vLLM, in a process of its own, say what it would do with each linear."""
    if not found.ok:
        found.notes.append("vLLM was not asked, because of the faults found before")
        return
    grouped = any(entry["group_size"] is not None for entry in found.linears.values())
    routers = (BLOCK.format(i) + n for i, layer in enumerate(layers) for n in layer.routers)
    request = {
        "config": config,
        "marked": marked,
        "methods": ["w8a8_bismooth"] if grouped else ["compressed-tensors", "w8a8_bismooth"],
        "linears": {name: found.linears[stored]["group_size"] for name, stored in _served(found.linears, layers)},
        "float": sorted({"lm_head", *routers, *(name for name, _ in _served(found.ignored, layers))}),
        "fused": {_last(f): [_last(p) for p in parts] for layer in layers for f, parts in layer.fused.items()},
    }
    try:
        problems = ask("probe", request)
    except Silent as reason:
        found.notes.append(f"{reason}: its reading of the checkpoint was not checked")
        return
    for where, what in problems:
        found.fault(where, what, "mend config.json, or use a vLLM from 0.26 to 0.33")


def _served(linears: Collection[str], layers: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    """Linears by the names that they have in vLLM, and by their own; of experts, the first, as vLLM asks it."""
    for i, layer in enumerate(layers):
        block = BLOCK.format(i)
        name_of = {part: fused for fused, parts in layer.fused.items() for part in parts}
        for linear in layer.linears:
            if (linear not in layer.experts or ".experts.0." in linear) and block + linear in linears:
                yield block + name_of.get(linear, linear), block + linear


def _last(name: str) -> str:
    return name.rpartition(".")[2]
