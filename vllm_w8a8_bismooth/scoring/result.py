"""What a score found, as data."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.scoring.divergence import Divergence


@dataclass(frozen=True)
class Score:
    """What a score found.

    Attributes:
        folder, source: the checkpoints.
        divergence: the figures.
        files, sha256: names of the text's files, and its hash, which is a conversion's ``calibration`` for that text.
        windows, length: how many windows, and tokens of each. The first token of each is not predicted.
        dtypes: in which the source's engine and the checkpoint's computed.
        quantization: what vLLM calls the checkpoint's; ``None`` is none.
        vllm: its version.
        worst_token, worst_text: number of the token with the largest divergence, and what the tokenizer makes of it.
        seconds: that this run took.
        reused: windows of the source that an earlier run had scored.
        store: folder of the source's scores, which stay for the next run.
        notes: what is unusual, in sentences without a full stop.
    """

    folder: Path
    source: Path
    divergence: Divergence
    files: tuple[str, ...]
    sha256: str
    windows: int
    length: int
    dtypes: tuple[str, str]
    quantization: str | None
    vllm: str
    worst_token: int
    worst_text: str | None
    seconds: float
    reused: int
    store: Path
    notes: list[str] = field(default_factory=list)

    @property
    def predicted(self) -> int:
        """Tokens that were predicted."""
        return self.windows * (self.length - 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        paths = {"folder": str(self.folder), "source": str(self.source), "store": str(self.store)}
        return {**asdict(self), **paths, "predicted": self.predicted}
