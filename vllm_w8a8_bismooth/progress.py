"""How work that takes long shows how far it is: one type for all of it."""

from typing import Protocol


class Progress(Protocol):
    """Called after each piece of work.

    Args:
        stage: what is being done: ``calibrate``, ``analyze``, ``carry``, ``convert``, ``merge``, ``read``, ``compare``,
            ``discover``, ``perturb``, ``engine``, ``source``, ``checkpoint``, ``vllm``.
        done, total: decoder blocks; shards in the stages ``merge`` and ``read``, windows in ``source``
            and ``checkpoint``, engines in ``engine``.
        written: bytes that this run has written.
    """

    def __call__(self, stage: str, done: int, total: int, written: int = 0) -> None: ...


def silent(stage: str, done: int, total: int, written: int = 0) -> None:
    """The progress of work that nobody watches."""
