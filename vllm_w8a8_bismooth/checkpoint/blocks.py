"""The walk over the decoder blocks of a checkpoint, one block in memory at a time, which every pass uses.

A pass over the blocks is a loop::

    walk = run.walk(STAGE, blocks)
    for index, block in walk:
        block.record = measure(block["mlp.up_proj.weight"])

The walk reads ahead, gives memory back, shows progress, and keeps the journal: a block whose loop body has ended is
finished, with its ``record``; a run that was killed goes on behind the last finished block, and finds the records of
those before it in ``walk.records``. Passes therefore know nothing of journals, and a new measurement is a function.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vllm_w8a8_bismooth.checkpoint.journal import Journal
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.readahead import AHEAD, ReadAhead
from vllm_w8a8_bismooth.checkpoint.writer import ShardWriter
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.progress import Progress, silent


@dataclass(frozen=True)
class Stage:
    """A kind of pass over the blocks.

    Attributes:
        name: as progress and journal call it.
        spends: (kind of state, offset): once block i is finished, the state of this kind that block ``i + offset``
            kept is no longer needed.
        whole: whether all tensors of a block are read, and held together; else only its linears' weights, each released
            before the next is taken.
    """

    name: str
    spends: tuple[tuple[str, int], ...] = ()
    whole: bool = True


class Block(Mapping[str, torch.Tensor]):
    """The stored tensors of one decoder block by name inside it, on the run's device.

    A tensor is read when it is first asked for, and its memory is used again once it is released.

    Attributes:
        index: of the block.
        prefix: what the full names of its tensors begin with.
        record: JSON that the pass leaves for the journal.
    """

    def __init__(self, run: "Run", reader: ReadAhead, index: int, names: list[str]):
        self.index, self.prefix = index, run.source.names.block(index)
        self.record: Any = None
        self._run, self._reader = run, reader
        self._names = names
        self._tensors: dict[str, torch.Tensor] = {}
        self._released: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names or name in self._released:
            raise KeyError(name)
        if name not in self._tensors:
            self._tensors[name] = self._reader.take(self.prefix + name).to(self._run.device)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def release(self, name: str) -> None:
        """Give a tensor's memory back. Whoever still needs its values must have copied them."""
        _ = self[name]  # the reader waits until each of its tensors has been taken
        del self._tensors[name]
        self._released.add(name)
        self._reader.release(self.prefix + name)

    def release_all(self) -> None:
        """Give back what the pass has not."""
        for name in self._names:
            if name not in self._released:
                self.release(name)

    def keep(self, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store tensors with which a later run, or a later pass of this one, goes on."""
        if self._run.journal is not None:
            self._run.journal.keep(_unit(kind, self.index), {name: tensor.cpu() for name, tensor in tensors.items()})

    def kept(self, kind: str) -> bool:
        """Whether an earlier run, or an earlier pass of this one, kept such a state of this block."""
        return self._run.journal is not None and self._run.journal.state(_unit(kind, self.index)) is not None


@dataclass
class Run:
    """One run over a checkpoint: from where it reads, where it works, and how it goes on after it was killed.

    Attributes:
        source: the checkpoint.
        device: where blocks are worked on.
        journal: entered; ``None`` for runs that only look, which start anew each time.
        progress: is shown each finished block.
    """

    source: Source
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    journal: Journal | None = None
    progress: Progress = silent

    def walk(self, stage: Stage, blocks: range | None = None, writer: ShardWriter | None = None) -> "Walk":
        """A pass over some blocks; ``None`` is all. See :class:`Walk`."""
        return Walk(self, stage, range(len(self.source.layers)) if blocks is None else blocks, writer)

    def once(self, name: str, work: Callable[[], Any], writer: ShardWriter | None = None) -> Any:
        """The JSON that a piece of work outside the blocks gives; what an earlier run has done is not done again.

        With a ``writer`` it counts as done when all that was written so far is safe on disk.
        """
        known = self.journal.record(name) if self.journal is not None else None
        if known is None:
            known = work()
            if self.journal is not None:
                _settle(writer, partial(self.journal.finish, name, known))
        return known

    def state(self, kind: str, index: int) -> dict[str, torch.Tensor]:
        """What block ``index`` kept, on the run's device.

        Raises:
            BismoothError: it is gone.
        """
        unit = _unit(kind, index)
        found = self.journal.state(unit) if self.journal is not None else None
        if found is None:
            where = self.source.checkpoint.folder if self.journal is None else self.journal.partial
            if self.journal is not None:
                self.journal.give_up()
            raise BismoothError.of(
                where,
                f"the state {unit} of an earlier run is gone, from which it would go on",
                "run the same command again, which starts anew",
            )
        return {name: tensor.to(self.device) for name, tensor in found.items()}


class Walk:
    """A pass over decoder blocks, in order: iterate to get ``(index, block)`` of each that no earlier run finished.

    Args:
        run: the run that this pass belongs to.
        stage: which pass.
        blocks: to be walked through, those that an earlier run finished included.
        writer: what the pass writes to; a block then is finished when it is safe on disk.

    Attributes:
        records: index -> record of each finished block, of this run or an earlier one.
        checksums: full name -> :class:`files.Checksum` of each tensor in them.
        resumed: how many of the blocks an earlier run had finished.

    Raises:
        BismoothError: while iterating, see :meth:`reader.Checkpoint.read`.
        Interrupted: while iterating, the disk refuses the journal.
    """

    def __init__(self, run: Run, stage: Stage, blocks: range, writer: ShardWriter | None = None):
        self.records: dict[int, Any] = {}
        self.checksums: dict[str, str] = {}
        self._run, self._stage, self._blocks, self._writer = run, stage, blocks, writer
        for index in blocks:
            found = run.journal.record(_unit(stage.name, index)) if run.journal is not None else None
            if found is None:
                break
            self.records[index] = found["record"]
            self.checksums |= found["checksums"]
        self.resumed = len(self.records)

    @property
    def left(self) -> range:
        """The blocks that are not finished."""
        return self._blocks[len(self.records) :]

    def __iter__(self) -> Iterator[tuple[int, Block]]:
        left = self.left
        if self._writer is not None or (self.resumed and left):
            self._show()
        names = self._run.source.names
        order = [names.block(index) + name for index in left for name in self._names(index)]
        with ReadAhead(self._run.source.checkpoint, order, self._budget(order)) as reader:
            for index in left:
                block = Block(self._run, reader, index, self._names(index))
                yield index, block
                block.release_all()
                self._finish(block, {block.prefix + name: reader.digests.pop(block.prefix + name) for name in block})

    def _names(self, index: int) -> list[str]:
        """The tensors that the pass reads of a block, by name inside it."""
        source, whole = self._run.source, self._stage.whole
        return [name for name in source.blocks[index] if whole or source.layers[index].linear_of(name)]

    def _budget(self, order: list[str]) -> int:
        """Bytes that the reader may hold: what is worked on, and what is read meanwhile."""
        if self._stage.whole:
            return self._run.source.block_nbytes() + AHEAD
        headers = self._run.source.checkpoint.headers
        return max(AHEAD, 2 * max((headers[name].nbytes for name in order), default=0))

    def _finish(self, block: Block, checksums: dict[str, str]) -> None:
        self.records[block.index] = block.record
        self.checksums |= checksums
        if (journal := self._run.journal) is not None:
            entry = {"record": block.record, "checksums": checksums}
            _settle(self._writer, partial(journal.finish, _unit(self._stage.name, block.index), entry))
            for kind, offset in self._stage.spends:
                _settle(self._writer, partial(journal.forget, _unit(kind, block.index + offset)))
        self._show()

    def _show(self) -> None:
        written = self._writer.written if self._writer is not None else 0
        self._run.progress(self._stage.name, len(self.records), len(self._blocks), written)


def finished(journal: Journal, stage: Stage, blocks: range) -> int:
    """How many of these blocks, from the first on, an earlier run finished."""
    count = 0
    while count < len(blocks) and journal.record(_unit(stage.name, blocks[count])) is not None:
        count += 1
    return count


def _unit(kind: str, index: int) -> str:
    """What the journal calls a block's record or state."""
    return f"{kind}-{index:05d}"


def _settle(writer: ShardWriter | None, action: Callable[[], None]) -> None:
    """Note something now or, if it is about what a writer was given, once that is safe on disk."""
    writer.then(action) if writer is not None else action()
