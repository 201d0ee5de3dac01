"""What a head in INT8 saves of the time of one request, in real vLLM: one engine an arm, and the engines take turns.

    python -m benchmarks.heads MODEL... [--turns N] [--tokens N] [--json FILE]

MODEL is one of :mod:`benchmarks.real`. Arms are the source, a conversion with its head in float, and one with its head
in INT8, both by plain rounding, as times do not depend on values. A request reads 32 tokens and writes so many. Every
engine is a process of its own, compiled as vLLM does by default, that waits while another has its turn; ratios are
those of the same turn.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import record
from benchmarks.real import MODELS
from benchmarks.real.weights import folder_of
from benchmarks.score import engine_environment

ARMS = {"bf16": None, "INT8": {}, "INT8, head": {"head": "int8"}}
"""Name -> options of a conversion; ``None`` is the source."""
BASE, PROMPT = "INT8", 32
_ANSWER = "answer: "


def child(folder: str, tokens: int) -> None:
    """An engine that writes so many tokens for each line that it is given, and says in how many seconds."""
    from vllm import LLM, SamplingParams

    engine = LLM(folder, max_model_len=1024, enable_prefix_caching=False, disable_log_stats=True)
    asked = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(100, 100 + PROMPT))}
    _say("ready")
    for _ in sys.stdin:
        started = time.perf_counter()
        engine.generate([prompt], asked, use_tqdm=False)
        _say(str(time.perf_counter() - started))


def _say(what: str) -> None:
    print(f"{_ANSWER}{what}", flush=True)


class Engine:
    """A child process."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self._process, self._log = process, log
        self._next()

    def seconds(self) -> float:
        """What a request took."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._next())

    def _next(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return line.removeprefix(_ANSWER)
        raise RuntimeError(f"the engine ended:\n{self._log.read_text(errors='replace')[-3000:]}")


@contextmanager
def engine(folder: Path, tokens: int, log: Path) -> Iterator[Engine]:
    """An engine of a checkpoint, until the end of the context."""
    command = [sys.executable, "-m", "benchmarks.heads", "--child", str(folder), "--tokens", str(tokens)]
    # vLLM 0.32 cannot load what it compiled ahead of time for a CPU.
    environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_AOT_COMPILE": "0"}
    pipe = subprocess.PIPE
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=sink, text=True)
        try:
            yield Engine(process, log)
        finally:
            process.kill()
            process.wait()


def measure(model: str, turns: int, tokens: int) -> Iterator[dict]:
    """A row for each arm of a model."""
    import vllm_w8a8_bismooth as bismooth

    source, times = folder_of(MODELS[model]), {arm: [] for arm in ARMS}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        engines = {}
        for arm, options in ARMS.items():
            folder = source if options is None else Path(scratch, arm)
            if options is not None:
                bismooth.convert(source, folder, method="rtn", **options)
            sizes[arm] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            engines[arm] = stack.enter_context(engine(folder, tokens, Path(scratch, f"{arm}.log")))
        for turn in range(turns + 1):
            for arm in list(ARMS)[:: 1 if turn % 2 else -1]:
                seconds = engines[arm].seconds()
                if turn:  # the first warms up
                    times[arm].append(seconds)
    for arm, mine in times.items():
        ratios = sorted(base / own for base, own in zip(times[BASE], mine, strict=True))
        quarters = statistics.quantiles(ratios, n=4)
        row = {"model": model, "arm": arm, "bytes": sizes[arm], "seconds": statistics.median(mine)}
        yield row | {"x INT8": statistics.median(ratios), "quartiles": [quarters[0], quarters[2]], "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, asked.tokens)
        return
    if unknown := [name for name in asked.models if name not in MODELS]:
        parser.error(f"{unknown[0]} is none of {', '.join(MODELS)}")
    rows = []
    for model in asked.models or MODELS:
        for row in measure(model, asked.turns, asked.tokens):
            low, high = row["quartiles"]
            print(
                f"{model:20} {row['arm']:12} {row['seconds']:.3f} s, x INT8 {row['x INT8']:.3f} ({low:.3f}, {high:.3f})"
            )
            rows.append(row)
    if asked.json:
        record.write(asked.json, rows, prompt=PROMPT, tokens=asked.tokens)


if __name__ == "__main__":
    main()
