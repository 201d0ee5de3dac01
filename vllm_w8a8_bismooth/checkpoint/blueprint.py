"""What a config.json says of a model, before any tensor is looked at; where it says nothing, what the tensors say."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_w8a8_bismooth.checkpoint import findings, stacks
from vllm_w8a8_bismooth.checkpoint.basis import DISCOVERY, GIVEN, NAMES, Means
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.reader import Header, Headers
from vllm_w8a8_bismooth.errors import BismoothError, Unproven
from vllm_w8a8_bismooth.model.configs import count_of
from vllm_w8a8_bismooth.model.construction import Construction, Renamed
from vllm_w8a8_bismooth.model.layers import Layer, View
from vllm_w8a8_bismooth.model.names import Names

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.discovery.record import Discovery

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape."""


@dataclass(frozen=True)
class Blueprint:
    """A model as its config describes it.

    Attributes:
        names: of the decoder's parts in the checkpoint.
        sizes: ``blocks``, ``hidden``, ``heads``, ``kv_heads``, ``vocab`` and others, see :func:`findings.sizes_of`.
        construction: how transformers builds it.
        tied: whether the head is the embedding.
        layers: what each block holds.
        outside, optional: tensors outside the blocks that must and that may be there.
        known_by: where all of this is from, see :class:`basis.Basis`.
        record: what was found out or given.
        unproven: why no site is known, so that only methods without smoothing do; ``None`` where sites are known.
        views: full names of matrices that the files may have as parts of other tensors, or transposed -> how.
    """

    names: Names
    sizes: Mapping[str, int]
    construction: Construction
    tied: bool
    layers: list[Layer]
    outside: Shapes
    optional: Shapes
    known_by: str
    record: "Discovery | None" = None
    unproven: BismoothError | None = None
    views: Mapping[str, View] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Headers, means: Means, tensors: Mapping[str, Header] | None = None) -> "Blueprint":
        """What follows from a config, or where it says nothing, from the tensors.

        Args:
            checkpoint: its config is not trusted.
            means: by which it may be found out.
            tensors: those that count; ``None`` for all.

        Raises:
            BismoothError: it describes no model.
        """
        config = checkpoint.config
        tensors = checkpoint.headers if tensors is None else tensors
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            what = f"model_type = {repr(model_type)[:80]} names no type of model"
            raise BismoothError.of(CONFIG, what, "give the folder of a Hugging Face checkpoint")
        if means.known is not None and means.known.record is not None:
            return cls.discovered(config, means.known.record, tensors, means.known.by)
        from vllm_w8a8_bismooth.discovery.discover import discover

        try:
            found = discover(config, checkpoint.code, means.progress, means.given)
        except Unproven as error:
            if means.given is not None:
                raise
            return cls.guessed(config, tensors, error)
        return cls.discovered(config, found, tensors, DISCOVERY if means.given is None else GIVEN)

    @classmethod
    def discovered(
        cls, config: Mapping, found: "Discovery", tensors: Iterable[str] = (), by: str = DISCOVERY
    ) -> "Blueprint":
        """By what was found out about such models, or was given and proven.

        Args:
            config: as it was asked about.
            found: the answer.
            tensors: in the files, where the decoder may have another trunk than its class gives it: GPT-2's has none.
            by: whose word it is.
        """
        names = Names(
            found.names.blocks, str(found.names.embedding), found.names.norm, found.names.head or "lm_head.weight"
        )
        moved = _moved(names, tensors)
        around = {moved(name): shape for name, shape in found.outside.items()}
        layers, construction = findings.layers_of(found), findings.construction_of(found, moved)
        norm = None if names.norm is None else moved(names.norm)
        names = Names(moved(names.blocks), moved(names.embedding), norm, names.head)
        needed = {names.embedding, names.norm, *construction.outside.values()}
        vocabulary, hidden = around[names.embedding]
        return cls(
            names=names,
            sizes=findings.sizes_of(config, layers, around[names.embedding], max(found.experts)),
            construction=construction,
            tied=found.names.tied,
            layers=layers,
            outside={name: shape for name, shape in around.items() if name in needed},
            optional={names.head: (vocabulary, hidden)} | {n: shape for n, shape in around.items() if n not in needed},
            views=findings.views_of(layers, names),
            known_by=by,
            record=found,
        )

    @classmethod
    def guessed(cls, config: Mapping, tensors: Mapping[str, Header], unproven: BismoothError) -> "Blueprint":
        """By the names and shapes of the tensors alone.

        Args:
            unproven: why nothing else is known.
        """
        names = stacks.names_among(tensors)
        layers = stacks.layers_among(tensors, names)
        key, count = count_of(config)
        if count is not None and count > len(layers):
            what = f"is missing, because {CONFIG} says {key} = {count}"
            raise BismoothError.of(f"{names.block(len(layers))}*", what, "download the checkpoint again")
        layers = layers[:count]
        table = tensors[names.embedding].shape
        inside = {name: header.shape for name, header in tensors.items() if not names.inside(name)}
        return cls(
            names=names,
            sizes=findings.sizes_of(config, layers, table),
            construction=Renamed(),
            tied=names.head not in tensors,
            layers=layers,
            outside={name: shape for name, shape in inside.items() if name != names.head},
            optional={names.head: table},
            known_by=NAMES,
            unproven=unproven,
        )


def _moved(names: Names, tensors: Iterable[str]) -> Callable[[str], str]:
    """What tensors are called in files whose blocks stand behind another trunk than the model's class has them."""
    tensors = list(tensors)
    stacks_there = {m[0] for m in map(re.compile(rf"(?:.*\.)?{re.escape(names.stack)}\.(?=0\.)").match, tensors) if m}
    if names.blocks in stacks_there or len(stacks_there) != 1:
        return lambda name: name
    old, new = names.trunk, stacks_there.pop().removesuffix(f"{names.stack}.")
    return lambda name: new + name.removeprefix(old) if name.startswith(old) else name


@dataclass
class Promise:
    """The tensors that a config implies, name -> shape, and whether they are too many to be listed."""

    required: dict[str, tuple[int, ...]]
    optional: dict[str, tuple[int, ...]]
    endless: bool = False

    @classmethod
    def of(cls, blueprint: Blueprint, bound: int) -> "Promise":
        """Listed up to twice ``bound``, the number in the headers: the config's word for its blocks is not trusted."""
        names = blueprint.names
        found = cls(dict(blueprint.outside), dict(blueprint.optional), blueprint.sizes.get("experts", 0) > bound)
        for i, layer in enumerate(() if found.endless else blueprint.layers):
            found.required |= {names.block(i) + name: shape for name, shape in layer.tensors.items()}
            if len(found.required) > 2 * bound:
                found.endless = True
                break
        return found
