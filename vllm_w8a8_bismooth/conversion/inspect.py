"""What the headers of a checkpoint show before anything is converted: the model, its needs, all its problems."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.basis import Means
from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint
from vllm_w8a8_bismooth.checkpoint.files import Folder, free_space
from vllm_w8a8_bismooth.checkpoint.hub import Repository
from vllm_w8a8_bismooth.checkpoint.layout import PROBLEMS, Layout
from vllm_w8a8_bismooth.checkpoint.reader import Headers
from vllm_w8a8_bismooth.conversion import head
from vllm_w8a8_bismooth.conversion.estimate import SCALE_BYTES, Needs, needs
from vllm_w8a8_bismooth.conversion.options import check_linears
from vllm_w8a8_bismooth.conversion.proposal import propose
from vllm_w8a8_bismooth.conversion.rates import measured
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.model.classes import head_of
from vllm_w8a8_bismooth.model.kinds import Kind, kinds_of
from vllm_w8a8_bismooth.model.names import template

_ALONE = Means()
TENSOR_PARALLEL = (1, 2, 4, 8, 16)


def parallel_problems(source: Layout, group_size: int | None) -> dict[int, list[str]]:
    """For each tensor-parallel size, why the model cannot be served on so many ranks; empty where it can.

    Args:
        source: the checkpoint.
        group_size: the groups that row-parallel linears would have; only these cut K. ``None`` is per-channel.
    """
    sizes, problems = source.sizes, {}
    kinds = {id(layer): layer for layer in source.layers}.values()
    # Where nothing says which are cut along K, all may be.
    cut = [(layer, layer.row_parallel if source.unproven is None else layer.linears.keys()) for layer in kinds]
    alone = {n: layer.linears[n][1] for layer, names in cut for n in names - layer.experts}
    experts = {template(n): layer.linears[n][1] for layer, names in cut for n in names & layer.experts}
    for ranks in TENSOR_PARALLEL:
        found = []
        heads, kv_heads = sizes.get("heads", ranks), sizes.get("kv_heads", ranks)
        if heads % ranks:
            found.append(f"num_attention_heads = {heads} is not a multiple of the ranks")
        if kv_heads % ranks and ranks % kv_heads:
            found.append(f"num_key_value_heads = {kv_heads} neither divides the ranks nor is a multiple of them")
        share = "a rank's share of K = {} is not a multiple of group_size = {}"
        for linear, width in sorted(alone.items()):
            if width % ranks:
                found.append(f"{linear}: K = {width} is not a multiple of the ranks")
            elif not grouping.fits(width // ranks, group_size):
                found.append(f"{linear}: {share.format(width, group_size)}")
        for linear, width in sorted(experts.items()):
            if not (width % ranks or grouping.fits(width // ranks, group_size)):
                why = share.format(width, group_size)
                found.append(f"{linear}: {why}, if experts have groups and expert parallelism is off")
        problems[ranks] = found
    return problems


@dataclass(frozen=True)
class Dtype:
    """How many tensors, numbers and bytes a checkpoint holds in one dtype."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Head:
    """The language model's head: its tensor, its bytes as it is and as ``--head int8`` makes it, and why it cannot."""

    name: str
    nbytes: int
    int8_nbytes: int
    obstacle: str | None

    @classmethod
    def of(cls, layout: Layout) -> "Head | None":
        """``None`` where nothing is there to be a head."""
        headers, names = layout.checkpoint.headers, layout.names
        stored = headers.get(names.embedding if layout.tied else names.head)
        if head_of(layout.checkpoint.config) != "language" or stored is None or len(stored.shape) != 2:
            return None
        rows, columns = stored.shape
        # A tied one takes nothing beside the embedding, which stays.
        before, after = (0 if layout.tied else stored.nbytes), rows * (columns + SCALE_BYTES)
        return cls(names.head, before, after, head.obstacle(layout))


@dataclass
class Survey:
    """What is known of a checkpoint. What its problems hide is empty or ``None``.

    Attributes:
        source: the folder or the repository.
        hub_id, revision: of the repository; ``None`` for folders of unknown origin.
        model_type: as config.json has it.
        sizes: blocks, hidden, heads, ...; see :func:`findings.sizes_of`.
        tied: whether the head is the embedding.
        parameters, source_bytes: numbers in the tensors, and bytes in the files.
        dtypes: safetensors' name -> what is stored in it, largest first.
        quantized: how weights are stored in FP8 or FP4; ``None`` if they are not.
        head: what the language model's head takes in the result, see :class:`Head`; ``None`` where there is none.
        needs: of a ``data-free`` and of a ``calibrated`` conversion on this machine.
        calibration_tokens: of the latter.
        memory_bytes: of this machine.
        free_bytes: on the disk of the current folder.
        group_size: for which ``per_group`` holds.
        per_channel, per_group: tensor-parallel size -> why the model cannot be served so, with its row-parallel linears
            per-channel or per-group; empty where it can.
        known_by: where it is known from what its blocks hold, see :class:`basis.Basis`.
        kinds: of its blocks, with their sites.
        unproven: why there are no sites.
        problems: why it cannot be converted, at most :data:`layout.PROBLEMS`.
        left_out: files that a conversion does not copy -> bytes.
        notes: what the user should know of the checkpoint.
        proposal: a folder for the result.
    """

    source: str
    hub_id: str | None
    revision: str | None
    model_type: Any
    sizes: Mapping[str, int]
    tied: bool | None
    parameters: int
    source_bytes: int
    dtypes: Mapping[str, Dtype]
    calibration_tokens: int
    group_size: int
    memory_bytes: int
    free_bytes: int
    head: Head | None = None
    needs: dict[str, Needs] = field(default_factory=dict)
    per_channel: dict[int, list[str]] = field(default_factory=dict)
    per_group: dict[int, list[str]] = field(default_factory=dict)
    quantized: str | None = None
    known_by: str | None = None
    kinds: list[Kind] = field(default_factory=list)
    unproven: str | None = None
    problems: list[Problem] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    proposal: str = ""


def survey(place: Folder | Repository, calibration_tokens: int, group_size: int, means: Means = _ALONE) -> Survey:
    """Read the headers of a checkpoint and say everything that follows from them.

    Args:
        place: see :func:`hub.find`.
        calibration_tokens: for the estimate of a calibrated conversion.
        group_size: for which tensor-parallel serving is checked.
        means: by which the checkpoint may be laid out.

    Raises:
        BismoothError: there is nothing to read: the repository is out of reach.
    """
    headers = Headers(place)
    dtypes = _dtypes(headers)
    model_type = headers.config.get("model_type")
    result = Survey(
        source=str(place),
        hub_id=place.hub_id,
        revision=place.revision,
        model_type=model_type,
        sizes={},
        tied=None,
        parameters=sum(math.prod(header.shape) for header in headers.headers.values()),
        source_bytes=headers.nbytes(),
        dtypes=dtypes,
        calibration_tokens=calibration_tokens,
        group_size=group_size,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        free_bytes=free_space(Path()),
        proposal=propose(place),
        quantized=headers.quantized,
    )
    try:
        layout = Layout(headers, means)
    except BismoothError as error:
        result.problems, result.sizes = list(islice(error.problems, PROBLEMS)), _sizes(headers, means)
        return result
    result.problems, result.sizes, result.tied = layout.problems, layout.sizes, layout.tied
    result.known_by, result.kinds = layout.known_by, kinds_of(layout.layers)
    if layout.layers:
        try:
            check_linears(layout)
        except BismoothError as error:
            result.problems += error.problems
    if layout.unproven is not None:
        result.unproven = layout.unproven.problems[0].what
    try:
        result.left_out, result.notes = headers.left_out(), layout.notes + head.notes(headers, layout.tied)
    except BismoothError as error:
        result.problems += error.problems
        return result
    result.head = Head.of(layout)
    rates = measured(layout)
    calibrated = needs(layout, calibration_tokens, rates, compensated=True)
    result.needs = {"data-free": needs(layout, None, rates), "calibrated": calibrated}
    result.per_channel, result.per_group = parallel_problems(layout, None), parallel_problems(layout, group_size)
    return result


def _sizes(headers: Headers, means: Means) -> Mapping[str, int]:
    try:
        return Blueprint.of(headers, means).sizes
    except BismoothError:
        return {}


def _dtypes(headers: Headers) -> dict[str, Dtype]:
    found: dict[str, Dtype] = {}
    for header in headers.stored.values():
        known = found.get(header.dtype, Dtype())
        found[header.dtype] = Dtype(
            known.tensors + 1, known.parameters + math.prod(header.shape), known.nbytes + header.nbytes
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))
