"""A checkpoint laid out as a model: audited, its tensors sorted into decoder blocks."""

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.audit import audit, check_unquantized
from vllm_w8a8_bismooth.checkpoint.basis import Basis, Means
from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint
from vllm_w8a8_bismooth.checkpoint.companions import link_problems, module_problems
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, Folder
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint, Headers
from vllm_w8a8_bismooth.checkpoint.untied import untie
from vllm_w8a8_bismooth.errors import BadSource, BismoothError, Problem
from vllm_w8a8_bismooth.model.configs import chosen_of
from vllm_w8a8_bismooth.model.layers import Layer

_ALONE = Means()
PROBLEMS = 1000
"""How many problems of one checkpoint are listed at most."""


class Layout:
    """What the headers of a checkpoint hold, as a model; nothing more than headers is needed.

    Attributes:
        checkpoint, construction, sizes, names, tied, known_by, record, unproven: see their modules.
        layers: what each block holds.
        blocks: per block, the names inside it, in the order of the files.
        outside: full names of everything else.
        notes: what was taken in a way that the user should know.
        problems: of the headers and of the audit, bounded by :data:`PROBLEMS`. While there are any, blocks may lack
            tensors and tensors may have any shape.

    Args:
        headers: of the checkpoint.
        means: by which it may be laid out.

    Raises:
        BismoothError: on construction, with all problems, if the config does not let the model be laid out.
    """

    def __init__(self, headers: Headers, means: Means = _ALONE):
        self.checkpoint = headers
        self.problems: list[Problem] = list(islice(headers.problems, PROBLEMS))
        if not headers.config and self.problems:  # config.json is one of them
            raise BadSource(*self.problems)
        tensors = headers.headers
        try:
            check_unquantized(headers.config, {name: header.dtype for name, header in tensors.items()})
            headers.code = headers.place.code() if means.trusted else None
            blueprint = Blueprint.of(headers, means)
            blueprint = untie(headers, means, blueprint) if means.untied else blueprint
            self.known_by, self.record = blueprint.known_by, blueprint.record
            self.names, self.tied = blueprint.names, blueprint.tied
            headers.names = self.names
            self.construction, self.sizes, self.unproven = blueprint.construction, blueprint.sizes, blueprint.unproven
            self.problems += headers.show(blueprint.views)
            tensors = headers.headers
            if tensors:
                found = audit(headers, blueprint, tensors)
                self.problems += islice(found, PROBLEMS - len(self.problems))
            self.problems += [*module_problems(headers.place), *link_problems(headers.place)]
        except BismoothError as error:
            raise BadSource(*self.problems, *error.problems) from None
        if max(self.sizes["blocks"], self.sizes.get("experts", 0)) > len(tensors) + len(headers.lost):
            raise BadSource(*self.problems)  # too large to lay out, and no header backs it
        self.layers: list[Layer] = blueprint.layers
        self.blocks: list[list[str]] = [[] for _ in self.layers]
        self.outside: list[str] = []
        self.notes = [*headers.notes]
        if self.unproven is not None:
            why = self.unproven.problems[0].what
            self.notes.append(f"what its blocks hold is guessed by names and shapes, not compared with {CONFIG}: {why}")
        beyond = set()
        for name in tensors:
            place = self.names.inside(name)
            if place and place[0] < len(self.blocks):
                self.blocks[place[0]].append(place[1])
            else:
                self.outside.append(name)
                beyond |= {place[0]} if place else set()
        if beyond:
            many = len(beyond) > 1
            what = f"{len(beyond)} blocks behind num_hidden_layers" if many else f"block {min(beyond)}"
            does = "which predict further tokens (MTP), stay" if many else "which predicts further tokens (MTP), stays"
            self.notes.append(f"{what}, {does} in the source's dtype")

    @property
    def basis(self) -> Basis:
        """What the layout rests on."""
        return Basis.of(self.known_by, self.record, self.layers)

    def place_of(self, name: str) -> tuple[int, str]:
        """The block of a tensor or module inside one, and its name there."""
        place = self.names.inside(name)
        assert place is not None, name
        return place

    def outside_with(self, blocks: range) -> list[str]:
        """The tensors outside the blocks that go with a range of blocks: all with the first block, else none."""
        return self.outside if blocks.start == 0 else []

    def floats(self) -> list[str]:
        """Modules outside the blocks whose weights are matrices that stay in float: heads, further predictors."""
        found = self.checkpoint.headers
        return [
            name.removesuffix(".weight")
            for name in self.outside
            if name.endswith(".weight") and len(found[name].shape) == 2 and name != self.names.embedding
        ]

    def kept_in_float(self) -> dict[str, str]:
        """Matrices inside the blocks that never become INT8, with ``*`` for all numbers in their names -> why."""
        kinds = {id(layer): layer for layer in self.layers}.values()
        return {re.sub(r"\.\d+\.", ".*.", name): why for layer in kinds for name, why in layer.routers.items()}

    def refuse(self) -> None:
        """Raises :class:`BismoothError` with the problems, if there are any."""
        if self.problems:
            first, *others = self.problems
            raise BadSource(replace(first, where=f"{self.checkpoint.place}: {first.where}"), *others)

    def nbytes(self, blocks: range | None = None) -> int:
        """Bytes of all tensors in memory, or of a part with these blocks."""
        return sum(self.checkpoint.headers[name].nbytes for name in self._part(blocks))

    def stored_nbytes(self, blocks: range | None = None) -> int:
        """The same as the files have them, which is less where weights are stored in FP8 or FP4."""
        return sum(map(self.checkpoint.stored_nbytes, self._part(blocks)))

    def _part(self, blocks: range | None) -> list[str]:
        blocks = range(len(self.blocks)) if blocks is None else blocks
        return [*self.outside_with(blocks), *(self.names.block(i) + n for i in blocks for n in self.blocks[i])]

    def work(self, index: int, linear: str) -> float:
        """Multiplications of a linear of a block for a token; an expert's are shared out over all tokens."""
        rows, columns = self.layers[index].linears[linear]
        chosen, experts = chosen_of(self.checkpoint.config), self.sizes.get("experts")
        share = min(1.0, chosen / experts) if chosen and experts and linear in self.layers[index].experts else 1.0
        return share * rows * columns

    def block_nbytes(self) -> int:
        """Bytes of the largest block."""
        headers = self.checkpoint.headers
        return max(sum(headers[self.names.block(i) + n].nbytes for n in inside) for i, inside in enumerate(self.blocks))


class Source(Layout):
    """A checkpoint folder that passed the audit, with its tensors at hand.

    Raises:
        BismoothError: on construction, with all problems.
    """

    checkpoint: Checkpoint

    def __init__(self, folder: str | Path | Folder, means: Means = _ALONE):
        super().__init__(Checkpoint(folder), means)
        self.refuse()
