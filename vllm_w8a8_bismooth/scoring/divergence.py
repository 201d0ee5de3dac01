"""How far the predictions of one model are from another's, token by token and over all of a text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_PIECE = 2**20  # values in fp64 at once
_RESAMPLES = 10_000
_SEED = 0

Interval = tuple[float, float]
"""The ends of a 95 % confidence interval."""


@dataclass(frozen=True)
class Window:
    """Both models' predictions of the tokens of a window behind its first; every field is ``[length - 1]``.

    Attributes:
        kl: fp64, KL(source || checkpoint) in nats.
        same: bool, whether both have the same best token.
        source, checkpoint: fp64, what the text's own token costs, in nats.
    """

    kl: np.ndarray
    same: np.ndarray
    source: np.ndarray
    checkpoint: np.ndarray


@dataclass(frozen=True)
class Divergence:
    """Over all windows. Intervals resample whole windows, as the tokens of one depend on each other; a single window
    has none.

    Attributes:
        kl: mean KL(source || checkpoint) in nats a token.
        kl_interval: of that.
        kl_median, kl_p999, kl_worst: over tokens, the middle, the 99.9th percentile and the largest.
        worst: number of the window and place in it (the first token has 0) of the token with the largest.
        top1: share of the tokens for which both have the same best token.
        top1_interval: of that.
        perplexity_source, perplexity: of both on the text.
        log_ratio: logarithm of the checkpoint's perplexity over the source's.
        log_ratio_interval: of that.
    """

    kl: float
    kl_interval: Interval | None
    kl_median: float
    kl_p999: float
    kl_worst: float
    worst: tuple[int, int]
    top1: float
    top1_interval: Interval | None
    perplexity_source: float
    perplexity: float
    log_ratio: float
    log_ratio_interval: Interval | None


def compare(source: np.ndarray, checkpoint: np.ndarray, tokens: Sequence[int]) -> Window:
    """Compare the predictions of a window; both are normalised in fp64, some rows at a time.

    Args:
        source, checkpoint: fp32 log-probabilities or logits ``[length - 1, vocab]``, mapped or in memory.
        tokens: the window's tokens, ``[length]``.

    Raises:
        ValueError: a prediction is NaN, or gives every token the probability 0.
    """
    count, vocabulary = source.shape
    found = Window(np.empty(count), np.empty(count, bool), np.empty(count), np.empty(count))
    step = max(1, _PIECE // vocabulary)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        p, q = _Rows(source[rows]), _Rows(checkpoint[rows])
        chosen = torch.as_tensor(tokens[1:][rows])
        found.same[rows] = (p.best == q.best).numpy()
        found.source[rows], found.checkpoint[rows] = p.cost(chosen), q.cost(chosen)
        terms = p.values.sub_(q.values).mul_(p.weights)  # in place: new memory takes longer than the work on it
        # NaN is 0 times infinity: a token of probability 0 adds nothing, whatever it has in the checkpoint.
        kl = terms.nansum(-1) / p.weights.sum(-1) - (p.total - q.total)
        found.kl[rows] = kl.clamp(min=0).numpy()
    return found


class _Rows:
    """Some rows of log-probabilities or logits ``[rows, vocab]`` in fp64; all fields but two are ``[rows]``.

    Attributes:
        values: as they are given, ``[rows, vocab]``.
        weights: probabilities but for a factor, ``[rows, vocab]``.
        best: the most probable token.
        total: logarithm of the sum of what the values are logarithms of.
    """

    def __init__(self, scores: np.ndarray):
        self.values = torch.from_numpy(np.asarray(scores, np.float64))
        largest, self.best = self.values.max(-1)
        self.weights = (self.values - largest[:, None]).exp_()
        self.total = largest + self.weights.sum(-1).log()
        if self.total.isnan().any():
            raise ValueError("NaN")

    def cost(self, tokens: torch.Tensor) -> np.ndarray:
        """What these tokens, ``[rows]``, cost in nats."""
        return (self.total - self.values.gather(-1, tokens[:, None])[:, 0]).numpy()


def summarize(windows: Sequence[Window]) -> Divergence:
    """The figures of one or more windows of equal length."""
    kl, source, checkpoint = (
        np.stack([getattr(window, name) for window in windows]) for name in ("kl", "source", "checkpoint")
    )
    same = np.stack([window.same for window in windows])
    number, place = np.unravel_index(kl.argmax(), kl.shape)
    return Divergence(
        kl=float(kl.mean()),
        kl_interval=interval(kl.mean(axis=1)),
        kl_median=float(np.median(kl)),
        kl_p999=float(np.quantile(kl, 0.999)) if np.isfinite(kl).all() else float(np.sort(kl, axis=None)[-1]),
        kl_worst=float(kl.max()),
        worst=(int(number), int(place) + 1),
        top1=float(same.mean()),
        top1_interval=interval(same.mean(axis=1)),
        perplexity_source=_exp(source.mean()),
        perplexity=_exp(checkpoint.mean()),
        log_ratio=float((checkpoint - source).mean()),
        log_ratio_interval=interval((checkpoint - source).mean(axis=1)),
    )


def interval(means: np.ndarray) -> Interval | None:
    """The 2.5th and the 97.5th percentile of the mean over windows that are drawn anew, as many as there are;
    ``None`` for a single window, or if one is infinite.

    The draws are the same in every run, and for every figure, so that those of both models are paired.

    Args:
        means: one value a window, ``[n]``; equally long windows weigh the same.
    """
    count = len(means)
    if count < 2 or not np.isfinite(means).all():
        return None
    draws = np.random.default_rng(_SEED).multinomial(count, [1 / count] * count, size=_RESAMPLES)
    low, high = np.quantile(draws @ np.asarray(means, np.float64) / count, [0.025, 0.975])
    return float(low), float(high)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):  # infinity is the answer, for a model that excludes what the text says
        return float(np.exp(value))
