"""Which linears the options name, and whether they can be what the options say."""

import re
from collections.abc import Sequence

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.architectures import Layer
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.conversion.plan import full_names
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.recipe import Recipe


def named(pattern: re.Pattern[str], block: str, layer: Layer) -> set[str]:
    """The linears of a block, whose names begin with ``block``, whose full name ``pattern`` finds, with siblings."""
    return layer.with_siblings(name for name in layer.linears if pattern.search(block + name))


def _named(source: Layout, option: str, expression: str) -> list[set[str]]:
    """Per block, the linears that an option's regular expression finds, with siblings.

    Raises:
        BismoothError: there are none.
    """
    pattern = re.compile(expression)
    chosen = [named(pattern, source.names.block(i), layer) for i, layer in enumerate(source.layers)]
    if not any(chosen):
        remedy = f"they are called like {source.names.block(0)}{next(iter(source.layers[0].linears))}"
        raise BismoothError.of(f"{option} {expression!r}", "names no linear", remedy)
    return chosen


def ignored_by_name(source: Layout, recipe: Recipe) -> list[set[str]]:
    """Per block, the linears that the recipe leaves in float.

    Raises:
        BismoothError: ``ignore`` names no linear, all of them, or some of a block's experts and not the others.
    """
    if recipe.ignore is None:
        return [set() for _ in source.layers]
    chosen = _named(source, "--ignore", recipe.ignore)
    if all(names == layer.linears.keys() for names, layer in zip(chosen, source.layers, strict=True)):
        what = "names every linear: nothing would be left to quantize"
        raise BismoothError.of(f"--ignore {recipe.ignore!r}", what, "let it name fewer")
    for i, layer in enumerate(source.layers):
        experts = sorted(chosen[i] & layer.experts)
        if experts and (others := sorted(layer.experts - chosen[i])):
            raise BismoothError.of(
                f"--ignore {recipe.ignore!r}",
                f"names {source.names.block(i)}{experts[0]} and not {others[0]}: vLLM serves all experts of a block "
                "alike",
                "name all their linears or none",
            )
    return chosen


def chosen_by_name(source: Layout, recipe: Recipe, ignored: Sequence[set[str]]) -> list[set[str]] | None:
    """Per block, the per-group linears that the recipe names; ``None`` if the weights decide.

    Raises:
        BismoothError: ``group_layers`` names no linear, an expert, an ignored one, or one whose K is not a multiple of
            ``group_size``.
    """
    if recipe.group_size is None:
        return [set() for _ in source.layers]
    if recipe.group_layers is None:
        return None
    chosen = _named(source, "--group-layers", recipe.group_layers)
    if both := full_names([chosen[i] & names for i, names in enumerate(ignored)], source.names):
        raise BismoothError.of(
            f"--group-layers {recipe.group_layers!r} and --ignore {recipe.ignore!r}",
            f"both name {both[0]}, or a sibling that vLLM fuses with it",
            "leave it out of one",
        )
    for i, layer in enumerate(source.layers):
        if experts := sorted(chosen[i] & layer.experts):
            what = f"names {source.names.block(i)}{experts[0]}: experts are served per-channel only"
            raise BismoothError.of(f"--group-layers {recipe.group_layers!r}", what, "leave them out")
    check_group_size(source, recipe, chosen)
    return chosen


def check_group_size(source: Layout, recipe: Recipe, grouped: Sequence[set[str]]) -> None:
    """Raises :class:`BismoothError` if a per-group linear's K is not a multiple of the group size."""
    for i, layer in enumerate(source.layers):
        for linear in sorted(grouped[i]):
            columns = source.sizes[layer.linears[linear][1]]
            if not grouping.fits(columns, recipe.group_size):
                sizes = ", ".join(map(str, grouping.fitting(columns)))
                raise BismoothError.of(
                    f"{source.names.block(i)}{linear}",
                    f"K = {columns} is not a multiple of --group-size {recipe.group_size}",
                    f"{sizes} would fit, or leave it per-channel" if sizes else "leave it per-channel",
                )
