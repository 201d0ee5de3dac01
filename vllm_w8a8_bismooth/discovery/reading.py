"""A record from JSON that nobody vouches for: of the right form, and of bounded size whatever is made of it."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import chain
from typing import Any

from vllm_w8a8_bismooth.discovery.record import Discovery, Layer, Names, Site, Stored, View
from vllm_w8a8_bismooth.model.layers import Runs

_MOST_BLOCKS, _MOST_EXPERTS, _MOST_NAMES = 2**10, 2**11, 2**20
_WIDEST = 2**48


def read(value: object) -> Discovery:
    """The record that a parsed JSON value is.

    Raises:
        ValueError: it is none; the text says why, without naming where it stands.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    try:
        found = Discovery.from_json(value)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError, ValueError) as error:
        raise ValueError(f"not of its form ({type(error).__name__}: {str(error)[:100]})") from None
    if problem := next(chain(_problems(found), _of_braces(value)), None):
        raise ValueError(problem)
    return found


def _of_braces(value: Any) -> Iterator[str]:
    """Braces are for the number of an expert, once in a name."""
    if isinstance(value, dict):
        yield from chain.from_iterable(map(_of_braces, (*value, *value.values())))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_of_braces, value))
    elif isinstance(value, str) and set("{}") & set(value.replace("{}", "", 1)):
        yield f"{value[:50]!r} holds braces that stand for no expert"


def _problems(found: Discovery) -> Iterator[str]:
    kinds = len(found.templates)
    if not isinstance(found.model_type, str) or not (len(found.experts) == len(found.stored) == kinds > 0):
        yield "a record must have a model_type, and as many experts and stored as templates"
    elif not 0 < len(found.blocks) <= _MOST_BLOCKS or not all(type(k) is int and 0 <= k < kinds for k in found.blocks):
        yield f"blocks must be up to {_MOST_BLOCKS} numbers of templates"
    elif not all(type(count) is int and 0 <= count <= _MOST_EXPERTS for count in found.experts):
        yield f"experts must be numbers up to {_MOST_EXPERTS}"
    elif not _are_names(found.names) or not _are_strings(found):
        yield "names, modules and what is stored are not of their form"
    elif not _are_shapes(found.outside) or len(found.outside.get(str(found.names.embedding), ())) != 2:
        yield "outside must have shapes, and among them that of the embedding"
    elif any(
        view.whole[0] < count
        for stored, count in zip(found.stored, found.experts, strict=True)
        for view in stored.views.values()
        if len(view.whole) == 3
    ):
        yield "stacks must have as many slabs as there are experts"
    else:
        many = [max(1, count) for count in found.experts]
        sizes = [len(layer.tensors) + sum(1 + len(site.consumers) for site in layer.sites) for layer in found.templates]
        if sum(size * count for size, count in zip(sizes, many, strict=True)) > _MOST_NAMES:
            yield f"holds more than {_MOST_NAMES} names"
        else:
            yield from chain.from_iterable(map(_of_layer, found.templates))


def _are_names(names: Names) -> bool:
    texts = (names.embedding, names.norm, names.head)
    return isinstance(names.blocks, str) and isinstance(names.tied, bool) and _all(texts, str | None)


def _are_strings(found: Discovery) -> bool:
    modules = [getattr(found.modules, field.name) for field in fields(found.modules)]
    paths, outside = modules[:5], found.modules.outside
    return (
        _all(paths, str | None)
        and _all((found.modules.base, found.modules.blocks, found.modules.embedding), str)
        and _all((*outside, *outside.values()), str)
        and _are_sizes((found.modules.returned,), least=0)
        and all(map(_is_stored, found.stored))
    )


def _is_stored(stored: Stored) -> bool:
    parts = [part for some in stored.parameters.values() for part in some]
    return (
        _all((*stored.parameters, *stored.views), str)
        and all(_is_view(name, view) for name, view in stored.views.items())
        and _all((part.tensor for part in parts), str)
        and all(_are_sizes((part.start, *(part.into or ())), least=0) for part in parts)
        and _all((part.transposed for part in parts), bool)
    )


def _is_view(name: str, view: View) -> bool:
    """Whether it is a part of a tensor of two axes, or of three for an expert."""
    if not isinstance(view.tensor, str) or not isinstance(view.transposed, bool):
        return False
    if not _are_sizes(view.whole) or not _are_sizes(view.rows, least=0) or len(view.whole) != 2 + ("{}" in name):
        return False
    return view.rows[1] > 0 and sum(view.rows) <= view.whole[-1 if view.transposed else -2]


def _all(values: Any, kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _are_sizes(values: Any, least: int = 1) -> bool:
    return all(type(value) is int and least <= value < _WIDEST for value in values)


def _are_shapes(given: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) and _are_sizes(shape) for name, shape in given.items())


def _of_layer(layer: Layer) -> Iterator[str]:
    vectors = {name: (length,) for name, length in layer.vectors.items()}
    if not all(map(_are_shapes, (layer.tensors, layer.linears, vectors))):
        yield "tensors, linears and vectors must have sizes"
    elif not _all((*layer.floats, *layer.floats.values(), *layer.experts, *layer.writers), str):
        yield "floats, experts and writers must be strings"
    elif not layer.experts <= layer.linears.keys():
        yield "experts must be linears"
    else:
        for site in layer.sites:
            yield from _of_site(site, layer)


def _of_site(site: Site, layer: Layer) -> Iterator[str]:
    if not _all((site.name, site.producer, *site.consumers), str) or not site.consumers:
        yield "a site must have a name, a producer and consumers"
        return
    where = f"site {site.name!r}"
    numbers = (site.offset, site.power)
    length = layer.linears.get(site.producer, (layer.vectors.get(site.producer),))[0]
    if length is None:
        yield f"{where}: its producer {site.producer} is neither a linear nor a vector"
    elif missing := [name for name in site.consumers if name not in layer.linears and name not in layer.floats]:
        yield f"{where}: its consumer {missing[0]} is neither a linear nor a matrix in float"
    elif not all(type(number) in (int, float) and abs(number) < _WIDEST for number in numbers):
        yield f"{where}: offset and power must be numbers"
    elif site.rows is not None and not _within(site.rows, length, length):
        yield f"{where}: its rows are not among the {length} of {site.producer}"
    else:
        channels = length if site.rows is None else sum(count for _, count in site.rows)
        for name in site.consumers:
            width = layer.linears[name][1] if name in layer.linears else None
            held = channels if site.columns is None else sum(count for _, count in site.columns)
            most = width or max(chain.from_iterable(layer.tensors.values()))
            fits = site.columns is None or _within(site.columns, channels, most)
            if not fits or (width is not None and held != width):
                yield f"{where}: its {channels} channels do not fill the columns of {name}"


def _within(given: Runs, below: int, most: int) -> bool:
    """Whether runs are of indices below a number, and no more than ``most`` of them."""
    inside = all(start >= 0 and count > 0 and start + count <= below for start, count in given)
    return inside and sum(count for _, count in given) <= most
