"""What the sites of each block read, found out once, and kept until the block is converted."""

import torch

from vllm_w8a8_bismooth.checkpoint.blocks import Block, Run
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.prior import Prior
from vllm_w8a8_bismooth.method.compensate import Gram
from vllm_w8a8_bismooth.method.moments import Moments
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.recipe import AUTO

MOMENTS, STREAM = "moments", "stream"
"""Kinds of state that a block keeps: what its sites read, and what the next block reads."""
UNREAD = "unread"
"""Beside the moments in such a state: the experts that no token was sent to."""


class Activations:
    """The activations of a model, block after block: measured on calibration text, or estimated from the weights.

    What was found out of a block outlives a killed run, and serves the later passes of a run.

    Args:
        run: over the checkpoint.
        tokens: int64 ``[windows, length]`` of calibration text; ``None`` estimates from the weights.
        compute_dtype: see :class:`Calibration`; ``None`` is ``auto``.
        correlated: also gather :attr:`grams`, which are too large to be kept.

    Attributes:
        unread: see :class:`Calibration`; of the block that was read or recalled last.
    """

    def __init__(
        self, run: Run, tokens: torch.Tensor | None, compute_dtype: str | None = None, correlated: bool = False
    ):
        self._run, self._tokens, self._correlated = run, tokens, correlated
        self._compute_dtype = compute_dtype or AUTO
        self._stream: Calibration | Prior | None = None
        self._next = 0
        self.unread: list[int] = []

    def before(self, index: int) -> Calibration | Prior:
        """The stream of activations, about to enter block ``index``.

        Raises:
            BismoothError: an earlier run got there, and the state that it kept is gone; or see :class:`Calibration`.
        """
        run = self._run
        if self._stream is None:
            if self._tokens is None:
                self._stream = Prior(run.source, run.device)
            else:
                self._stream = Calibration(run.source, self._tokens, run.device, self._compute_dtype, self._correlated)
        if self._next != index:
            self._stream.hidden, self._next = run.state(STREAM, index - 1)["hidden"], index
        return self._stream

    def calibration(self, index: int) -> Calibration:
        """:meth:`before`, where there is calibration text: only it can run blocks."""
        stream = self.before(index)
        assert isinstance(stream, Calibration)
        return stream

    def read_by(self, block: Block, threads: Threads) -> dict[str, Moments]:
        """Site -> moments of its K input channels; carries the stream on to the next block.

        Raises:
            BismoothError: see :meth:`before`, :meth:`Calibration.advance` and :meth:`Prior.advance`.
        """
        if block.kept(STREAM) and not self._correlated:
            return self.recall(block)
        found = self._advance(block, threads)
        kept = {f"{site}/{name}": t for site, m in found.items() for name, t in m.tensors().items()}
        block.keep(MOMENTS, kept | {UNREAD: torch.tensor(self.unread, dtype=torch.int64)})
        block.keep(STREAM, {"hidden": self.before(block.index + 1).hidden})
        return found

    @property
    def grams(self) -> dict[str, Gram]:
        """Site -> second moments of what it reads in the block that was read last; whoever takes one may remove it."""
        return self._stream.grams if isinstance(self._stream, Calibration) else {}

    def carry(self, block: Block, threads: Threads) -> None:
        """Carry the stream through a block that is not to be converted; only the stream is kept."""
        self._advance(block, threads)
        block.keep(STREAM, {"hidden": self.before(block.index + 1).hidden})

    def _advance(self, block: Block, threads: Threads) -> dict[str, Moments]:
        stream = self.before(block.index)
        found = stream.advance(block.index, block, threads)
        self._next = block.index + 1
        self.unread = stream.unread if isinstance(stream, Calibration) else []
        return found

    def recall(self, block: Block) -> dict[str, Moments]:
        """What :meth:`read_by` found out in an earlier pass or run.

        Raises:
            BismoothError: it is gone.
        """
        sites: dict[str, dict[str, torch.Tensor]] = {}
        kept = self._run.state(MOMENTS, block.index)
        self.unread = kept.pop(UNREAD).tolist()
        for key, tensor in kept.items():
            site, _, name = key.rpartition("/")
            sites.setdefault(site, {})[name] = tensor
        return {site: Moments.of(tensors, self._run.device) for site, tensors in sites.items()}
