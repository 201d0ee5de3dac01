"""Which linears the options name, and whether they can be what the options say."""

from collections.abc import Sequence

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.conversion.plan import full_names
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.patterns import found_by
from vllm_w8a8_bismooth.recipe import Recipe, option_of


def module_names(source: Layout) -> list[str]:
    """Full names of all modules with weights, and of the head, which tied models do not store."""
    names = (name.rpartition(".")[0] for name in source.checkpoint.headers)
    return list(dict.fromkeys([*names, source.names.head.removesuffix(".weight")]))


def already_float(source: Layout, recipe: Recipe) -> list[str]:
    """Full names of what ``ignore`` names although it stays in float anyway: the head, routers, norms.

    A pattern that also names linears is meant for them, and says nothing here.
    """
    linears, names = _linears(source), module_names(source)
    found = [found_by(pattern, names) for pattern in recipe.ignore or ()]
    named = set().union(*(some for some in found if not some & linears.keys()))
    return [name for name in names if name in named]


def _linears(source: Layout) -> dict[str, None]:
    return dict.fromkeys(full_names([set(layer.linears) for layer in source.layers], source.names))


def _named(source: Layout, field: str, given: Sequence[str]) -> list[set[str]]:
    """Per block, the linears that the patterns of an option mean.

    Raises:
        BismoothError: with all patterns that name nothing; for ``ignore``, nothing at all.
    """
    linears, names = _linears(source), module_names(source)
    chosen: list[set[str]] = [set() for _ in source.layers]
    problems, example = [], next(iter(linears), "")
    remedy = f"leave it out or mend it; linears are called like {example}"
    for pattern in given:
        found = found_by(pattern, names)
        for name in found & linears.keys():
            index, linear = source.place_of(name)
            chosen[index].add(linear)
        if not (found if field == "ignore" else found & linears.keys()):
            problems.append(Problem(f"{option_of(field)} {pattern!r}", "names no linear", remedy))
    if problems:
        raise BismoothError(*problems)
    return chosen


def _as_given(field: str, given: Sequence[str] | None) -> str:
    return f"{option_of(field)} {','.join(given or ())!r}"


def check_linears(source: Layout) -> None:
    """Raises :class:`BismoothError` if nothing of the model can become INT8."""
    if not any(layer.linears for layer in source.layers):
        why = ", ".join(dict.fromkeys(why for layer in source.layers for why in layer.routers.values()))
        what = f"none of its matrices can become INT8 ({why})"
        raise BismoothError.of(source.checkpoint.place, what, "serve it as it is")


def ignored_by_name(source: Layout, recipe: Recipe) -> list[set[str]]:
    """Per block, the linears that the recipe leaves in float.

    Raises:
        BismoothError: a pattern of ``ignore`` names no module, together they name all linears, or some of a block's
            experts and not the others; or the model has no linears.
    """
    check_linears(source)
    if recipe.ignore is None:
        return [set() for _ in source.layers]
    named, option = _named(source, "ignore", recipe.ignore), _as_given("ignore", recipe.ignore)
    chosen = [layer.with_siblings(found) for layer, found in zip(source.layers, named, strict=True)]
    if all(names == layer.linears.keys() for names, layer in zip(chosen, source.layers, strict=True)):
        what = "names every linear: nothing would be left to quantize"
        raise BismoothError.of(option, what, "let it name fewer")
    for i, layer in enumerate(source.layers):
        experts = sorted(chosen[i] & layer.experts)
        if experts and (others := sorted(layer.experts - chosen[i])):
            raise BismoothError.of(
                option,
                f"names {source.names.block(i)}{experts[0]} and not {others[0]}: vLLM serves all experts of a block "
                "alike",
                "name all their linears or none",
            )
    return chosen


def chosen_by_name(source: Layout, recipe: Recipe, ignored: Sequence[set[str]]) -> list[set[str]] | None:
    """Per block, the per-group linears that the recipe names, and those that vLLM serves like them; ``None`` if the
    weights decide.

    Raises:
        BismoothError: a pattern of ``group_layers`` names no linear, or they name an ignored one, or one whose K is not
            a multiple of ``group_size``.
    """
    if recipe.group_size is None or recipe.bits is not None:
        return [set() for _ in source.layers]
    if recipe.group_layers is None:
        return None
    named, option = _named(source, "group_layers", recipe.group_layers), _as_given("group_layers", recipe.group_layers)
    chosen = [layer.alike(found) for layer, found in zip(source.layers, named, strict=True)]
    if both := full_names([chosen[i] & names for i, names in enumerate(ignored)], source.names):
        raise BismoothError.of(
            f"{option} and {_as_given('ignore', recipe.ignore)}",
            f"both name {both[0]}, or a sibling that vLLM serves like it",
            "leave it out of one",
        )
    check_group_size(source, recipe, chosen)
    return chosen


def check_group_size(source: Layout, recipe: Recipe, grouped: Sequence[set[str]]) -> None:
    """Raises :class:`BismoothError` if a per-group linear's K is not a multiple of the group size."""
    for i, layer in enumerate(source.layers):
        for linear in sorted(grouped[i]):
            columns = layer.linears[linear][1]
            if not grouping.fits(columns, recipe.group_size):
                sizes = ", ".join(map(str, grouping.fitting(columns)))
                raise BismoothError.of(
                    f"{source.names.block(i)}{linear}",
                    f"K = {columns} is not a multiple of --group-size {recipe.group_size}",
                    f"{sizes} would fit, or leave it per-channel" if sizes else "leave it per-channel",
                )
