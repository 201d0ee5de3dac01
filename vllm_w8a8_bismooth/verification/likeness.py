"""Whether rows of four bits resemble the source's.

They bound no factors as INT8 does: ranges are clipped, and compensation moves codes by any number of steps. But where
steps are fine, what they leave of a row or a column is small, and of another row or column it is not.
"""

import torch

from vllm_w8a8_bismooth.checkpoint.encodings import MULTIPLIER, WIDE
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint

_FINE = 1 / 8
"""Of the power of a row or column: how much half a step in each weight may have at most, so that errors are small."""
_UNLIKE = {"rows": 0.5, "columns": 2.0}
"""Of the same: from which error on it is another one. Compensation may move a column by more than it has, where others
make up for it (1.14 on SmolLM2); of two columns that changed places, the smaller one's error is twice its power.
"""


class Likeness:
    """What the 4-bit rows of a linear ``[N, K]`` show; nothing, if it has none.

    Attributes:
        narrow: bool ``[N]``, which rows these are.

    Args:
        result: the converted checkpoint.
        name: of the weight.
    """

    def __init__(self, result: Checkpoint, name: str):
        rows, columns = result.headers[name].shape
        self._result, self._name = result, name
        self.narrow = torch.full((rows,), name in result.encodings)
        if name + WIDE in result.stored and name in result.encodings:
            wide = result.stored[name + WIDE].shape[0]
            self.narrow[result.stored_rows(name + WIDE, 0, wide).long()] = False
        self._of_rows, self._of_columns = torch.zeros(3, rows), torch.zeros(3, columns)

    def see(self, start: int, power: torch.Tensor, error: torch.Tensor) -> torch.Tensor | None:
        """Look at some rows, from number ``start`` on, in any thread.

        Args:
            power, error: fp32 ``[n, K]``, squares of the source's weights and of what is left of them.

        Returns:
            What :meth:`add` is to be given.
        """
        mine = self.narrow[start : start + len(power)]
        if not mine.any():
            return None
        steps = self._result.stored_rows(self._name + MULTIPLIER, start, len(power)).float()
        half = (steps * self._result.rows(f"{self._name}_scale", start, len(power)).float() / 2).square_()
        half = half.repeat_interleave(power.shape[1] // steps.shape[1], dim=1)
        seen = torch.stack([power[mine], error[mine], half[mine]])
        self._of_rows[:, start : start + len(power)][:, mine] = seen.sum(dim=2)
        return seen.sum(dim=1)

    def add(self, seen: torch.Tensor | None) -> None:
        """Count for the columns what some rows have shown."""
        if seen is not None:
            self._of_columns += seen

    def unlike(self) -> dict[str, torch.Tensor]:
        """bool ``[N]`` and ``[K]``: the rows and columns that are others."""
        sums = {"rows": self._of_rows, "columns": self._of_columns}
        return {what: _unlike(found, _UNLIKE[what]) for what, found in sums.items()}


def _unlike(sums: torch.Tensor, most: float) -> torch.Tensor:
    power, error, half = sums
    return (half <= _FINE * power) & (error > most * power)
