"""Error-compensating rounding of weights (GPTQ, arXiv 2210.17323, in the order of ``act_order`` of its reference code).

Rounding a weight ``W`` to ``Q`` changes a linear's outputs by ``(W - Q) x``, whose expected square is ``d^T H d`` for
each row ``d`` of ``W - Q``, with ``H = E[x x^T]`` over calibration tokens. Round-to-nearest leaves each ``d_k`` as
small as it can be; here columns are rounded one after the other, and what one leaves is made up for by those that come
later, as far as H says that their inputs go together. The grid is that of round-to-nearest: only codes change.
"""

from dataclasses import dataclass

import torch

from vllm_w8a8_bismooth.method.grids import Grid

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, so that directions that calibration has not seen stay put."""
WIDEST = 4096
"""Channels whose errors are made up for together. On SmolLM2 half of the widest did as well."""
_COLUMNS = 128  # rounded before what they leave is handed on to all later ones at once


@dataclass
class Gram:
    """``sum x x^T`` over rows of K channels. Every row counts as much as any other: it is divided by its size.

    Attributes:
        products: of each part of the channels, at most :data:`WIDEST` neighbours, fp32 ``[k, k]``. What channels of
            different parts have in common is left out, so that memory and time grow with K and not with its powers.
    """

    products: list[torch.Tensor]

    @classmethod
    def none(cls, channels: int, device: torch.device | str = "cpu") -> "Gram":
        """Of no rows."""
        return cls([torch.zeros(width, width, device=device) for width in parts(channels)])

    def add(self, rows: torch.Tensor) -> None:
        """Count fp32 ``[T, K]``."""
        size = rows.square().mean(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()
        for products, part in zip(self.products, (rows / size).split(parts(rows.shape[1]), dim=1), strict=True):
            products.addmm_(part.T, part)

    def scaled(self, factor: torch.Tensor) -> "Gram":
        """Of the same rows after channel k is multiplied by ``factor[k]``, fp32 ``[K]``."""
        factors = factor.split([len(products) for products in self.products])
        return Gram([p * f * f.unsqueeze(1) for p, f in zip(self.products, factors, strict=True)])


def parts(channels: int) -> list[int]:
    """Widths of the fewest parts of K channels that are as wide as each other but for the last."""
    width = -(-channels // -(-channels // WIDEST))
    return [min(width, channels - start) for start in range(0, channels, width)]


@dataclass(frozen=True)
class Compensation:
    """What column-by-column rounding needs to know of the inputs of a linear, part by part.

    Attributes:
        orders: int64 ``[k]`` each, columns of a part with the largest inputs first.
        factors: fp32 ``[k, k]`` each, upper triangular U with ``U^T U`` the inverse of the damped H in that order.
        weights: fp32 ``[k]`` each, H's diagonal: by how much an error in each column counts.
    """

    orders: list[torch.Tensor]
    factors: list[torch.Tensor]
    weights: list[torch.Tensor]

    @classmethod
    def of(cls, gram: Gram, damping: float = DAMPING) -> "Compensation":
        """From what a linear reads, which is used up. More damping is taken where fp32 cannot factor H."""
        made = cls([], [], [])
        while gram.products:
            made.weights.append(gram.products[0].diagonal().clone())
            order, factor = _factored(gram.products.pop(0), damping)
            made.orders.append(order)
            made.factors.append(factor)
        return made

    def left(self) -> float:
        """What compensation leaves of the expected square of an output's error, where all steps are the same.

        An error ``e`` of column j costs ``(e / U_jj)^2`` once later ones have made up for it, by itself ``H_jj e^2``.
        """
        made_up = sum(float(factor.diagonal().double().square().reciprocal().sum()) for factor in self.factors)
        return made_up / (sum(float(weights.double().sum()) for weights in self.weights) or 1.0)

    def round(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The codes of some rows.

        Args:
            weight: fp32 ``[n, K]``, finite.
            grid: of the same rows.

        Returns:
            fp32 ``[n, K]``, codes of the grid, as near to round-to-nearest's as it says.
        """
        rounded, width = torch.empty_like(weight), weight.shape[1] // grid.groups
        start = 0
        for order, factor in zip(self.orders, self.factors, strict=True):
            part = slice(start, start + len(order))
            group = ((order + start) // width).tolist()
            rounded[:, part] = _round(weight[:, part], order, factor, grid, group)
            start = part.stop
        return rounded


def _factored(products: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and factor of one part."""
    diagonal = products.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    # Backwards, because Cholesky's L of H backwards gives H = R R^T with R = L backwards, and U = R^-1.
    backwards = order.flip(0)
    h = products[backwards][:, backwards]
    added = damping * (float(diagonal.mean()) or 1.0)
    h.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(h)
    while failed:
        h.diagonal().add_(9 * added)
        added *= 10
        lower, failed = torch.linalg.cholesky_ex(h)
    del h
    unit = torch.eye(len(lower), device=lower.device)
    return order, torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1)


def _round(
    weight: torch.Tensor, order: torch.Tensor, factor: torch.Tensor, grid: Grid, group: list[int]
) -> torch.Tensor:
    """The codes of one part, fp32 ``[n, k]``; the j-th column in order is of the grid's group number ``group[j]``."""
    # Columns are contiguous here: they are worked on one after the other.
    left = weight.T[order]
    codes = torch.empty_like(left)
    for code, column, g in zip(codes, left, group, strict=True):
        grid.nearest(column, g, code)
    for start in range(0, len(left), _COLUMNS):
        end = min(start + _COLUMNS, len(left))
        here, u = left[start:end], factor[start:end, start:end]
        errors = torch.empty_like(here)
        for j in range(end - start):
            g, code = group[start + j], codes[start + j]
            grid.near(here[j], g, code)
            torch.addcmul(here[j], code, grid.step(g), value=-1, out=errors[j]).div_(u[j, j])
            if start + j + 1 < end:
                here[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    rounded = torch.empty_like(codes)
    rounded[order] = codes
    return rounded.T
