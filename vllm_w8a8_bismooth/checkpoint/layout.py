"""A checkpoint laid out as a model: audited, its tensors sorted into decoder blocks."""

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.architectures import BLOCK, Architecture, Layer
from vllm_w8a8_bismooth.checkpoint.audit import architecture_of, audit, layers_of, sizes_of
from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint, Headers
from vllm_w8a8_bismooth.errors import BismoothError, Problem

PROBLEMS = 1000
"""How many problems of one checkpoint are listed at most."""
_BLOCK_TENSOR = re.compile(r"model\.layers\.(0|[1-9]\d*)\.(.+)")


class Layout:
    """What the headers of a checkpoint hold, as a model; nothing more than headers is needed.

    Attributes:
        checkpoint, architecture, sizes: see their modules.
        layers: what each block holds.
        blocks: per block, the names inside it, in the order of the files.
        outside: full names of everything else.
        problems: of the headers and of the audit, bounded by :data:`PROBLEMS`. While there are any, blocks may lack
            tensors and tensors may have any shape.

    Raises:
        BismoothError: on construction, with all problems, if the config does not let the model be laid out.
    """

    def __init__(self, headers: Headers):
        self.checkpoint = headers
        self.problems: list[Problem] = list(islice(headers.problems, PROBLEMS))
        if not headers.config and self.problems:  # config.json is one of them
            raise BismoothError(*self.problems)
        shapes = {name: header.shape for name, header in headers.headers.items()}
        try:
            self.architecture: Architecture = architecture_of(headers.config)
            self.sizes = sizes_of(headers.config, self.architecture)
            if shapes:
                found = audit(headers.config, self.architecture, self.sizes, shapes, headers.lost)
                self.problems += islice(found, PROBLEMS - len(self.problems))
        except BismoothError as error:
            raise BismoothError(*self.problems, *error.problems) from None
        if max(self.sizes["blocks"], self.sizes.get("experts", 0)) > len(shapes) + len(headers.lost):
            raise BismoothError(*self.problems)  # too large to lay out, and no header backs it
        self.layers: list[Layer] = layers_of(headers.config, self.architecture, self.sizes, self.sizes["blocks"])
        self.blocks: list[list[str]] = [[] for _ in self.layers]
        self.outside: list[str] = []
        for name in shapes:
            match = _BLOCK_TENSOR.fullmatch(name)
            if match and int(match[1]) < len(self.blocks):
                self.blocks[int(match[1])].append(match[2])
            else:
                self.outside.append(name)

    def outside_with(self, blocks: range) -> list[str]:
        """The tensors outside the blocks that go with a range of blocks: all with the first block, else none."""
        return self.outside if blocks.start == 0 else []

    def refuse(self) -> None:
        """Raises :class:`BismoothError` with the problems, if there are any."""
        if self.problems:
            first, *others = self.problems
            raise BismoothError(replace(first, where=f"{self.checkpoint.place}: {first.where}"), *others)

    def nbytes(self, blocks: range | None = None) -> int:
        """Bytes of all tensors, or of a part with these blocks."""
        headers = self.checkpoint.headers
        blocks = range(len(self.blocks)) if blocks is None else blocks
        names = [*self.outside_with(blocks), *(BLOCK.format(i) + n for i in blocks for n in self.blocks[i])]
        return sum(headers[name].nbytes for name in names)

    def block_nbytes(self) -> int:
        """Bytes of the largest block."""
        headers = self.checkpoint.headers
        return max(sum(headers[BLOCK.format(i) + n].nbytes for n in names) for i, names in enumerate(self.blocks))


class Source(Layout):
    """A checkpoint folder that passed the audit, with its tensors at hand.

    Raises:
        BismoothError: on construction, with all problems.
    """

    checkpoint: Checkpoint

    def __init__(self, folder: Path | Folder):
        super().__init__(Checkpoint(folder))
        self.refuse()
