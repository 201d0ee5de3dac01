"""What every worker of an engine is extended by, to keep the log-probabilities of a whole vocabulary.

vLLM answers ``prompt_logprobs`` in Python lists, which take minutes and gigabytes for a vocabulary of 150,000. The
logits that it makes them of pass through the model's ``compute_logits``, where they are kept as they are.
"""

from pathlib import Path
from typing import Any

import torch

_ROWS = 64  # written at once: the logits may be in bf16, what is written is fp32


class Capture:
    """Methods for :meth:`vllm.LLM.collective_rpc`; vLLM makes it a base of its worker (``worker_extension_cls``)."""

    _bismooth_calls: list[torch.Tensor] | None = None

    def bismooth_begin(self: Any) -> None:
        """Keep from now on what the model computes; what was kept before is forgotten."""
        model = self.get_model()
        if self._bismooth_calls is None:
            compute = model.compute_logits

            def kept(*arguments: Any, **options: Any) -> torch.Tensor | None:
                logits = compute(*arguments, **options)
                if logits is not None:  # as on all ranks but the first
                    self._bismooth_calls.append(logits)
                return logits

            model.compute_logits = kept
        self._bismooth_calls = []

    def bismooth_write(self: Any, path: str, count: int) -> None:
        """Write the log-probabilities of the first ``count`` tokens behind a prompt's first, fp32 ``[count, vocab]``.

        Args:
            path: a new ``.npy``; only the first rank that has logits writes it.
            count: tokens of the one prompt since :meth:`bismooth_begin`, without its first.
        """
        from vllm.distributed import get_tensor_model_parallel_rank

        calls, self._bismooth_calls = self._bismooth_calls, []
        if get_tensor_model_parallel_rank() == 0 and calls:
            write(path, calls[1:], count)  # the first call is that of the token to be generated


def write(path: str | Path, calls: list[torch.Tensor], count: int) -> None:
    """Write log-probabilities, fp32 ``[count, vocab]``, of logits ``[rows, vocab]`` that came in one or more calls.

    Raises:
        RuntimeError: they have fewer than ``count`` rows.
    """
    import numpy as np

    rows = sum(len(logits) for logits in calls)
    if rows < count:
        raise RuntimeError(f"this vLLM computed logits of {rows} tokens where {count} were expected")
    file = np.lib.format.open_memmap(path, "w+", np.float32, (count, calls[0].shape[1]))
    done = 0
    for logits in calls:
        for piece in logits[: count - done].split(_ROWS):
            file[done : done + len(piece)] = piece.float().log_softmax(-1).cpu().numpy()
            done += len(piece)
    file.flush()
