"""What was found out about a model type: names, shapes, sites, and how they were proven. Data, with a form in JSON."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from vllm_w8a8_bismooth.model.construction import Part
from vllm_w8a8_bismooth.model.layers import Runs


def runs(indices: Iterable[int]) -> Runs:
    """Indices in order as runs of consecutive ones."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and index == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((index, 1))
    return tuple(found)


def each(given: Runs) -> Iterator[int]:
    """The indices that runs stand for, in order."""
    for start, length in given:
        yield from range(start, start + length)


@dataclass(frozen=True)
class Site:
    """A producer whose channels are its consumers' input columns, so that magnitude can move between them.

    Names are the checkpoint's, inside the block, without ``.weight``.

    Attributes:
        name: readable, unique in the block: ``norm->qkv``, ``v->o``, ``up->down.3`` of expert 3.
        producer: a linear or a norm's gain.
        consumers: linears, and matrices that stay in float, whose columns take the factor.
        rows: of the producer, channel by channel; ``None`` for all, in order.
        columns: for the consumers' columns in order, the channels that they hold (grouped-query attention repeats
            them); ``None`` for one each, in order.
        gate: the linear whose rows, through the activation, multiply what the producer makes. Not found out.
        offset: what the model adds to the stored gain.
        power: the consumers' columns see the producer's factor to this power (2 behind a squared ReLU).
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    rows: Runs | None = None
    columns: Runs | None = None
    gate: str | None = None
    offset: float = 0.0
    power: float = 1.0


@dataclass(frozen=True)
class Layer:
    """One kind of block, at the real model's size. Names are the checkpoint's, inside the block.

    Attributes:
        tensors: every tensor of such a block -> shape; matrices are ``[rows, columns]`` of the product, whichever way
            the checkpoint stores them, see :class:`View`.
        linears: what becomes INT8: name without ``.weight`` -> (rows, columns).
        floats: other matrices -> why they stay in float.
        vectors: norms' gains, without ``.weight`` -> length.
        sites: those with linear producers before those behind norms.
        experts: linears of experts.
        writers: linears and norms whose output is added to the residual stream as it is.
    """

    tensors: Mapping[str, tuple[int, ...]]
    linears: Mapping[str, tuple[int, int]]
    floats: Mapping[str, str]
    vectors: Mapping[str, int]
    sites: tuple[Site, ...]
    experts: frozenset[str]
    writers: frozenset[str]

    def expanded(self, experts: int) -> "Layer":
        """The same layer with every ``{}`` in its names replaced by the numbers of ``experts`` experts."""

        def mapping(given: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for template, value in given.items() for name in _numbered([template], experts)}

        sites: list[Site] = []
        for site in self.sites:
            if "{}" not in site.producer:
                sites.append(replace(site, consumers=tuple(_numbered(site.consumers, experts))))
                continue
            for e in range(experts):
                consumers = tuple(name.format(e) for name in site.consumers)
                sites.append(
                    replace(site, name=f"{site.name}.{e}", producer=site.producer.format(e), consumers=consumers)
                )
        return Layer(
            tensors=mapping(self.tensors),
            linears=mapping(self.linears),
            floats=mapping(self.floats),
            vectors=mapping(self.vectors),
            sites=tuple(sites),
            experts=frozenset(_numbered(self.experts, experts)),
            writers=frozenset(_numbered(self.writers, experts)),
        )


def _numbered(names: Iterable[str], experts: int) -> Iterator[str]:
    for name in names:
        yield from (name.format(e) for e in range(experts)) if "{}" in name else (name,)


@dataclass(frozen=True)
class View:
    """Where a matrix is that the checkpoint does not store as such.

    Attributes:
        tensor: name inside the block of the tensor that has it. The first axis of a stack is the number of the expert,
            for which ``{}`` stands in the matrix's name.
        whole: that tensor's shape.
        rows: (start, length) of the matrix's rows among all in the tensor or slab.
        transposed: whether tensor or slab is ``[columns, rows]`` (GPT-2's Conv1D).
    """

    tensor: str
    whole: tuple[int, ...]
    rows: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True)
class Stored:
    """Where the checkpoint has the parameters of one kind of block.

    Attributes:
        parameters: transformers' name inside the block -> its parts. ``{}`` in a name stands for an expert's number.
        views: tensors of the layer that are parts of others, or transposed, in the files -> how.
    """

    parameters: Mapping[str, tuple[Part, ...]]
    views: Mapping[str, View] = field(default_factory=dict)


@dataclass(frozen=True)
class Names:
    """What the checkpoint calls what is around the blocks.

    Attributes:
        blocks: what names inside blocks begin with, before the number: ``model.layers.``.
        embedding, norm, head: tensors; ``None`` where there is none. A tied head is none.
        tied: whether the head is the embedding.
    """

    blocks: str
    embedding: str | None
    norm: str | None
    head: str | None
    tied: bool


@dataclass(frozen=True)
class Modules:
    """Paths in transformers' causal language model.

    Attributes:
        base: what they begin with, and the bare decoder's (``AutoModel``) do not: ``model.``; may be empty.
        blocks, embedding, norm: the list of blocks, the embedding, the norm behind the last block (``None``: none).
        head: the last linear; ``None`` if there is none.
        outside: parameters and buffers outside the blocks, but for embedding, norm and head -> the checkpoint's tensor.
        returned: how many things a block returns in a tuple, hidden states first; 0 where it returns them alone.
    """

    base: str
    blocks: str
    embedding: str
    norm: str | None
    head: str | None
    outside: Mapping[str, str] = field(default_factory=dict)
    returned: int = 0


@dataclass(frozen=True)
class Proof:
    """How sure the sites are.

    Attributes:
        factors: what widths were divided by, in the model that was searched and the second one, where there is one.
        blocks: of the model that was searched.
        output: largest relative change of a block's output with all its sites folded, in fp64.
        large: the same with weights thirty times larger.
        logits: largest relative change of the logits with all sites of all blocks folded.
        resized: as ``output``, of the second model, with the sites enlarged to its size; ``None`` without one.
        seeds, lengths: of the texts for ``logits``.
        dropped: sites that were found and are not used -> why.
        unseen: matrices that nothing was seen to be multiplied with.
    """

    factors: tuple[int, ...]
    blocks: int
    output: float
    large: float
    logits: float
    resized: float | None
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    dropped: Mapping[str, str]
    unseen: tuple[str, ...]


@dataclass(frozen=True)
class Discovery:
    """All that is known of the models with one config.

    Attributes:
        model_type: as the config says.
        templates: kinds of blocks, with ``{}`` for the numbers of experts that are alike.
        experts: of each kind; 0 for none.
        blocks: the kind of each block.
        names: in the checkpoint, around the blocks.
        modules: in transformers' model.
        stored: for each kind, where the checkpoint has its parameters.
        outside: tensors outside the blocks -> shape.
        proof: of the sites.
        seconds: that it took. No part of the JSON, which is the same every time.
    """

    model_type: str
    templates: tuple[Layer, ...]
    experts: tuple[int, ...]
    blocks: tuple[int, ...]
    names: Names
    modules: Modules
    stored: tuple[Stored, ...]
    outside: Mapping[str, tuple[int, ...]]
    proof: Proof
    seconds: float = field(default=0.0, compare=False)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The kinds of blocks, with every expert."""
        return tuple(layer.expanded(count) for layer, count in zip(self.templates, self.experts, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Lists, dicts, strings and numbers; what is ``None`` or empty is left out."""
        found = _plain(self)
        del found["seconds"]
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Discovery":
        """The inverse of :meth:`to_json`.

        Raises:
            TypeError, KeyError, ValueError, AttributeError: it is not of that form.
        """
        return cls(
            model_type=value["model_type"],
            templates=tuple(_layer(layer) for layer in value["templates"]),
            experts=tuple(value["experts"]),
            blocks=tuple(value["blocks"]),
            names=Names(**_complete(Names, value["names"])),
            modules=_modules(value["modules"]),
            stored=tuple(_stored(stored) for stored in value["stored"]),
            outside={name: tuple(shape) for name, shape in value.get("outside", {}).items()},
            proof=_proof(value["proof"]),
        )


def _plain(value: Any) -> Any:
    """Of JSON's types, without fields that say nothing."""
    if is_dataclass(value):
        own = {f.name: getattr(value, f.name) for f in fields(value)}
        return {key: _plain(item) for key, item in own.items() if item not in (None, (), {}, frozenset())}
    if isinstance(value, Mapping):  # an empty shape is that of a number
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value, key=str)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _complete(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with ``None`` for every field that is not in it."""
    return {f.name: value.get(f.name) for f in fields(kind)}


def _runs(value: Iterable[Iterable[int]] | None) -> Runs | None:
    return None if value is None else tuple((int(start), int(length)) for start, length in value)


def _layer(value: Mapping[str, Any]) -> Layer:
    sites = (
        Site(
            **{
                **site,
                "consumers": tuple(site["consumers"]),
                "rows": _runs(site.get("rows")),
                "columns": _runs(site.get("columns")),
            }
        )
        for site in value.get("sites", ())
    )
    return Layer(
        tensors={name: tuple(shape) for name, shape in value["tensors"].items()},
        linears={name: (shape[0], shape[1]) for name, shape in value.get("linears", {}).items()},
        floats=dict(value.get("floats", {})),
        vectors=dict(value.get("vectors", {})),
        sites=tuple(sites),
        experts=frozenset(value.get("experts", ())),
        writers=frozenset(value.get("writers", ())),
    )


def _modules(value: Mapping[str, Any]) -> Modules:
    own = {"outside": dict(value.get("outside", {})), "returned": value.get("returned", 0)}
    return Modules(**{**_complete(Modules, value), **own})


def _stored(value: Mapping[str, Any]) -> Stored:
    def part(given: Mapping[str, Any]) -> Part:
        into = given.get("into")
        return Part(**{**given, "into": (into[0], into[1]) if into else None})

    def view(given: Mapping[str, Any]) -> View:
        return View(**{**given, "whole": tuple(given["whole"]), "rows": (given["rows"][0], given["rows"][1])})

    parameters = {name: tuple(map(part, parts)) for name, parts in value.get("parameters", {}).items()}
    return Stored(parameters, {name: view(given) for name, given in value.get("views", {}).items()})


def _proof(value: Mapping[str, Any]) -> Proof:
    return Proof(
        **{
            **_complete(Proof, value),
            **{key: tuple(value.get(key, ())) for key in ("factors", "seeds", "lengths", "unseen")},
            "dropped": dict(value.get("dropped", {})),
        }
    )
