"""The test beds: small trained models (``train.py``) into which outlier columns are planted (``plant.py``)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent
CORPUS = _HERE / "corpus.jsonl.xz"
BOS = 0


@dataclass(frozen=True)
class Bed:
    """A model of :data:`train.MODELS` and the texts that its training never saw."""

    folder: Path

    @property
    def model(self) -> Path:
        """Checkpoint folder, bf16."""
        return self.folder / "model"

    @property
    def calibration(self) -> Path:
        """Text for calibration."""
        return self.folder / "calibration.txt"

    def heldout_windows(self, count: int, length: int = 256) -> np.ndarray:
        """int64 ``[count, length]``: BOS and the next ``length - 1`` held-out tokens, spread evenly over the stream."""
        stream = np.load(self.folder / "heldout.npy")
        starts = np.linspace(0, len(stream) - length, count).astype(int)
        return np.stack([np.concatenate([[BOS], stream[s : s + length - 1]]) for s in starts]).astype(np.int64)


BEDS = {"python": Bed(_HERE), "headers": Bed(_HERE / "headers"), "docstrings": Bed(_HERE / "docstrings")}
PYTHON = BEDS["python"]
"""What everything uses that needs one model only."""
