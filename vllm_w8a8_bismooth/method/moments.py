"""What balancing needs to know of activations and weights: how large each channel is, and how often it is the largest.

The INT8 step of a row (a token, or the weights of one output channel) is set by the largest of its channels, so the
error that rounding leaves depends on ``E[max_k z_k^2]`` over the rows. A norm of high order stands in for the maximum:
``max_k z_k^2`` is about ``(sum_k |z_k|^p)^(2/p)``, whose mean needs only one sum a channel. So it can be gathered row
by row over any number of tokens, no maximum of a few tokens is fitted, and the whole state is some vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_w8a8_bismooth.method.columns import Columns

ORDER = 8
"""p. Between 6 and 12 makes no difference beyond the noise on three models; 8 is two squarings of a square."""


@dataclass
class Moments:
    """Sums over rows of K channels. Every row counts as much as any other: it is divided by its root mean square.

    Attributes:
        rows: number of rows that were added.
        largest: fp32 ``[K]``, largest magnitude, before rows are divided.
        square: fp64 ``[K]``, sum of squares.
        high: fp64 ``[K]``, sum of magnitudes to the power :data:`ORDER`.
    """

    rows: int
    largest: torch.Tensor
    square: torch.Tensor
    high: torch.Tensor

    @classmethod
    def none(cls, channels: int, device: torch.device | str = "cpu") -> "Moments":
        """Moments of no rows."""
        return cls(
            0,
            torch.zeros(channels, device=device),
            *(torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2)),
        )

    def add(self, rows: torch.Tensor) -> None:
        """Count fp32 ``[T, K]``, whose memory is used up."""
        self.rows += len(rows)
        torch.maximum(self.largest, rows.abs_().amax(dim=0), out=self.largest)
        square = rows.square_()
        square /= square.mean(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        self.square += square.sum(dim=0)
        # In fp64, because in fp32 the power of a channel a million times smaller than the others would be 0: not seen.
        self.high += square.square_().double().square_().sum(dim=0)

    def merge(self, other: "Moments") -> None:
        """Add the rows that another one has counted."""
        self.rows += other.rows
        torch.maximum(self.largest, other.largest, out=self.largest)
        self.square += other.square
        self.high += other.high

    def scaled(self, factor: torch.Tensor) -> "Moments":
        """Moments of the same rows after channel k is multiplied by ``factor[k]``, fp32 ``[K]``.

        Each row keeps the root mean square that it was counted with.
        """
        f = factor.double()
        return Moments(self.rows, self.largest * factor, self.square * f**2, self.high * f**ORDER)

    def tied(self, columns: Columns) -> "Moments":
        """Moments of a site's channels, from those of the columns that hold them."""
        square, high = (columns.gather(values, "sum") for values in (self.square, self.high))
        return Moments(self.rows, columns.gather(self.largest, "amax"), square, high)

    def rms(self) -> torch.Tensor:
        """fp32 ``[K]``, root mean square of each channel. Zeros become the median, so that none is left."""
        return typical(self.square / max(1, self.rows)).sqrt().float()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The moments by name, for a file; :meth:`of` is the way back."""
        return {"rows": torch.tensor([self.rows]), "largest": self.largest, "square": self.square, "high": self.high}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> "Moments":
        """Moments from what :meth:`tensors` gave."""
        vectors = (tensors[name].to(device) for name in ("largest", "square", "high"))
        return cls(int(tensors["rows"]), *vectors)


def typical(values: torch.Tensor) -> torch.Tensor:
    """Replaces zeros in nonnegative ``[K]`` by the median of the others: unseen is treated as typical."""
    seen = values > 0
    return torch.where(seen, values, values[seen].median() if seen.any() else values.new_ones(()))
