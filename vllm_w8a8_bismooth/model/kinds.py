"""Decoder blocks that are built alike, and what is to be said of them to people: experts count as one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from vllm_w8a8_bismooth.model.layers import Layer, Runs, Site
from vllm_w8a8_bismooth.model.names import EXPERT, template

_T = TypeVar("_T")


@dataclass(frozen=True)
class Kind:
    """Blocks that are built alike. Names are those inside the block; ``{}`` stands for the number of every expert.

    Attributes:
        blocks: their numbers.
        experts: how many each name with ``{}`` stands for.
        linears: what becomes INT8 -> (rows, columns).
        floats: other matrices -> why they stay in float.
        sites: couplings.
    """

    blocks: list[int]
    experts: int
    linears: Mapping[str, tuple[int, int]]
    floats: Mapping[str, str]
    sites: tuple[Site, ...]


def kinds_of(layers: Sequence[Layer]) -> list[Kind]:
    """The kinds among a model's blocks, in the order of their first ones."""
    objects: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        objects.setdefault(id(layer), []).append(index)
    found: list[Kind] = []
    for blocks in objects.values():
        kind = _kind(layers[blocks[0]], blocks)
        same = next((other for other in found if replace(other, blocks=blocks) == kind), None)
        if same is None:
            found.append(kind)
        else:
            same.blocks.extend(blocks)
            same.blocks.sort()
    return found


def _kind(layer: Layer, blocks: list[int]) -> Kind:
    numbers = {match[0] for name in (*layer.linears, *layer.routers) for match in EXPERT.finditer(name)}
    return Kind(
        blocks=[*blocks],
        experts=len(numbers),
        linears=_templates(layer.linears),
        floats=_templates(layer.routers),
        sites=tuple(dict.fromkeys(map(_template, layer.sites))),
    )


def _templates(given: Mapping[str, _T]) -> dict[str, _T]:
    return {template(name): value for name, value in given.items()}


def _template(site: Site) -> Site:
    of_expert = template(site.producer) != site.producer
    return replace(
        site,
        name=re.sub(r"\.\d+$", "", site.name) if of_expert else site.name,
        producer=template(site.producer),
        consumers=tuple(dict.fromkeys(map(template, site.consumers))),
        gate=site.gate and template(site.gate),
    )


def in_words(site: Site, rows: int | None) -> str:
    """What is peculiar about a site's rows and columns; nothing, if every row of its producer feeds one column.

    Args:
        site: of a :class:`Kind`.
        rows: of its producer; ``None`` if that is not known.
    """
    words = []
    if rows is not None and site.channels != rows:
        words.append(f"rows {_ranges(site.rows)} of {rows}")
    if site.columns is not None:
        held = sum(count for _, count in site.columns)
        times = held / site.channels
        words.append(
            f"each channel in {times:g} columns" if times > 1 and times.is_integer() else "channels in another order"
        )
    if site.offset:
        words.append(f"the gain is stored less {site.offset:g}")
    if site.power != 1:
        words.append(f"columns see the factor to the power of {site.power:g}")
    return ", ".join(words)


def _ranges(runs: Runs) -> str:
    shown = ", ".join(f"{start}-{start + count - 1}" for start, count in runs[:2])
    return f"{shown} and {len(runs) - 2} more runs" if len(runs) > 2 else shown
