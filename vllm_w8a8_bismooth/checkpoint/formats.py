"""Checkpoints in FP8, FP4 and packed INT8: which of their tensors together are a weight.

To everybody else such a weight is a tensor under its own name, of INT8 if it is packed, else a float one. What it is
stored in does not appear, nor do the scales of its inputs and of the KV cache, which mean nothing once it is float.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

from vllm_w8a8_bismooth import NAME, ROWS_FORMAT
from vllm_w8a8_bismooth.checkpoint.encodings import (
    GROUP,
    LOW,
    MULTIPLIER,
    OFFSET,
    PACKED,
    WIDE,
    Encoding,
    Fp8,
    Mxfp4,
    PackedRows,
)
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.errors import Problem

KEYS = ("quantization_config", "compression_config")
"""Under which a config says how weights are stored."""
FP8 = "F8_E4M3"
_FLOATS = ("F32", "BF16", "F16")
_BYTES = "U8"
_WEIGHT = ".weight"
_SCALES = ("_scale_inv", "_scale")
"""What is behind a weight's name in that of its scales."""
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", ".q_scale", ".k_scale", ".v_scale")
_BLOCKS, _EXPONENTS = "_blocks", "_scales"
_PARTS = (PACKED, MULTIPLIER, OFFSET, WIDE, LOW)
_AGAIN = "download the checkpoint again, as its publisher stores it"

Block = tuple[int, int]
"""How many rows and columns share a scale."""


class Shaped(Protocol):
    """What counts of a tensor's header, a dataclass: shape, dtype as safetensors names it, bytes."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


Tensor = TypeVar("Tensor", bound=Shaped)


@dataclass
class Weights:
    """The weights of a checkpoint that are stored in FP8, FP4 or packed INT8.

    Attributes:
        encodings: name -> how it is stored; none if the config names no format that is known here.
        hidden: stored tensors that do not appear under their own names.
        lost: weights that cannot be read; there is a problem for each.
        problems: what does not fit.
        are_float: whether they appear as floats, so that the checkpoint can be converted.
    """

    encodings: dict[str, Encoding] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    are_float: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], stored: Mapping[str, Shaped], lost: Collection[str]) -> "Weights":
        """Those of a checkpoint.

        Args:
            config: of the checkpoint.
            stored: the tensors in its files.
            lost: tensors that are known to be missing, for which there is a problem already.
        """
        found = cls()
        for key in KEYS:
            says = _dict(config.get(key))
            method = says.get("quant_method")
            if not isinstance(method, str) or method not in _FORMATS:
                continue
            known, find = _FORMATS[method]
            found.are_float = method != NAME
            try:
                blocks = known(says)
            except ValueError as error:
                found.problems.append(Problem(CONFIG, f"{key}: {error}", "mend it"))
                found.lost |= {name for name in stored if stored[name].dtype == FP8}
                found.hidden |= {name for name in stored if _part_of(name)}
                continue
            if blocks is not None:
                find(found, blocks, stored, lost)
        if found.encodings and found.are_float:
            found.hidden |= {name for name in stored if name.endswith(_OF_ACTIVATIONS)}
        return found

    def __bool__(self) -> bool:
        """Whether the checkpoint is in such a format, however damaged."""
        return bool(self.encodings or self.hidden or self.lost or self.problems)

    def shown(self, stored: Mapping[str, Tensor], dtype: str, size: int) -> dict[str, Tensor]:
        """The tensors as others see them, in the order of the files: each weight is where its codes are.

        Args:
            stored: the tensors in the files.
            dtype, size: of the weights that are float, as safetensors names it, and in bytes.
        """
        names = {encoding.codes: name for name, encoding in self.encodings.items()}
        found = {}
        for name, header in stored.items():
            if (weight := names.get(name)) is not None:
                shape, is_float = self.encodings[weight].shape, self.encodings[weight].is_float
                kind, each = (dtype, size) if is_float else ("I8", 1)
                found[weight] = replace(header, shape=shape, dtype=kind, nbytes=each * math.prod(shape))
            elif name not in self.hidden and name not in self.lost:
                found[name] = header
        return found

    def words(self) -> str | None:
        """How those are stored that appear as floats; ``None`` if there are none."""
        return " and ".join(sorted({words for each in self.encodings.values() if (words := each.words())})) or None

    def add(self, name: str, encoding: Encoding) -> None:
        self.encodings[name] = encoding
        self.hidden |= {*encoding.parts} - {name}

    def fault(self, names: Sequence[str], what: str) -> None:
        """One problem for all tensors of which the same is to be said."""
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            self.problems.append(Problem(names[0], what + more, _AGAIN))


def _find_fp8(found: Weights, blocks: Sequence[Block], stored: Mapping[str, Shaped], lost: Collection[str]) -> None:
    """Matrices in FP8 that have ``weight_scale_inv`` or ``weight_scale`` beside them."""
    bare: list[str] = []
    unfit: dict[str, str] = {}
    for name, codes in stored.items():
        if codes.dtype != FP8 or not name.endswith(_WEIGHT):
            continue
        beside = [name + end for end in _SCALES]
        scales = next((other for other in beside if other in stored), None)
        if scales is None:
            bare += [] if any(other in lost for other in beside) else [name]
            found.lost.add(name)
        elif problem := _unfit(name, codes.shape, stored[scales], blocks):
            unfit[scales] = problem
            found.hidden.add(scales)
            found.lost.add(name)
        else:
            block = _shared_by(codes.shape, blocks)[stored[scales].shape]
            found.add(name, Fp8(name, scales, codes.shape, block))
    found.fault(bare, f"has dtype {FP8}, and neither {' nor '.join('weight' + end for end in _SCALES)} is beside it")
    found.fault([*unfit], next(iter(unfit.values()), ""))
    _find_stray_scales(found, stored, lost)


def _shared_by(shape: tuple[int, ...], blocks: Sequence[Block]) -> dict[tuple[int, ...], Block]:
    """Shapes that the scales of a matrix may have -> how many of its rows and columns share one."""
    if len(shape) != 2 or 0 in shape:
        return {}
    rows, columns = shape
    return {
        **dict.fromkeys([(rows,), (rows, 1)], (1, columns)),
        **dict.fromkeys([(), (1,), (1, 1)], (rows, columns)),
        **{(math.ceil(rows / high), math.ceil(columns / wide)): (high, wide) for high, wide in blocks},
    }


def _unfit(name: str, shape: tuple[int, ...], scales: Shaped, blocks: Sequence[Block]) -> str | None:
    """Why a matrix cannot be read with its scales, if that is so."""
    if scales.dtype not in _FLOATS:
        return f"has dtype {scales.dtype}; scales of FP8 are read in {', '.join(_FLOATS)}"
    if scales.shape in _shared_by(shape, blocks):
        return None
    each = " or ".join(["matrix", "row", *(f"block of {high} x {wide}" for high, wide in blocks)])
    return f"has shape {list(scales.shape)}, which is no scale for each {each} of {name} {list(shape)}"


def _find_stray_scales(found: Weights, stored: Mapping[str, Shaped], lost: Collection[str]) -> None:
    """Scales whose weights are absent, float, or have others: some of the files are another checkpoint's."""
    alone: list[str] = []
    second: list[str] = []
    untrue: dict[str, str] = {}
    for name in stored:
        weight = next((name.removesuffix(end) for end in _SCALES if name.endswith(_WEIGHT + end)), None)
        if weight is None or name in found.hidden:
            continue
        found.hidden.add(name)
        if weight not in stored:
            alone += [] if weight in lost else [name]
        elif stored[weight].dtype in _FLOATS:
            untrue[weight] = f"has dtype {stored[weight].dtype}, and a scale is beside it, as beside weights in {FP8}"
        elif weight in found.encodings:
            second.append(name)
    found.fault(alone, "is the scale of a weight that is not there")
    found.fault(second, "is a scale beside another one of the same weight")
    found.fault([*untrue], next(iter(untrue.values()), ""))


def _find_mxfp4(found: Weights, _: Sequence[Block], stored: Mapping[str, Shaped], lost: Collection[str]) -> None:
    """Stacked experts in MXFP4: ``down_proj_blocks`` and ``down_proj_scales`` are ``down_proj``."""
    for codes, header in stored.items():
        if not codes.endswith(_BLOCKS) or header.dtype != _BYTES:
            continue
        name = codes.removesuffix(_BLOCKS)
        scales, shape = name + _EXPONENTS, header.shape
        exponents = stored.get(scales)
        found.hidden |= {codes, scales}
        if exponents is None:
            found.fault([] if scales in lost else [codes], f"is MXFP4, and {scales} is not there")
        elif len(shape) != 4 or 0 in shape or shape[3] != GROUP // 2:
            found.fault([codes], f"has shape {list(shape)}; MXFP4 has [experts, rows, groups, {GROUP // 2}]")
        elif (exponents.dtype, exponents.shape) != (_BYTES, shape[:3]):
            here = f"{exponents.dtype} {list(exponents.shape)}"
            found.fault([scales], f"is {here}, and {codes} implies {_BYTES} {list(shape[:3])}")
        elif name in stored:
            found.fault([name], f"is stored as float, and as MXFP4 in {codes}")
        else:
            found.add(name, Mxfp4(codes, scales, (shape[0], shape[2] * GROUP, shape[1])))
            continue
        found.lost.add(name)


def _find_rows(found: Weights, blocks: Sequence[Block], stored: Mapping[str, Shaped], lost: Collection[str]) -> None:
    """INT8 weights of packed rows: ``weight_packed`` and what is beside it are ``weight``."""
    ((_, group_size),) = blocks
    missing: list[str] = []
    unfit: dict[str, str] = {}
    parts: dict[str, dict[str, Shaped]] = {}
    for name, header in stored.items():
        if end := _part_of(name):
            parts.setdefault(name.removesuffix(end), {})[end] = header
            found.hidden.add(name)
    for name, here in parts.items():
        needed = [PACKED, MULTIPLIER, OFFSET, *((WIDE, LOW) if WIDE in here or LOW in here else ())]
        absent = [name + end for end in needed if end not in here]
        if absent:
            missing += [] if any(part in lost for part in absent) else absent[:1]
        elif problem := _misfit(name, here, group_size):
            unfit |= problem
        elif name in stored:
            unfit[name] = f"is stored as it is, and packed in {name}{PACKED}"
        else:
            rows, half = here[PACKED].shape
            wide = here[WIDE].shape[0] if WIDE in here else 0
            found.add(name, PackedRows(name, (rows, 2 * half), 2 * half // group_size, wide))
            continue
        found.lost.add(name)
    found.fault(missing, "is missing, while other parts of its weight are there")
    found.fault([*unfit], next(iter(unfit.values()), ""))


def _part_of(name: str) -> str | None:
    """What a tensor is of a packed weight, by its name."""
    return next((end for end in _PARTS if name.endswith(_WEIGHT + end)), None)


def _misfit(name: str, here: Mapping[str, Shaped], group_size: int) -> dict[str, str]:
    """The first part of a packed weight that cannot be read with the others, and why, if there is one."""
    packed = here[PACKED]
    if packed.dtype != _BYTES or len(packed.shape) != 2 or 0 in packed.shape:
        return {name + PACKED: f"is {packed.dtype} {list(packed.shape)}; packed rows are {_BYTES} [N, K / 2]"}
    rows, half = packed.shape
    if 2 * half % group_size:
        return {name + PACKED: f"has K = {2 * half}, which is not a multiple of group_size = {group_size}"}
    groups = (rows, 2 * half // group_size)
    expected = {MULTIPLIER: (_BYTES, groups), OFFSET: ("I8", groups)}
    if WIDE in here:
        wide = here[WIDE].shape
        if here[WIDE].dtype != "I32" or len(wide) != 1 or not 0 < wide[0] <= rows:
            return {name + WIDE: f"is {here[WIDE].dtype} {list(wide)}; it numbers some of {rows} rows in I32"}
        expected[LOW] = (_BYTES, (*wide, half))
    for end, (dtype, shape) in expected.items():
        if (here[end].dtype, here[end].shape) != (dtype, shape):
            told = f"is {here[end].dtype} {list(here[end].shape)}"
            return {name + end: f"{told}, and the parts beside it imply {dtype} {list(shape)}"}
    return {}


def _block(size: object) -> Block:
    """A size of blocks, as configs have it.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(size, list) or len(size) != 2 or not all(type(number) is int and number > 0 for number in size):
        raise ValueError(f"{size!r} is no size of blocks, which is two positive integers")
    return size[0], size[1]


def _of_fp8(says: Mapping[str, Any]) -> list[Block]:
    size = says.get("weight_block_size")
    return [] if size is None else [_block(size)]


def _of_compressed_tensors(says: Mapping[str, Any]) -> list[Block] | None:
    if says.get("format") != "float-quantized":
        return None
    weights = [_dict(_dict(group).get("weights")) for group in _dict(says.get("config_groups")).values()]
    return [_block(each["block_structure"]) for each in weights if each.get("block_structure") is not None]


def _of_rows(says: Mapping[str, Any]) -> list[Block]:
    if (stored := says.get("format")) != ROWS_FORMAT:
        raise ValueError(f"format is {stored!r}, and {NAME} has {ROWS_FORMAT!r}")
    from vllm_w8a8_bismooth import fourbits  # which imports torch

    return [(1, fourbits.group_size_of(says))]


def _dict(value: object) -> dict[str, Any]:
    """The same, or an empty one where a config holds something else."""
    return value if isinstance(value, dict) else {}


_FORMATS: Mapping[str, tuple[Callable[[Mapping[str, Any]], list[Block] | None], Callable[..., None]]] = {
    "fp8": (_of_fp8, _find_fp8),
    "fbgemm_fp8": (_of_fp8, _find_fp8),
    "compressed-tensors": (_of_compressed_tensors, _find_fp8),
    "mxfp4": (_of_fp8, _find_mxfp4),
    NAME: (_of_rows, _find_rows),
}
"""``quant_method`` -> what the config says of blocks, ``None`` if the format is another; and what finds the weights."""
