"""Error-compensating rounding of weights (GPTQ, arXiv 2210.17323, in the order of ``act_order`` of its reference code).

Rounding a weight ``W`` to ``Q`` changes a linear's outputs by ``(W - Q) x``, whose expected square is ``d^T H d`` for
each row ``d`` of ``W - Q``, with ``H = E[x x^T]`` over calibration tokens. Round-to-nearest leaves each ``d_k`` as
small as it can be; here columns are rounded one after the other, and what one leaves is made up for by those that come
later, as far as H says that their inputs go together. Scales are those of round-to-nearest: only codes change.
"""

from dataclasses import dataclass

import torch

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, so that directions that calibration has not seen stay put."""
REACH = 1
"""Codes end at most so many steps from the nearest. On real models that costs nothing that can be measured, and what a
weight was can still be seen from its code."""
_COLUMNS = 128  # rounded before what they leave is handed on to all later ones at once


@dataclass
class Gram:
    """``sum x x^T`` over rows of K channels. Every row counts as much as any other: it is divided by its size.

    Attributes:
        products: fp32 ``[K, K]``.
    """

    products: torch.Tensor

    @classmethod
    def none(cls, channels: int, device: torch.device | str = "cpu") -> "Gram":
        """Of no rows."""
        return cls(torch.zeros(channels, channels, device=device))

    def add(self, rows: torch.Tensor) -> None:
        """Count fp32 ``[T, K]``."""
        size = rows.square().mean(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()
        rows = rows / size
        self.products.addmm_(rows.T, rows)

    def scaled(self, factor: torch.Tensor) -> "Gram":
        """Of the same rows after channel k is multiplied by ``factor[k]``, fp32 ``[K]``."""
        return Gram(self.products * factor * factor.unsqueeze(1))


@dataclass(frozen=True)
class Compensation:
    """What column-by-column rounding needs to know of the inputs of a linear.

    Attributes:
        order: int64 ``[K]``, columns with the largest inputs first.
        factor: fp32 ``[K, K]``, upper triangular U with ``U^T U`` the inverse of the damped H in that order.
    """

    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, gram: Gram, damping: float = DAMPING) -> "Compensation":
        """From what a linear reads. More damping is taken where fp32 cannot factor H."""
        diagonal = gram.products.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True)
        # Backwards, because Cholesky's L of H backwards gives H = R R^T with R = L backwards, and U = R^-1.
        backwards = order.flip(0)
        h = gram.products[backwards][:, backwards]
        added = damping * (float(diagonal.mean()) or 1.0)
        h.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(h)
        while failed:
            h.diagonal().add_(9 * added)
            added *= 10
            lower, failed = torch.linalg.cholesky_ex(h)
        del h
        unit = torch.eye(len(lower), device=lower.device)
        return cls(order, torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1))

    def round(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The codes of some rows.

        Args:
            weight: fp32 ``[n, K]``, finite.
            scale: fp32 ``[n, G]``, positive: of each row, or of G groups of its columns.

        Returns:
            fp32 ``[n, K]``, integers in [-127, 127], at most :data:`REACH` from round-to-nearest's.
        """
        columns = weight.shape[1]
        # Columns are contiguous here: they are worked on one after the other.
        left = weight.T[self.order]
        steps = scale.T.contiguous()
        group = (self.order // (columns // len(steps))).tolist()
        codes = torch.empty_like(left)
        for code, column, g in zip(codes, left, group, strict=True):
            torch.div(column, steps[g], out=code).round_()
        for start in range(0, columns, _COLUMNS):
            end = min(start + _COLUMNS, columns)
            here, u = left[start:end], self.factor[start:end, start:end]
            errors = torch.empty_like(here)
            for j in range(end - start):
                step = steps[group[start + j]]
                code, nearest = codes[start + j], codes[start + j].clone()
                torch.div(here[j], step, out=code).round_().sub_(nearest).clamp_(-REACH, REACH).add_(nearest)
                code.clamp_(-127, 127)
                torch.addcmul(here[j], code, step, value=-1, out=errors[j]).div_(u[j, j])
                if start + j + 1 < end:
                    here[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
            left[end:].addmm_(self.factor[start:end, end:].T, errors, alpha=-1)
        rounded = torch.empty_like(codes)
        rounded[self.order] = codes
        return rounded.T.contiguous()
