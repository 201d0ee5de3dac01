"""How transformers builds the model of a checkpoint: where its parts are, and what they are called there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vllm_w8a8_bismooth.model.names import EXPERT, template


@dataclass(frozen=True)
class Part:
    """A piece of a parameter, and where the checkpoint has it.

    Attributes:
        tensor: name inside the block; ``{}`` stands for the number of the expert, which is the parameter's first index.
        into: (start, length) of the parameter's (or its slice's) rows that it is, or columns if it is transposed;
            ``None`` for all of it.
        start: the first of the tensor's rows that are meant.
        transposed: whether the tensor's last two axes are the parameter's in reverse.
    """

    tensor: str
    into: tuple[int, int] | None = None
    start: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Experts:
    """Where a block has its experts.

    Attributes:
        module: path of the module with the stacked weights.
        linears: what the checkpoint calls the gate (if there is one), up and down projection of one, with ``{}`` for
            its number.
    """

    module: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Construction:
    """Where transformers keeps what the checkpoint stores.

    Attributes:
        decoder: what the paths of modules begin with where the decoder is part of a model with a head.
        blocks, embedding: paths of the list of blocks and of the embedding in the decoder.
        norm: that of the norm behind the last block; ``None`` where there is none.
        outside: parameter of the decoder outside its blocks -> tensor of the checkpoint, but for embedding and norm.
        returned: how many things a block returns in a tuple, hidden states first; 0 where it returns them alone.
    """

    decoder: str = "model."
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    norm: str | None = "norm"
    outside: Mapping[str, str] = field(default_factory=dict)
    returned: int = 0

    def parts(self, index: int, parameter: str) -> Sequence[Part]:
        """What the checkpoint has of a parameter of block ``index``."""
        raise NotImplementedError

    def built(self, index: int, linear: str) -> str:
        """Path in block ``index`` of the module that the checkpoint calls so; experts are modules of their own."""
        raise NotImplementedError

    def experts(self, index: int) -> Experts | None:
        """Where block ``index`` has experts, if it has any."""
        raise NotImplementedError


@dataclass(frozen=True)
class Renamed(Construction):
    """Modules with the names of the checkpoint, but for what they begin with.

    Attributes:
        renamed: beginning of a name inside a block of transformers' -> in the checkpoint.
        mixture: of blocks that have experts.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    mixture: Experts | None = None

    def parts(self, index: int, parameter: str) -> Sequence[Part]:
        for built, stored in self.renamed.items():
            parameter = parameter.replace(built, stored, 1) if parameter.startswith(built) else parameter
        return (Part(parameter),)

    def built(self, index: int, linear: str) -> str:
        for built, stored in self.renamed.items():
            linear = linear.replace(stored, built, 1) if linear.startswith(stored) else linear
        return linear

    def experts(self, index: int) -> Experts | None:
        return self.mixture


@dataclass(frozen=True)
class Inventory:
    """What the checkpoint has of blocks of one kind, as it was found out.

    Attributes:
        parameters: of the block -> what the checkpoint has of them.
        mixture: where its experts are; ``None`` without any.
    """

    parameters: Mapping[str, tuple[Part, ...]]
    mixture: Experts | None = None


@dataclass(frozen=True)
class Found(Construction):
    """Modules whose names were found out, block by block.

    Attributes:
        kinds: of blocks.
        kind: the number of that of each block.
    """

    kinds: tuple[Inventory, ...] = ()
    kind: tuple[int, ...] = ()

    def parts(self, index: int, parameter: str) -> Sequence[Part]:
        kind = self.kinds[self.kind[index]]
        if parameter in kind.parameters:
            return kind.parameters[parameter]
        if match := EXPERT.search(parameter):  # experts that are modules of their own in transformers, too
            parts = kind.parameters.get(template(parameter))
            if parts is not None:
                return [replace(part, tensor=part.tensor.format(match[0])) for part in parts]
        assert kind.mixture is not None, parameter
        number, leaf = parameter.removeprefix(f"{kind.mixture.module}.").removesuffix(".weight").split(".")
        (linear,) = (name for name in kind.mixture.linears if name.endswith(f".{leaf}"))
        return (Part(f"{linear.format(number)}.weight"),)

    def built(self, index: int, linear: str) -> str:
        kind = self.kinds[self.kind[index]]
        if kind.mixture is not None:
            for name in kind.mixture.linears:
                before, after = name.split("{}")
                if linear.startswith(before) and linear.endswith(after):
                    return f"{kind.mixture.module}.{linear[len(before) : len(linear) - len(after)]}{after}"
        stored = template(f"{linear}.weight")
        (name,) = (name for name, parts in kind.parameters.items() if [part.tensor for part in parts] == [stored])
        numbers = EXPERT.findall(linear)[:1]
        return name.removesuffix(".weight").format(*numbers)

    def experts(self, index: int) -> Experts | None:
        return self.kinds[self.kind[index]].mixture
