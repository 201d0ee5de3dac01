"""Tensors read in a thread while their predecessors are worked on."""

import threading
from collections.abc import Sequence
from functools import partial

from vllm_w8a8_bismooth.checkpoint.files import Checksum
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint

AHEAD = 2**28
"""Bytes that are read ahead of what is worked on."""


class ReadAhead:
    """Reads tensors in a thread while their predecessors are worked on.

    Memory is used again once it is released: fresh pages cost more than the reading.

    Args:
        checkpoint: to read from.
        names: the tensors, in the order in which they will be taken.
        budget: bytes that may be held, counting what was taken and not yet released. A tensor that is being waited for
            is read whatever the budget.

    Attributes:
        digests: :class:`Checksum` of each tensor read so far.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], budget: int):
        self._checkpoint, self._names, self._budget = checkpoint, names, budget
        self._ready: dict = {}
        self._buffers: dict = {}
        self._free: list = []
        self._held = 0
        self._wanted: str | None = None
        self._error: BaseException | None = None
        self._begun = self._closed = False
        self._changed = threading.Condition()
        self.digests: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ReadAhead":
        import torch

        cores = torch.get_num_threads()
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._begun)
        torch.set_num_threads(cores)  # part of what a thread sets is everybody's
        return self

    def __exit__(self, *exception) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for memory in (self._ready, self._buffers, self._free):
            memory.clear()

    def _run(self) -> None:
        import torch

        torch.get_num_threads()  # without a first look, this thread would later take over what everybody has
        torch.set_num_threads(1)  # the others are busy: waiting for them costs more than doing it alone
        with self._changed:
            self._begun = True
            self._changed.notify_all()
        for name in self._names:
            nbytes = self._checkpoint.headers[name].nbytes
            with self._changed:
                self._changed.wait_for(partial(self._may_go_on, nbytes))
                if self._closed:
                    return
                self._held += nbytes
                self._buffers[name] = self._buffer(nbytes)
            try:
                digest = Checksum()
                tensor = self._checkpoint.read(name, digest, self._buffers[name])
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready[name], self.digests[name] = tensor, digest.hexdigest()
                self._wanted = None if self._wanted == name else self._wanted
                self._changed.notify_all()

    def _may_go_on(self, nbytes: int) -> bool:
        return self._closed or self._wanted is not None or self._held + nbytes <= self._budget

    def _buffer(self, nbytes: int):
        """Released memory of this very size, or new memory; released memory of other sizes makes room for that."""
        import torch

        for place, buffer in enumerate(self._free):
            if buffer.numel() == nbytes:
                return self._free.pop(place)
        while self._free and self._held + sum(buffer.numel() for buffer in self._free) > self._budget:
            self._free.pop(0)
        return torch.empty(nbytes, dtype=torch.uint8)

    def take(self, name: str):
        """The tensor; waits for it. Its memory is used again after :meth:`release`.

        Raises:
            BismoothError: see :meth:`Checkpoint.read`.
        """
        with self._changed:
            if name not in self._ready:
                self._wanted = name
                self._changed.notify_all()
                self._changed.wait_for(lambda: name in self._ready or self._error is not None)
            if name not in self._ready:
                assert self._error is not None
                raise self._error
            return self._ready.pop(name)

    def release(self, name: str) -> None:
        """Give a taken tensor back. Whoever still needs its values must have copied them."""
        with self._changed:
            self._held -= self._checkpoint.headers[name].nbytes
            self._free.append(self._buffers.pop(name))
            self._changed.notify_all()
