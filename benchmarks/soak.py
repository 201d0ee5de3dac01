"""A vLLM server with our kernels under load: many streams, clients that hang up, requests that make no sense.

    python -m benchmarks.soak [--seconds 300] [--streams 64] [--json FILE]

`vllm serve` (torch.compile on) answers each prompt alone first; those answers are the truth. Then many clients at once
stream greedy answers, cancel some in the middle, and send malformed requests. Exit code 1 if an answer was wrong (other
than at near-ties), a malformed request was not refused with a 4xx status, memory grew by more than 5 %, or the server's
log holds an error; the rows say what happened.
"""

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import httpx
import psutil
from openai import AsyncOpenAI

from benchmarks import record
from benchmarks.server import command_of, serve
from benchmarks.testbed import PYTHON

WORK = Path("build/soak")
MODEL, PROMPTS, TOKENS, LENGTH = "soak", 48, 32, 256
NEAR = 0.15
"""Nats. Two tokens closer than this are a tie for bf16 sums in another order; log-probabilities may be as far apart."""
GROWTH = 0.05

# What a server must refuse, and go on: the body of a completion request, as an object or as it is sent.
MALFORMED: dict[str, dict | bytes] = {
    "no JSON": b"{",
    "no object": b"[1, 2]",
    "no prompt": {"max_tokens": 4},
    "a prompt of nulls": {"prompt": [None, None]},
    "tokens outside the vocabulary": {"prompt": [1, 2, 10**6]},
    "negative tokens": {"prompt": [-5]},
    "a prompt longer than the model takes": {"prompt": [5] * 1000},
    "an unknown model": {"prompt": "x", "model": "nobody"},
    "a negative length": {"prompt": "x", "max_tokens": -1},
    "a negative temperature": {"prompt": "x", "temperature": -3},
    "a word for a number": {"prompt": "x", "temperature": "hot"},
    "too many log-probabilities": {"prompt": "x", "logprobs": 10**6},
    "a bias of no token": {"prompt": "x", "logit_bias": {"9999999": 1}},
    "no choices": {"prompt": "x", "n": 0},
}


@dataclass
class Answer:
    """Tokens, and at each step the log-probabilities of the best few."""

    tokens: list[int] = field(default_factory=list)
    best: list[dict[int, float]] = field(default_factory=list)

    def add(self, logprobs) -> None:
        """Take over one piece of OpenAI's ``logprobs`` with tokens as ``token_id:N``."""
        number = lambda text: int(text.removeprefix("token_id:"))  # noqa: E731
        self.tokens += map(number, logprobs.tokens)
        self.best += [{number(t): value for t, value in step.items()} for step in logprobs.top_logprobs]


@dataclass
class Tally:
    """What the clients saw.

    Attributes:
        answers: ``same``, ``near-tie``, ``wrong``, ``cancelled`` and ``refused`` -> how many.
        unlike: what was wrong, in words, the first few.
        furthest: largest difference of a log-probability to the truth's, before any near-tie.
        seconds: of whole answers.
        tokens: that were streamed.
    """

    answers: Counter = field(default_factory=Counter)
    unlike: list[str] = field(default_factory=list)
    furthest: float = 0.0
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0

    def judge(self, truth: Answer, answer: Answer) -> None:
        """Count an answer; after a near-tie it may go on as it likes."""
        for step, (expected, token) in enumerate(zip(truth.tokens, answer.tokens, strict=True)):
            here, there = truth.best[step], answer.best[step]
            gap = here[expected] - here.get(token, float("-inf"))
            if token != expected:
                return self.note("near-tie" if gap < NEAR else "wrong", f"step {step}: {token} is {gap} nats behind")
            self.furthest = max(self.furthest, abs(here[token] - there[token]))
            if abs(here[token] - there[token]) > NEAR:
                return self.note("wrong", f"step {step}: log-probability {there[token]}, alone {here[token]}")
        self.note("same", "")

    def note(self, kind: str, what: str) -> None:
        self.answers[kind] += 1
        if kind == "wrong" and len(self.unlike) < 20:
            self.unlike.append(what)


async def stream(client: AsyncOpenAI, prompt: list[int], upto: int = TOKENS) -> Answer:
    """A greedy answer, or its first ``upto`` tokens, after which the client hangs up."""
    answer = Answer()
    asked = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "logprobs": 5, "extra_body": {"ignore_eos": True}}
    async with await client.completions.create(prompt=prompt, stream=True, **asked) as pieces:
        async for piece in pieces:
            if piece.choices and piece.choices[0].logprobs:
                answer.add(piece.choices[0].logprobs)
            if len(answer.tokens) >= upto and upto < TOKENS:
                break
    return answer


async def worker(
    client: AsyncOpenAI, raw: httpx.AsyncClient, prompts, truth: list[Answer], tally: Tally, seed: int, end: float
) -> None:
    """One client: 70 % of its requests whole, 15 % cancelled, 15 % malformed."""
    draw = random.Random(seed)
    while time.monotonic() < end:
        number, kind, started = draw.randrange(len(prompts)), draw.random(), time.monotonic()
        if kind < 0.7:
            answer = await stream(client, prompts[number])
            tally.seconds.append(time.monotonic() - started)
            tally.tokens += len(answer.tokens)
            tally.judge(truth[number], answer)
        elif kind < 0.85:
            await stream(client, prompts[number], upto=draw.randint(1, TOKENS - 1))
            tally.answers["cancelled"] += 1
        else:
            name, body = draw.choice(list(MALFORMED.items()))
            sent = {"content": body} if isinstance(body, bytes) else {"json": {"model": MODEL} | body}
            reply = await raw.post("/v1/completions", headers={"content-type": "application/json"}, **sent)
            refused = 400 <= reply.status_code < 500
            tally.note("refused" if refused else "wrong", f"{name}: status {reply.status_code}: {reply.text[:200]}")


def memory(processes: list[psutil.Process]) -> int:
    """Bytes that belong to these processes alone (USS), so that shared libraries count in none."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


async def load(url: str, prompts: list[list[int]], seconds: float, streams: int) -> tuple[dict, Tally]:
    """Run the clients; returns the row, and the tally that is part of it."""
    limits = httpx.Limits(max_connections=None)
    options = {"api_key": "unused", "timeout": 600, "max_retries": 0}
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", http_client=httpx.AsyncClient(limits=limits), **options) as client,
        httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as raw,
    ):
        truth = [await stream(client, prompt) for prompt in prompts]
        server = [p for p in psutil.Process().children(recursive=True) if p.is_running()]
        tally, sizes, started = Tally(), [], time.monotonic()
        end = started + seconds

        async def watch() -> None:
            while time.monotonic() < end:
                sizes.append((time.monotonic() - started, memory(server)))
                await asyncio.sleep(max(0.5, seconds / 200))

        clients = (worker(client, raw, prompts, truth, tally, seed, end) for seed in range(streams))
        await asyncio.gather(watch(), *clients)
        took = time.monotonic() - started
        again = Tally()
        for prompt, alone in zip(prompts, truth, strict=True):
            again.judge(alone, await stream(client, prompt))
    # The first third is start-up: caches of every batch size, the allocator's arenas.
    early, late = ([size for at, size in sizes if low <= at / seconds < low + 1 / 6] for low in (1 / 3, 5 / 6))
    row = {
        "seconds": took,
        "streams": streams,
        "answers": dict(tally.answers),
        "tokens_per_second": tally.tokens / took,
        "latency": {"median": median(tally.seconds), "p99": quantiles(tally.seconds, n=100)[98]},
        "furthest": tally.furthest,
        "wrong": tally.unlike,
        "afterwards": {"answers": dict(again.answers), "furthest": again.furthest, "wrong": again.unlike},
        "memory": {"early": median(early), "late": median(late), "growth": median(late) / median(early) - 1},
        "memory_over_time": [[round(at, 1), size] for at, size in sizes],
    }
    tally.answers["wrong"] += again.answers["wrong"]
    return row, tally


def prompts_of(count: int) -> list[list[int]]:
    """Held-out token ids of many lengths, some with a common beginning."""
    windows, draw = PYTHON.heldout_windows(count), random.Random(0)
    starts = [windows[i - i % 4] for i in range(count)]  # four of each begin alike: prefixes to be cached
    return [start[: draw.randint(4, LENGTH - TOKENS - 8)].tolist() for start in starts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="how long (default: 300)")
    parser.add_argument("--streams", type=int, default=64, help="clients at once (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=record.here("soak"), help="default: %(default)s")
    arguments = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    converted, log = WORK / "mixed", WORK / "serve.log"
    command = [*command_of("bismooth"), "convert", str(PYTHON.model), str(converted), "--method", "bismooth"]
    command += ["--calibration", "none", "--group-size", "32", "--group-layers", "down_proj"]
    subprocess.run(command, check=True)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(WORK.resolve() / "cache"))
    flags = ["--served-model-name", MODEL, "--max-model-len", str(LENGTH), "--return-tokens-as-token-ids"]
    flags += ["--max-num-batched-tokens", "512", "--max-num-seqs", "64"]
    with serve(converted, log, *flags) as url:
        row, tally = asyncio.run(load(url, prompts_of(PROMPTS), arguments.seconds, arguments.streams))
        row["errors"] = [line for line in log.read_text(errors="replace").splitlines() if " ERROR " in line]
    for key, value in row.items():
        if key != "memory_over_time":
            print(f"{key:>18}: {value}")
    record.write(arguments.json, [row])
    bad = tally.answers["wrong"] or row["memory"]["growth"] > GROWTH or row["errors"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
