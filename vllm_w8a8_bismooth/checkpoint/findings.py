"""What discovery found of a model, in the terms of the converter."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_w8a8_bismooth.model.configs import text_of
from vllm_w8a8_bismooth.model.construction import Construction, Experts, Found, Inventory, Part
from vllm_w8a8_bismooth.model.floats import TOWER
from vllm_w8a8_bismooth.model.fusions import fused_among
from vllm_w8a8_bismooth.model.layers import Layer, Site, View
from vllm_w8a8_bismooth.model.names import Names

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.discovery import record

_GATE = re.compile(r"(^|[._])(gate|w1|wi_0|c_fc_0|linear_1)([._]|$)")
"""Names of linears whose output goes through the activation function, and multiplies another's."""

_INNER = {"gate_up_proj": 2, "up_proj": 1}
"""Last part of a parameter's name in transformers' stacked experts -> how many linears of each expert it holds."""


def layers_of(found: "record.Discovery") -> list[Layer]:
    """What each block holds."""
    each = zip(found.layers, found.stored, found.experts, strict=True)
    kinds = [replace(_layer(layer), views=_views(stored, experts)) for layer, stored, experts in each]
    return [kinds[kind] for kind in found.blocks]


def views_of(layers: list[Layer], names: Names) -> dict[str, View]:
    """Full name of each matrix that files may have otherwise -> how, with the full name of the tensor that has it."""
    return {
        names.block(i) + name: replace(view, tensor=names.block(i) + view.tensor)
        for i, layer in enumerate(layers)
        for name, view in layer.views.items()
    }


def _views(stored: "record.Stored", experts: int) -> dict[str, View]:
    """Matrices that are parts of other tensors, or transposed, expert by expert."""
    found = {}
    for template, view in stored.views.items():
        _, height, width = (1, *view.whole)[-3:]
        shape = (view.rows[1], height if view.transposed else width)
        for e in range(experts) if "{}" in template else (None,):
            name = template if e is None else template.format(e)
            found[name] = View(view.tensor, view.whole, shape, e, view.rows[0], view.transposed)
    return found


def _layer(layer: "record.Layer") -> Layer:
    norms = {site.producer: site.offset for site in layer.sites if site.producer not in layer.linears}
    offset = next(iter(norms.values()), 0.0)
    # A norm may stand between what ends a half of the block and the stream.
    fed = {name for site in layer.sites if site.producer in layer.linears for name in site.consumers}
    order = [*(name for name in layer.linears if name in layer.experts), *layer.linears, *layer.floats]
    posts = {name: offset for name in layer.vectors if name in layer.writers and name not in norms}
    # What ends a half of the block in front of such a norm writes into the stream, too; q may have as many rows.
    widths, producers = {layer.vectors[name] for name in posts}, {site.producer for site in layer.sites}
    behind = {name for name in fed & layer.linears.keys() - producers if layer.linears[name][0] in widths}
    return Layer(
        tensors=layer.tensors,
        linears=layer.linears,
        sites=tuple(_site(site, layer, order) for site in layer.sites if _folds_matrices(site, layer)),
        routers=layer.floats,
        posts=posts,
        writers=layer.writers | behind,
        fused=fused_among(layer.linears),
        row_parallel=frozenset((layer.writers | fed) & layer.linears.keys()),
        experts=layer.experts,
    )


def _folds_matrices(site: "record.Site", layer: "record.Layer") -> bool:
    """Whether all that a site's factor goes into are matrices, and no stacks of them."""
    return all(len(layer.tensors.get(f"{name}.weight", ())) == 2 for name in site.consumers)


def _site(site: "record.Site", layer: "record.Layer", order: list[str]) -> Site:
    """The last consumer must see every token: of experts and a router, the router."""
    rows = layer.linears[site.producer][0] if site.producer in layer.linears else layer.vectors[site.producer]
    return Site(
        name=site.name,
        producer=site.producer,
        consumers=tuple(sorted(site.consumers, key=order.index)),
        rows=site.rows or ((0, rows),),
        columns=site.columns,
        gate=_gate_of(site, layer),
        offset=site.offset,
        power=site.power,
    )


def _gate_of(site: "record.Site", layer: "record.Layer") -> str | None:
    """The linear that opens what a linear makes: by its name, and its shape."""
    if site.producer not in layer.linears:
        return None
    rows, columns = layer.linears[site.producer]
    if site.rows == ((rows // 2, rows // 2),):
        return site.producer
    parent = site.producer.rpartition(".")[0]
    return next(
        (
            name
            for name, shape in layer.linears.items()
            if shape == (rows, columns) and name.rpartition(".")[0] == parent and name != site.producer
            if _GATE.search(name)
        ),
        None,
    )


def construction_of(found: "record.Discovery", moved: Callable[[str], str]) -> Construction:
    """How transformers builds it; ``moved`` is what the files call a tensor outside the blocks."""
    base, modules = found.modules.base, found.modules
    return Found(
        decoder=base,
        blocks=modules.blocks.removeprefix(base),
        embedding=modules.embedding.removeprefix(base),
        norm=modules.norm and modules.norm.removeprefix(base),
        outside={name.removeprefix(base): moved(tensor) for name, tensor in modules.outside.items() if _is_text(name)},
        returned=modules.returned,
        kinds=tuple(Inventory(stored.parameters, _mixture(stored.parameters)) for stored in found.stored),
        kind=found.blocks,
    )


def _is_text(parameter: str) -> bool:
    """Whether a parameter outside the blocks may have a part in what the decoder makes of text."""
    return not TOWER.search(parameter)


def _mixture(parameters: Mapping[str, tuple[Part, ...]]) -> Experts | None:
    """Stacked experts of which the checkpoint has each one's gate (if there is one), up and down projection."""
    for name, parts in parameters.items():
        module, _, leaf = name.rpartition(".")
        down = parameters.get(f"{module}.down_proj", ())
        linears = tuple(part.tensor.removesuffix(".weight") for part in (*parts, *down))
        if len(linears) == _INNER.get(leaf, 0) + 1 and all("{}" in linear for linear in linears) and "{}" not in name:
            return Experts(module, linears)
    return None


def sizes_of(config: Mapping, layers: list[Layer], table: tuple[int, ...], experts: int = 0) -> dict[str, int]:
    """Blueprint's sizes: ``blocks``, ``hidden``, ``intermediate``, ``vocab``; ``heads``, ``kv_heads`` and ``experts``
    where there are any.

    Args:
        config: says how many heads there are.
        layers: of all blocks.
        table: shape of the embedding.
        experts: of a mixture; 0 for none.
    """
    known = {key: value for key, value in text_of(config).items() if type(value) is int and 0 < value < 2**48}
    vocabulary, hidden = table
    widths = [max(shape) for layer in layers for shape in layer.linears.values()]
    sizes = {"blocks": len(layers), "hidden": hidden, "vocab": vocabulary, "intermediate": max(widths, default=hidden)}
    if heads := next((known[key] for key in HEADS if key in known), None):
        sizes |= {"heads": heads, "kv_heads": next((known[key] for key in _KV_HEADS if key in known), heads)}
    return sizes | ({"experts": experts} if experts else {})


HEADS = ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads")
"""Keys under which configs have the number of query heads."""
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
