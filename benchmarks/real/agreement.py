"""How long a checkpoint's greedy answers stay those of full precision, token by token.

200 requests: half want a piece of a program explained, half a piece of English about mathematics, both from the test
beds' held-out texts, which no calibration saw. Answers have at most 256 tokens. Greedy choices between near equals fall
either way by the last bits of a sum, and no answer comes back to the other's words after that: only full precision
against itself, in another order of requests and so in other batches, shows what a length means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.real.generate import Answer, Request
from benchmarks.real.texts import heldout_windows
from vllm_w8a8_bismooth.scoring.divergence import Interval, interval

COUNT, LENGTH, MOST = 200, 96, 256
_ASK = (
    "Explain step by step what this part of a Python program does, and how you would test it:\n\n```python\n{}\n```",
    "Explain the following text in your own words, and give an example for each idea in it:\n\n{}",
)
"""For each of the texts that held-out windows are of, in the same order."""


@dataclass(frozen=True)
class Agreement:
    """Tokens that two models' answers have in common before the first that differs.

    Attributes:
        mean: over answers, in tokens; one without a difference counts with its whole length.
        mean_interval: of that.
        median: over answers.
        whole: share of the answers without a difference.
        lengths: of each answer.
    """

    mean: float
    mean_interval: Interval | None
    median: float
    whole: float
    lengths: list[int]


def requests(tokenizer) -> list[Request]:
    """What the models are asked, in the tokens of their tokenizer."""
    windows = heldout_windows(tokenizer, COUNT, LENGTH)
    asks = np.repeat(_ASK, COUNT // len(_ASK))
    return [_request(tokenizer, ask.format(tokenizer.decode(w))) for ask, w in zip(asks.tolist(), windows, strict=True)]


def _request(tokenizer, words: str) -> Request:
    chat = [{"role": "user", "content": words}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return Request(tokenizer(text, add_special_tokens=False).input_ids, MOST)


def agreement(reference: Sequence[Answer], answers: Sequence[Answer]) -> Agreement:
    """Compare answers to the same requests."""
    pairs = [(a.tokens, b.tokens) for a, b in zip(reference, answers, strict=True)]
    lengths = np.array([common(a, b) for a, b in pairs])
    return Agreement(
        mean=float(lengths.mean()),
        mean_interval=interval(lengths),
        median=float(np.median(lengths)),
        whole=sum(a == b for a, b in pairs) / len(pairs),
        lengths=lengths.tolist(),
    )


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of equal tokens before the first that differs."""
    differ = [i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    return differ[0] if differ else min(len(one), len(other))
