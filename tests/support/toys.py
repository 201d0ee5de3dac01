"""Language models of a few lines, with one peculiarity each, for what looks like a smoothing site and is none."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

HIDDEN, INNER, VOCAB = 16, 24, 256


class Norm(nn.Module):
    """Root mean square norm with a gain."""

    def __init__(self, size: int = HIDDEN):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class Block(nn.Module):
    """``x + down(change(up(norm(x))))``; what a subclass does otherwise is its peculiarity."""

    def __init__(self):
        super().__init__()
        self.norm = Norm()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN, bias=False)
        self.more()

    def more(self) -> None:
        """Further parameters."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.change(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks between an embedding and a head; ``given`` is handed to each."""

    def __init__(self, block: Callable[[], nn.Module], **given: object):
        super().__init__()
        self.given = given
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([block(), block()])
        self.norm, self.head = Norm(), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, **self.given)
        return SimpleNamespace(logits=self.head(self.norm(x)))


class Experts(Block):
    """A mixture of two experts of four, chosen by a router whose weights are normalised."""

    def more(self) -> None:
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.ups = nn.Parameter(torch.zeros(4, INNER, HIDDEN))
        self.downs = nn.Parameter(torch.zeros(4, HIDDEN, INNER))

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, chosen = self.router(x).softmax(-1).topk(2)
        return scores / scores.sum(-1, keepdim=True), chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed, out = self.norm(x)[0], x[0] + self.down(self.up(self.norm(x)))[0]
        scores, chosen = self.choose(normed)
        for expert in range(4):
            token, rank = torch.where(chosen == expert)
            if len(token):
                made = functional.linear(functional.linear(normed[token], self.ups[expert]), self.downs[expert])
                out = out.index_add(0, token, made * scores[token, rank, None])
        return out[None]


def named(name: str, **methods: Callable) -> Callable[[], Block]:
    """A block with other methods."""
    return type(name, (Block,), methods)
