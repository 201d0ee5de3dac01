"""What real models are calibrated on and judged by: the texts of the test beds, in the model's own tokens."""

from pathlib import Path

import numpy as np

from benchmarks.testbed import BEDS, Bed

TEXTS = ("python", "docstrings")
"""Beds whose texts are used: programs, and English about mathematics."""


def own() -> list[Path]:
    """Text of the kind on which models are judged, but not of it."""
    return [BEDS[name].calibration for name in TEXTS]


def own_windows(tokenizer, count: int, length: int) -> np.ndarray:
    """int64 ``[count, length]``: tokens of :func:`own`, as many of each text, spread over it."""
    each = count // len(TEXTS)
    return np.concatenate([_windows(tokenizer(text.read_text()).input_ids, each, length) for text in own()])


def heldout_windows(tokenizer, count: int, length: int = 256) -> np.ndarray:
    """int64 ``[count, length]``: tokens of text that no calibration saw, as many of each kind, spread over it."""
    each = count // len(TEXTS)
    return np.concatenate([_windows(tokenizer(_heldout(BEDS[name])).input_ids, each, length) for name in TEXTS])


def _heldout(bed: Bed) -> str:
    """A bed keeps its held-out text as tokens."""
    from transformers import AutoTokenizer

    tokens = np.load(bed.folder / "heldout.npy").tolist()
    return AutoTokenizer.from_pretrained(bed.model).decode(tokens, skip_special_tokens=True)


def _windows(tokens: list[int], count: int, length: int) -> np.ndarray:
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)
