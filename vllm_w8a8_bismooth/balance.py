"""The two rules by which magnitude is shared out between the activations and the weights of a site."""

from collections.abc import Callable
from functools import partial

import torch

from vllm_w8a8_bismooth.moments import ORDER, Moments, typical
from vllm_w8a8_bismooth.recipe import Recipe


def by_range(activation: Moments, weight: Moments, alpha: float) -> torch.Tensor:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4).

    Args:
        activation: of the K input channels.
        weight: of the K weight columns over all consumers.
        alpha: share of the activations' range that is moved into the weights, 0 to 1.

    Returns:
        fp32 ``[K]``, positive and finite, with geometric mean 1: a common factor cancels between the two sides, and
        this choice keeps the folded norm in the range of its dtype. A channel whose range is 0 on one side is given
        the median range there: what calibration has not seen is treated as typical.
    """
    log_s = alpha * _logs(activation.largest) - (1 - alpha) * _logs(weight.largest)
    return _factors(log_s)


def by_error(activation: Moments, weight: Moments) -> torch.Tensor:
    """The factors that make the expected error of the sites' outputs least.

    Rounding to INT8 leaves an error of variance ``step^2 / 12`` in every element, and the step is the row's largest
    magnitude over 127. With activations ``x / s`` and weights ``w * s`` the output's error is, up to a constant::

        J(s) = E_t[max_k (x_tk / s_k)^2] * E_n[sum_k (w_nk s_k)^2] + E_n[max_k (w_nk s_k)^2] * E_t[sum_k (x_tk / s_k)^2]

    where the norm of order :data:`moments.ORDER` takes the place of the maximum, and tokens and output channels count
    relative to their size. Its logarithm is convex in ``log s``, so that there is one solution, and it does not depend
    on where the search starts: multiplying a channel's weights and dividing its activations by anything (an outlier
    column) changes the factors, but not what is quantized.

    Args:
        activation, weight: as for :func:`by_range`.

    Returns:
        As :func:`by_range`.
    """
    sides = [(_logs(side.high / side.rows), _logs(side.square / side.rows)) for side in (activation, weight)]
    # From the balance of typical magnitudes on, the search has little left to do.
    start = (sides[0][0] - sides[1][0]) / (2 * ORDER)
    offset = torch.zeros_like(start, requires_grad=True)
    search = torch.optim.LBFGS(
        [offset], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-11, line_search_fn="strong_wolfe"
    )

    def error() -> torch.Tensor:
        log_s, terms = start + offset, []
        for (step, _), (_, energy), sign in ((*sides, 1), (*sides[::-1], -1)):
            largest = torch.logsumexp(step - sign * ORDER * log_s, 0) * (2 / ORDER)
            terms.append(largest + torch.logsumexp(energy + sign * 2 * log_s, 0))
        return torch.logaddexp(*terms)

    def evaluate() -> torch.Tensor:
        search.zero_grad()
        with torch.enable_grad():
            value = error()
        value.backward()
        return value

    search.step(evaluate)
    return _factors(start + offset.detach())


Rule = Callable[[Moments, Moments], torch.Tensor]


def rule_of(recipe: Recipe) -> Rule:
    """The rule that a recipe names."""
    return {"balanced": by_error, "alpha": partial(by_range, alpha=recipe.alpha)}[recipe.smoothing]


def _logs(values: torch.Tensor) -> torch.Tensor:
    return typical(values).double().log()


def _factors(log_s: torch.Tensor) -> torch.Tensor:
    return (log_s - log_s.mean()).exp().float()
