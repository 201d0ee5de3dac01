"""Log-probabilities of a checkpoint, from real vLLM.

    python -m benchmarks.score WINDOWS.npy FOLDER MODEL... [--dtype DTYPE]

writes FOLDER/0.npy and so on. In a process of its own, because an engine is only wholly gone when its process is.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
    (scores,) = each([model], windows, log, variables)
    return scores


def each(
    models: Sequence[Path],
    windows: np.ndarray,
    log: Path,
    variables: Mapping[str, str] | None = None,
    dtype: str = "bfloat16",
) -> Iterator[np.ndarray]:
    """Score windows with one model after the other, in one vLLM process: its start takes longer than a small model.

    Args:
        models: checkpoint folders.
        windows: integer ``[n, length]`` token ids; each row is one prompt.
        log: file that receives the output of all engines.
        variables: of the engines' environment, over those of :func:`engine_environment`.
        dtype: in which the engines compute.

    Yields:
        What :func:`log_probabilities` returns, for each model as soon as it is there.

    Raises:
        RuntimeError: an engine failed; the message ends with the tail of the log.
    """
    with tempfile.TemporaryDirectory() as scratch, open(log, "wb") as sink:
        inputs = Path(scratch, "windows.npy")
        np.save(inputs, windows)
        command = [sys.executable, "-m", "benchmarks.score", str(inputs), scratch, *map(str, models), "--dtype", dtype]
        # The engine core in the same process: two start-ups and a shutdown less, and the same computation.
        environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(variables or {})}
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            for number, model in enumerate(models):
                output = _scores(scratch, number)
                while not output.exists() and process.poll() is None:
                    time.sleep(0.1)
                # The last result counts only of a process that also ended well.
                if not output.exists() or (number == len(models) - 1 and process.wait()):
                    tail = log.read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"vLLM failed on {model} (exit code {process.returncode}), see {log}:\n{tail}")
                yield np.load(output)
                output.unlink()
        finally:
            process.kill()
            process.wait()


def _scores(folder: str | Path, number: int) -> Path:
    return Path(folder, f"{number}.npy")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    windows = np.load(arguments.windows)
    for number, model in enumerate(arguments.models):
        if number:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            gc.collect()
            cleanup_dist_env_and_memory()
        scores = score(start(model, windows.shape[1], dtype=arguments.dtype), windows)
        partial = arguments.folder / "partial.npy"
        np.save(partial, scores)
        partial.replace(_scores(arguments.folder, number))  # in one step: who waits for it reads all of it


if __name__ == "__main__":
    main()
