"""Log-probabilities of a checkpoint's predictions, from a real engine; runs in a process of its own.

``python -m vllm_w8a8_bismooth.serving.predictions ANSWER.json`` reads a request from stdin, see :func:`predict`.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_CAPTURE = "vllm_w8a8_bismooth.serving.capture.Capture"
_CLOSE = 1e-3  # nats between what is captured and what vLLM answers: the same logits, perhaps by another softmax
_PAUSE = 0.02  # seconds


def predict(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``<number>.npy`` for each window that is wanted, fp32 ``[length - 1, vocab]``.

    Args:
        request: ``model``, a folder; ``windows``, a ``.npy`` of token ids ``[n, length]``; ``wanted``, their numbers;
            ``folder``, to write into; ``ahead``, how many files may lie there (``None`` is any number) before somebody
            takes them away; ``options``, of ``vllm.LLM``.

    Returns:
        ``dtype`` and ``quantization``, as vLLM settled on them, and ``version``, its own.

    Raises:
        RuntimeError: what was captured is not what vLLM answers.
    """
    import vllm

    windows = np.load(request["windows"])
    folder, parent = Path(request["folder"]), os.getppid()
    engine = start(request["model"], windows.shape[1], request["options"])
    for number in request["wanted"]:
        while request["ahead"] is not None and len(list(folder.glob("*.npy"))) >= request["ahead"]:
            _end_with(parent)
            time.sleep(_PAUSE)
        _end_with(parent)
        partial = folder / f"{number:06d}.tmp"
        window(engine, windows[number].tolist(), partial)
        partial.rename(folder / f"{number:06d}.npy")  # in one step: who waits for it reads all of it
    config = engine.llm_engine.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return {"dtype": dtype, "quantization": config.quantization, "version": vllm.__version__}


def start(model: str, length: int, options: Mapping[str, Any]) -> Any:
    """An engine as it serves, but for two things: eager, as compiling takes longer than a score, and without a cache of
    prefixes, as windows have none in common."""
    from vllm import LLM

    return LLM(
        model,
        enforce_eager=True,
        max_model_len=length + 1,
        max_num_batched_tokens=max(2048, length + 1),
        enable_prefix_caching=False,
        disable_log_stats=True,
        worker_extension_cls=_CAPTURE,
        **options,
    )


def window(engine: Any, tokens: list[int], path: Path) -> None:
    """Write the log-probabilities of a window's tokens but the first, fp32 ``[length - 1, vocab]``.

    Raises:
        RuntimeError: what was captured is not what vLLM answers.
    """
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    engine.collective_rpc("bismooth_begin")
    (output,) = engine.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
    engine.collective_rpc("bismooth_write", args=(str(path), len(tokens) - 1))
    found = np.load(path, mmap_mode="r")[np.arange(len(tokens) - 1), tokens[1:]]
    answered = np.array(
        [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
    )
    apart = np.abs(found - answered)
    if not (apart <= _CLOSE).all() and np.isfinite(answered).all():
        raise RuntimeError(f"logits of this vLLM are not those of its answer: {apart.max():.3g} nats apart")


def _end_with(parent: int) -> None:
    """Ends this process if the one that started it is gone: nobody would take its files away."""
    if os.getppid() != parent:
        sys.exit("the process that asked is gone")


if __name__ == "__main__":
    unnamed = Path(f"{sys.argv[1]}.part")
    unnamed.write_text(json.dumps(predict(json.load(sys.stdin))))
    unnamed.rename(sys.argv[1])  # in one step: somebody waits for it
