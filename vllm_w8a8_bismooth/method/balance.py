"""The two rules by which magnitude is shared out between the activations and the weights of a site."""

from collections.abc import Callable
from functools import partial

import torch

from vllm_w8a8_bismooth.method.moments import ORDER, Moments, typical
from vllm_w8a8_bismooth.recipe import Recipe


def by_range(activation: Moments, weight: Moments, alpha: float) -> torch.Tensor:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4).

    Args:
        activation: moments of the K input channels.
        weight: moments of the K weight columns over all consumers.
        alpha: share of the activations' range that is moved into the weights, 0 to 1.

    Returns:
        fp32 ``[K]``, positive and finite, with geometric mean 1: a common factor cancels between the two sides, and
        this choice keeps the folded norm in the range of its dtype. A channel whose range is 0 on one side is given
        the median range there: what calibration has not seen is treated as typical.
    """
    log_s = alpha * _logs(activation.largest) - (1 - alpha) * _logs(weight.largest)
    return _factors(log_s)


def by_error(activation: Moments, weight: Moments) -> torch.Tensor:
    """The factors that make the expected error of the consumers' outputs least.

    Rounding to INT8 leaves an error of variance ``step^2 / 12`` in every element, and the step is the row's largest
    magnitude over 127. With activations ``x / s`` and weights ``w * s`` the output's error is, up to a constant::

        J(s) = E_t[max_k (x_tk / s_k)^2] * E_n[sum_k (w_nk s_k)^2] + E_n[max_k (w_nk s_k)^2] * E_t[sum_k (x_tk / s_k)^2]

    where the norm of order :data:`moments.ORDER` takes the place of the maximum, and tokens and output channels count
    relative to their size. Its logarithm is convex in ``log s``, so that there is one solution, wherever the search
    starts: multiplying a channel's weights and dividing its activations by anything (an outlier column) changes the
    factors, but not what is quantized, as long as the tokens' sizes stay: a channel whose activations dwarf all others
    sets them, and so how much each token counts.

    Args:
        activation, weight: as for :func:`by_range`.

    Returns:
        fp32 ``[K]``, as from :func:`by_range`.
    """
    logs = [_logs(values / side.rows) for side in (activation, weight) for values in (side.high, side.square)]
    log_s = (logs[0] - logs[2]) / (2 * ORDER)  # typical magnitudes are balanced: the search has little left to do
    value, slope, curvature = _error(logs, log_s)
    for _ in range(_STEPS):
        step = _solve(*curvature, slope)
        promised, length = float(slope @ step), 1.0
        if promised < 1e-14:
            break
        while length > 2**-20:
            trial = _error(logs, log_s - length * step)
            if trial[0] <= value - length * promised / 4:
                break
            length /= 2
        else:  # nothing is left to gain that fp64 can tell
            break
        log_s = log_s - length * step
        value, slope, curvature = trial
    return _factors(log_s)


_STEPS = 50  # Newton's method takes about five

Curvature = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _error(logs: list[torch.Tensor], log_s: torch.Tensor) -> tuple[float, torch.Tensor, Curvature]:
    """log J, its gradient ``[K]``, and its second derivative as ``diag(d) + U diag(c) U^T``: d, U ``[K, 5]``, c."""
    x_high, x_square, w_high, w_square = logs
    # Each factor of J is a sum of exponentials: its logarithm's gradient is a softmax, times the exponent's slope.
    terms = [x_high - ORDER * log_s, w_square + 2 * log_s, w_high + ORDER * log_s, x_square - 2 * log_s]
    shares = [torch.softmax(term, 0) for term in terms]
    sums = [torch.logsumexp(term, 0) for term in terms]
    parts = torch.stack([sums[0] * (2 / ORDER) + sums[1], sums[2] * (2 / ORDER) + sums[3]])
    of_activations, of_weights = torch.softmax(parts, 0)
    slopes = [2 * (shares[1] - shares[0]), 2 * (shares[2] - shares[3])]
    c = torch.stack([of_activations * 2 * ORDER, of_activations * 4, of_weights * 2 * ORDER, of_weights * 4])
    diagonal = (c.unsqueeze(1) * torch.stack(shares)).sum(dim=0)
    between = of_activations * of_weights
    low_rank = torch.stack([*shares, slopes[0] - slopes[1]], dim=1)
    gradient = of_activations * slopes[0] + of_weights * slopes[1]
    return float(torch.logsumexp(parts, 0)), gradient, (diagonal, low_rank, torch.cat([-c, between.view(1)]))


def _solve(d: torch.Tensor, u: torch.Tensor, c: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Newton's step (Woodbury). log J is flat along a common factor of all s; a unit curvature there keeps it out."""
    u, c = torch.cat([u, u.new_full((len(u), 1), len(u) ** -0.5)], dim=1), torch.cat([c, c.new_ones(1)])
    inverse = 1 / (d + 1e-12 * d.max())
    weighted = c.unsqueeze(1) * u.T * inverse
    return inverse * (slope - u @ torch.linalg.solve(torch.eye(len(c)).to(c) + weighted @ u, weighted @ slope))


Rule = Callable[[Moments, Moments], torch.Tensor]


def rule_of(recipe: Recipe) -> Rule:
    """The rule that a recipe names."""
    if recipe.smoothing == "alpha":
        assert recipe.alpha is not None
        return partial(by_range, alpha=recipe.alpha)
    return by_error


def _logs(values: torch.Tensor) -> torch.Tensor:
    return typical(values).double().log()


def _factors(log_s: torch.Tensor) -> torch.Tensor:
    return (log_s - log_s.mean()).exp().float()
