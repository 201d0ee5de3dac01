"""What is found out of a model from its config alone, beside what the table says of its type, where it has one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint.basis import Means
from vllm_w8a8_bismooth.checkpoint.blueprint import layers_of, sizes_of
from vllm_w8a8_bismooth.checkpoint.findings import layers_of as layers_found
from vllm_w8a8_bismooth.discovery.discover import discover
from vllm_w8a8_bismooth.discovery.record import Discovery, each, runs
from vllm_w8a8_bismooth.model.architectures import architecture_of
from vllm_w8a8_bismooth.model.kinds import Kind, kinds_of
from vllm_w8a8_bismooth.model.layers import Layer, Site


@dataclass(frozen=True)
class Sites:
    """What a model's blocks hold, and where magnitude can move between their tensors.

    Attributes:
        source: what was asked for.
        record: everything that was found out; its ``to_json`` is what ``--sites`` takes.
        kinds: of blocks, for people.
        in_table: whether the table has the type; a conversion then goes by the table, unless a record is given.
        differences: of what was found from what the table says; empty if both agree, or it has no such type.
    """

    source: str
    record: Discovery
    kinds: list[Kind]
    in_table: bool
    differences: list[str]


def find(config: Mapping[str, Any], source: str, code: Path, means: Means) -> Sites:
    """Find out, or prove what is given.

    Args:
        config: a parsed ``config.json``. It is not trusted.
        source: what to call it.
        code: the folder with the model's own code.
        means: whether that may run; a record that is given.

    Raises:
        BismoothError: see :func:`discover.discover`.
    """
    record = discover(config, code if means.trusted else None, means.progress, means.given)
    layers, architecture = layers_found(record), architecture_of(config)
    differences: list[str] = []
    if architecture is not None:
        sizes = sizes_of(config, architecture)
        differences = list(_unlike(layers_of(config, architecture, sizes, sizes["blocks"]), layers))
    return Sites(source, record, kinds_of(layers), architecture is not None, differences)


def _unlike(table: Sequence[Layer], found: Sequence[Layer]) -> Iterator[str]:
    """Where the table says otherwise, each thing once."""
    if len(table) != len(found):
        yield f"the table has {len(table)} blocks, found were {len(found)}"
    said: dict[str, int] = {}
    for index, (one, other) in enumerate(zip(table, found, strict=False)):
        for line in _of_layers(one, other):
            said.setdefault(line, index)
    yield from (f"{line} (first in block {index})" for line, index in said.items())


def _of_layers(table: Layer, found: Layer) -> Iterator[str]:
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "tensor": (dict(table.tensors), dict(found.tensors)),
        "linear": (dict(table.linears), dict(found.linears)),
        "matrix in float": (dict.fromkeys(table.routers), dict.fromkeys(found.routers)),
        "site behind": ({s.producer: _plain(s) for s in table.sites}, {s.producer: _plain(s) for s in found.sites}),
    }
    for what, (one, other) in kinds.items():
        for name in sorted(one.keys() | other.keys()):
            if name not in other:
                yield f"{what} {name}: only in the table"
            elif name not in one:
                yield f"{what} {name}: only found"
            elif one[name] != other[name]:
                yield f"{what} {name}: otherwise in the table"


def _plain(site: Site) -> Site:
    """Without what has no meaning: its name, the order of its consumers, how its runs are cut."""
    columns = None if site.columns is None else runs(each(site.columns))
    return replace(site, name="", gate=None, consumers=tuple(sorted(site.consumers)), columns=columns)
