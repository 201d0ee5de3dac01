"""How far one model's predictions are from another's."""

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Distance:
    """Over all predicted tokens.

    Attributes:
        kl: mean KL(reference || other) per token in nats.
        kl_error: its standard error over windows (tokens inside a window are correlated).
        kl_worst: largest KL of one token.
        top1: share of tokens where both put the same token first.
        ppl: perplexity of the other model on the text.
    """

    kl: float
    kl_error: float
    kl_worst: float
    top1: float
    ppl: float

    as_dict = asdict


def distance(reference: np.ndarray, other: np.ndarray, windows: np.ndarray) -> Distance:
    """Compare log-probabilities.

    Args:
        reference, other: fp32 ``[n, length - 1, vocab]``, normalised.
        windows: ``[n, length]``, the tokens that were scored.
    """
    kl = np.empty(reference.shape[:2])
    for i in range(len(reference)):  # window by window: float64 copies of everything would be large
        p, q = reference[i].astype(np.float64), other[i].astype(np.float64)
        kl[i] = (np.exp(p) * (p - q)).sum(axis=-1)
    chosen = np.take_along_axis(other, windows[:, 1:, None].astype(np.int64), axis=-1).astype(np.float64)
    return Distance(
        kl=float(kl.mean()),
        kl_error=float(kl.mean(axis=1).std(ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else float("nan"),
        kl_worst=float(kl.max()),
        top1=float((reference.argmax(-1) == other.argmax(-1)).mean()),
        ppl=float(np.exp(-chosen.mean())),
    )
