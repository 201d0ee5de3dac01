"""How transformers builds the model of a checkpoint: where its parts are, and what they are called there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Construction:
    """Where transformers keeps what the checkpoint stores.

    Attributes:
        decoder: what the paths of modules begin with where the decoder is part of a model with a head.
        blocks, embedding: paths of the list of blocks and of the embedding in the decoder.
        norm: that of the norm behind the last block; ``None`` where there is none.
        outside: parameter of the decoder outside its blocks -> tensor of the checkpoint, but for embedding and norm.
        returns_tuples: whether a block returns its hidden states in a tuple.
        renamed: beginning of a name inside a block of transformers' -> in the checkpoint.
        expert_linears: what the checkpoint calls an expert's gate, up and down projection.
    """

    decoder: str = "model."
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    norm: str | None = "norm"
    outside: Mapping[str, str] = field(default_factory=dict)
    returns_tuples: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    expert_linears: Sequence[str] = ("gate_proj", "up_proj", "down_proj")

    def stored(self, name: str) -> str:
        """What the checkpoint calls a tensor or module of a block that transformers builds under ``name``."""
        for built, stored in self.renamed.items():
            name = name.replace(built, stored, 1) if name.startswith(built) else name
        return name

    def built(self, name: str) -> str:
        """The inverse of :meth:`stored`."""
        for built, stored in self.renamed.items():
            name = name.replace(stored, built, 1) if name.startswith(stored) else name
        return name
