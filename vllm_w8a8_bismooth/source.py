"""A checkpoint that is fit for conversion: audited, its tensors sorted into decoder blocks."""

import re
from itertools import islice
from pathlib import Path

from vllm_w8a8_bismooth.architectures import (
    BLOCK,
    Architecture,
    Layer,
    architecture_of,
    audit,
    layers_of,
    sizes_of,
)
from vllm_w8a8_bismooth.checkpoint import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError

_PROBLEMS_SHOWN = 8
_BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Source:
    """A checkpoint that passed the audit.

    Attributes:
        checkpoint, architecture, sizes: see their modules.
        layers: what each block holds.
        blocks: per block, the names inside it, in the order of the files.
        outside: full names of everything else.

    Raises:
        BismoothError: on construction, naming the first problems that the audit found.
    """

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint(folder)
        config = self.checkpoint.config
        self.architecture: Architecture = architecture_of(config)
        self.sizes = sizes_of(config, self.architecture)
        shapes = {name: header.shape for name, header in self.checkpoint.headers.items()}
        problems = list(islice(audit(config, self.architecture, self.sizes, shapes), _PROBLEMS_SHOWN))
        if problems:
            raise BismoothError("\n".join([f"{folder}: {problems[0]}", *(f"  also: {p}" for p in problems[1:])]))
        self.layers: list[Layer] = layers_of(config, self.architecture, self.sizes, self.sizes["blocks"])
        self.blocks: list[list[str]] = [[] for _ in self.layers]
        self.outside: list[str] = []
        for name in self.checkpoint.headers:
            match = _BLOCK_TENSOR.fullmatch(name)
            if match:
                self.blocks[int(match[1])].append(match[2])
            else:
                self.outside.append(name)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.checkpoint.headers.values())

    def block_nbytes(self) -> int:
        """Bytes of the largest block."""
        headers = self.checkpoint.headers
        return max(sum(headers[BLOCK.format(i) + n].nbytes for n in names) for i, names in enumerate(self.blocks))
