"""Log-probabilities of a checkpoint, from real vLLM.

    python -m benchmarks.score MODEL WINDOWS.npy OUT.npy

A process of its own, because an engine is only wholly gone when its process is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_BATCH = 4  # windows a call: the full vocabulary's log-probabilities of each token live in Python lists


def engine_environment() -> dict[str, str]:
    """Environment of a vLLM process on a small machine: 1 GiB of KV cache on CPU unless the user says otherwise."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}


def log_probabilities(
    model: Path, windows: np.ndarray, log: Path, variables: Mapping[str, str] | None = None
) -> np.ndarray:
    """Score windows in a fresh vLLM process.

    Args:
        model: checkpoint folder.
        windows: integer ``[n, length]`` token ids; each row is one prompt.
        log: file that receives the engine's output.
        variables: of the engine's environment, over those of :func:`engine_environment`.

    Returns:
        fp32 ``[n, length - 1, vocab]``: log-probabilities of each next token.

    Raises:
        RuntimeError: the engine failed; the message ends with the tail of its log.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs, output = Path(scratch, "windows.npy"), Path(scratch, "logprobs.npy")
        np.save(inputs, windows)
        command = [sys.executable, "-m", "benchmarks.score", str(model), str(inputs), str(output)]
        # The engine core in the same process: two start-ups and a shutdown less, and the same computation.
        environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(variables or {})}
        with open(log, "wb") as sink:
            done = subprocess.run(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"vLLM failed on {model} (exit code {done.returncode}), see {log}:\n{tail}")
        return np.load(output)


def start(model: str, length: int, **options):
    """An engine in this process that can score windows of ``length`` tokens."""
    from vllm import LLM

    settings = dict(
        max_logprobs=-1,
        enforce_eager=True,
        max_model_len=length + 1,
        max_num_batched_tokens=max(2048, length + 1),
        enable_prefix_caching=False,
        disable_log_stats=True,
        dtype="bfloat16",
    )
    return LLM(model, **settings | options)


def score(engine, windows: np.ndarray) -> np.ndarray:
    """Does what :func:`log_probabilities` does, with an engine of :func:`start`."""
    from vllm import SamplingParams

    count, length = windows.shape
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    result = np.empty((count, length - 1, vocabulary), dtype=np.float32)
    for start in range(0, count, _BATCH):
        prompts = [{"prompt_token_ids": row.tolist()} for row in windows[start : start + _BATCH]]
        for i, output in enumerate(engine.generate(prompts, asked, use_tqdm=False)):
            flat = output.prompt_logprobs
            for t in range(1, length):  # position 0 has no prediction
                span = slice(flat.start_indices[t], flat.end_indices[t])
                # The prompt's own token comes first, then the whole vocabulary by rank: it is written twice, equally.
                result[start + i, t - 1, flat.token_ids[span]] = flat.logprobs[span]
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    asked_for = np.load(arguments.windows)
    np.save(arguments.output, score(start(arguments.model, asked_for.shape[1]), asked_for))
