"""A record that somebody gives, perhaps edited: read without trust, and proven as what is found out is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_w8a8_bismooth.discovery.assembly import Assembly, Unfit, unnamed
from vllm_w8a8_bismooth.discovery.block import SAME, Block, Tie
from vllm_w8a8_bismooth.discovery.proof import Failure, Sample
from vllm_w8a8_bismooth.discovery.record import Discovery, Layer, Site, Stored
from vllm_w8a8_bismooth.discovery.storage import Region
from vllm_w8a8_bismooth.errors import BismoothError, Problem

_OPTION = "--sites"
_REMEDY = "take the site out, or mend it"
_LIKE = "give what bismooth sites prints for this model, in which only the sites may be changed"
_SHOWN = 8


def ties_given(given: Discovery, assemblies: Sequence[Assembly], sample: Sample) -> list[list[Tie]]:
    """The sites of a record, in the blocks of a small model.

    Raises:
        BismoothError: the record is of another model; or, with all of them, sites that have no such form, or that do
            not keep what their block computes, each with the measured difference.
    """
    if len(given.blocks) < len(assemblies):
        raise _of_another("blocks", f"has {len(given.blocks)}, and the model at least {len(assemblies)}")
    problems: dict[Problem, None] = {}
    found: list[list[Tie]] = []
    for index, (block, assembly) in enumerate(zip(sample.blocks, assemblies, strict=True)):
        layer, ties = given.templates[given.blocks[index]], []
        if layer.tensors != assembly.real:
            raise _of_another(f"block {index}", next(_unlike(layer.tensors, assembly.real)))
        for site in layer.sites:
            try:
                some = assembly.ties(site)
            except Unfit as error:
                problems[Problem(_OPTION, f"site {site.name!r} is no site of the model: {error}", _REMEDY)] = None
                continue
            if problems.keys() and len(problems) >= _SHOWN:
                break
            if not (change := max(block.change([tie]) for tie in some)) < SAME:
                what = f"site {site.name!r} does not keep what block {index} computes: its output changes by"
                problems[Problem(_OPTION, f"{what} {change:.2g} of its size", _REMEDY)] = None
            ties += some
        found.append(ties)
    if problems:
        raise BismoothError(*problems)
    return found


def promised(
    given: Discovery, blocks: Sequence[Block], regions: Sequence[Mapping[str, Sequence[Region]]]
) -> list[list[Tie]]:
    """For each block of a small model, stand-ins for the ties that take apart the stacks that a record has apart."""
    found = []
    for index, (block, held) in enumerate(zip(blocks, regions, strict=True)):
        stored = given.stored[given.blocks[index]] if index < len(given.blocks) else Stored({})
        stacks = {view.tensor for view in stored.views.values() if len(view.whole) > 2}
        parameters = {held[name][0].parameter for name in stacks if held.get(name)}
        ties = []
        for parameter in sorted(parameters & block.axes.keys()):
            rows = block.matrix(block.units(parameter)[0]).shape[0]
            ties.append(Tie(parameter, tuple(range(rows // 2, rows)), {}))
        found.append(ties)
    return found


def check_left(sample: Sample, failures: Sequence[Sequence[Failure]]) -> None:
    """Raises :class:`BismoothError` with the given sites that the proof of the whole model does not leave, and how far
    they move the logits."""
    problems: dict[tuple[str, str], Problem] = {}
    for block, some in zip(sample.blocks, failures, strict=True):
        for failure in some[: _SHOWN if len(problems) < _SHOWN else 0]:
            producer = failure.tie.producer
            change = sample.logits_change([(block, failure.tie)])
            what = f"a site of {block.name}.{producer} does not hold: {failure.why}; the logits change by {change:.2g}"
            problems.setdefault((producer, failure.why), Problem(_OPTION, what, _REMEDY))
    if problems:
        raise BismoothError(*problems.values())


def check_alike(given: Discovery, found: Discovery) -> None:
    """Raises :class:`BismoothError` if a record says anything else than what its own sites give: of those, what they
    are called and their order are free."""
    for key in ("model_type", "names", "modules", "outside"):
        if getattr(given, key) != getattr(found, key):
            said, right = getattr(given, key), getattr(found, key)
            is_mapping = isinstance(said, Mapping)
            raise _of_another(key, next(_unlike(said, right)) if is_mapping else f"is {said}, and must be {right}")
    if len(given.blocks) != len(found.blocks):
        raise _of_another("blocks", f"has {len(given.blocks)}, and the model {len(found.blocks)}")
    for index, (mine, kind) in enumerate(zip(given.blocks, found.blocks, strict=True)):
        pairs = {
            "experts": (given.experts[mine], found.experts[kind]),
            "stored": (given.stored[mine], found.stored[kind]),
            **_of_layers(given.templates[mine], found.templates[kind]),
        }
        if unlike := next((key for key, (one, other) in pairs.items() if one != other), None):
            one, other = pairs[unlike]
            raise _of_another(f"{unlike} of block {index}", f"is not what follows from the model: {_first(one, other)}")


def _of_layers(one: Layer, other: Layer) -> dict[str, tuple[Any, Any]]:
    keys = ("linears", "floats", "vectors", "experts", "writers")
    return {
        **{key: (getattr(one, key), getattr(other, key)) for key in keys},
        "sites": tuple({unnamed(site) for site in layer.sites} for layer in (one, other)),
    }


def _first(one: Any, other: Any) -> str:
    """The first thing in which two mappings or sets differ."""
    if isinstance(one, Mapping):
        return next(_unlike(one, other))
    if isinstance(one, set | frozenset):
        names = {thing.producer if isinstance(thing, Site) else str(thing) for thing in one ^ other}
        return ", ".join(sorted(names)[:2])
    return f"{one} for {other}" if isinstance(one, int) else "other places of parameters"


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            shown = [str(found[name]) if name in found else "absent" for found in (one, other)]
            yield f"{name} is {shown[0]}, and must be {shown[1]}"


def _of_another(where: str, what: str) -> BismoothError:
    return BismoothError.of(_OPTION, f"the record is not of this model: {where} {what}", _LIKE)
