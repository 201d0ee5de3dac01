"""Which column of a consumer holds which channel of its site, and which rows of the producer made it."""

from dataclasses import dataclass

import torch

from vllm_w8a8_bismooth.model.layers import NONE, Runs, Site


def indices(runs: Runs) -> torch.Tensor:
    """int64 ``[n]``: the indices in runs, in order; :data:`layers.NONE` stays what it is all through a run."""
    parts = [
        torch.arange(first, first + number) if first != NONE else torch.full((number,), NONE) for first, number in runs
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Columns:
    """Channels of a site, as its consumers' columns have them.

    Attributes:
        channels: number of channels.
        held: int64 ``[K]``, the channel that each column holds, or :data:`layers.NONE`; ``None`` is one each, in order.
    """

    channels: int
    held: torch.Tensor | None

    @classmethod
    def of(cls, site: Site) -> "Columns":
        return cls(site.channels, None if site.columns is None else indices(site.columns))

    def spread(self, values: torch.Tensor, other: float = 1.0) -> torch.Tensor:
        """One value for each column ``[K]``, from one for each channel ``[n]``; ``other`` for columns without one."""
        if self.held is None:
            return values
        return torch.cat([values, values.new_full((1,), other)])[self.held.to(values.device)]

    def gather(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """One value for each channel ``[n]``, from those ``[K]`` of the columns that hold it: ``sum``, ``amax`` or
        ``amin`` of them. A channel that no column holds has 0."""
        if self.held is None:
            return values
        held = self.held.to(values.device)
        held = torch.where(held == NONE, self.channels, held)
        found = values.new_zeros(self.channels + 1)
        return found.scatter_reduce(0, held, values, how, include_self=False)[:-1]
