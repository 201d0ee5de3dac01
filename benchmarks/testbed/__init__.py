"""The test bed: a small trained LLaMA (``train.py``) into which outlier columns are planted (``plant.py``)."""

from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent
MODEL = _HERE / "model"
CALIBRATION = _HERE / "calibration.txt"
BOS = 0


def heldout_windows(count: int, length: int = 256) -> np.ndarray:
    """int64 ``[count, length]``: BOS and the next ``length - 1`` held-out tokens, spread evenly over the stream."""
    stream = np.load(_HERE / "heldout.npy")
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    return np.stack([np.concatenate([[BOS], stream[s : s + length - 1]]) for s in starts]).astype(np.int64)
