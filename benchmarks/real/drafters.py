"""Speculative decoding: how many of a drafter's tokens a real model keeps, in bf16 and in INT8, in real vLLM.

    python -m benchmarks.real.drafters [--chunks N] [--json FILE]

The model (SmolLM2-135M) answers greedily, and a drafter proposes three tokens a step: another checkpoint of the same
model, or a look-up of n-grams in what was said before. What is counted is vLLM's own: ``vllm:spec_decode_*``. The draft
in bf16 behind the model in bf16 is the upper bound. ``coarse`` is a draft that errs by itself, as a trained drafter
does: the model with weights of 4 bits. All is done twice: healthy, and with planted outliers (:data:`PLANT`).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import save_torch_state_dict
from rich.console import Console

import vllm_w8a8_bismooth as package
from benchmarks import record
from benchmarks.real import MODELS, SMOLLM2, texts
from benchmarks.real.weights import folder_of
from benchmarks.score import engine_environment
from benchmarks.testbed.plant import plant
from vllm_w8a8_bismooth.checkpoint.companions import companions
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.method.quantize import dequantize_weight

WORK = Path("build/drafters")
PLANT = {"kind": "norm", "k": 1000.0, "blocks": (0, 1, 3), "channels": 3, "seed": 0}
AHEAD = 3
"""Tokens that a drafter proposes a step."""
CHUNK = 8
"""Prompts that are answered together, and counted together."""
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128
NGRAM = "n-gram"
PAIRS = (
    ("bf16", "bf16"),
    ("INT8", "bf16"),
    ("RTN", "bf16"),
    ("bf16", "INT8"),
    ("INT8", "INT8"),
    ("bf16", "coarse"),
    ("INT8", "coarse"),
    ("RTN", "coarse"),
    ("bf16", NGRAM),
    ("INT8", NGRAM),
    ("RTN", NGRAM),
)
"""What answers, and what drafts for it."""


@dataclass(frozen=True)
class Count:
    """What vLLM counted while it answered a chunk of prompts.

    Attributes:
        drafts: how often something was proposed.
        drafted, accepted: tokens.
        positions: accepted tokens by their place in a draft, ``[AHEAD]``.
        answered: tokens of the answers.
    """

    drafts: int
    drafted: int
    accepted: int
    positions: list[int]
    answered: int


@dataclass(frozen=True)
class Acceptance:
    """The figures of all chunks; intervals are 95 %, by drawing chunks anew.

    Attributes:
        rate: share of the drafted tokens that was accepted.
        length: tokens a step that had a draft, with the one that the model adds.
        positions: share of drafts whose first, second, ... token was accepted.
        tokens_per_step: tokens of the answers for each step of what answers, with and without a draft; no measure of
            time.
    """

    rate: float
    rate_interval: tuple[float, float]
    length: float
    length_interval: tuple[float, float]
    positions: list[float]
    tokens_per_step: float


def summarize(chunks: Sequence[Count]) -> Acceptance:
    """Ratios of sums over one or more chunks."""
    drafts, drafted, accepted, answered = (
        np.array([getattr(chunk, name) for chunk in chunks], float)
        for name in ("drafts", "drafted", "accepted", "answered")
    )
    low, high = _interval(accepted, drafts)
    return Acceptance(
        rate=float(accepted.sum() / drafted.sum()),
        rate_interval=_interval(accepted, drafted),
        length=float(1 + accepted.sum() / drafts.sum()),
        length_interval=(1 + low, 1 + high),
        positions=(np.sum([chunk.positions for chunk in chunks], axis=0) / drafts.sum()).tolist(),
        tokens_per_step=float(answered.sum() / (answered.sum() - accepted.sum())),
    )


def _interval(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Of a ratio of sums, ``[n]`` each: the 2.5th and the 97.5th percentile over chunks that are drawn anew."""
    count = len(part)
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=10_000)
    low, high = np.quantile((draws @ part) / (draws @ whole), [0.025, 0.975])
    return float(low), float(high)


def coarsen(source: Path, destination: Path, bits: int = 4) -> None:
    """Write a copy in bf16 whose linears were rounded to a few bits, one step a row."""
    model, most = Source(source), 2 ** (bits - 1) - 1
    checkpoint = model.checkpoint
    tensors = {name: checkpoint.read(name) for name in checkpoint.headers}
    for index, layer in enumerate(model.layers):
        for linear in layer.linears:
            name = f"{model.names.block(index)}{linear}.weight"
            weight = tensors[name].float()
            step = weight.abs().amax(dim=1, keepdim=True) / most
            tensors[name] = dequantize_weight((weight / step).round(), step).bfloat16()
    destination.mkdir(parents=True)
    save_torch_state_dict(tensors, destination)
    for relative in (CONFIG, *companions(checkpoint.place)):
        shutil.copy(source / relative, destination / relative)


MAKERS = {"INT8": package.convert, "RTN": partial(package.convert, method="rtn"), "coarse": coarsen}
"""How a checkpoint is made of the source, which is itself called bf16. INT8 is the default conversion."""


def made(source: Path, kind: str) -> Path:
    """The folder of a checkpoint, made once."""
    if kind == "bf16":
        return source
    folder = WORK / f"{source.name}-{kind.lower()}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=WORK) as scratch:
            MAKERS[kind](source, Path(scratch, "model"))
            shutil.move(Path(scratch, "model"), folder)  # in one step, so that a folder that is there is whole
    return folder


def prompts(folder: Path, count: int) -> list[list[int]]:
    """Tokens of chats that ask to go on with a text; programs and English by turns, so that every chunk has both."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = texts.heldout_windows(tokenizer, count, PROMPT_TOKENS)
    order = np.arange(count).reshape(len(texts.TEXTS), -1).T.reshape(-1)
    chats = [[{"role": "user", "content": f"Continue this text:\n\n{tokenizer.decode(windows[i])}"}] for i in order]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def measure(target: Path, draft: Path | None, asked: list[list[int]], tokens: int = ANSWER_TOKENS) -> list[Count]:
    """Let a checkpoint answer in a vLLM process of its own, with a drafter.

    Args:
        target: what answers.
        draft: what drafts; ``None`` is the look-up of n-grams.
        asked: tokens of each prompt.
        tokens: at most, of each answer.

    Raises:
        RuntimeError: the engine failed; the message is the end of its log.
    """
    lookup, model = {"method": "ngram", "prompt_lookup_max": AHEAD}, {"method": "draft_model", "model": str(draft)}
    drafter = lookup if draft is None else model
    request = {"model": str(target), "drafter": drafter, "prompts": asked, "tokens": tokens}
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "request.json"), Path(scratch, "counts.json")
        question.write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--answer", str(question), str(answer)],
            env=engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if not answer.exists():  # not the exit code: vLLM sometimes aborts in the teardown, after all work is done
            raise RuntimeError(done.stdout.decode(errors="replace")[-3000:])
        return [Count(**count) for count in json.loads(answer.read_text())]


def answer(request: dict[str, Any]) -> list[Count]:
    """What :func:`measure` asks for, in its process."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=request["model"],
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=CHUNK,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config={"num_speculative_tokens": AHEAD, **request["drafter"]},
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["tokens"])
    counts, before = [], _counters(engine)
    for start in range(0, len(request["prompts"]), CHUNK):
        chunk = [{"prompt_token_ids": prompt} for prompt in request["prompts"][start : start + CHUNK]]
        found = engine.generate(chunk, sampling, use_tqdm=False)
        after = _counters(engine)
        drafts, drafted, accepted, *positions = (after - before).tolist()
        counts.append(Count(drafts, drafted, accepted, positions, sum(len(f.outputs[0].token_ids) for f in found)))
        before = after
    return counts


def _counters(engine) -> np.ndarray:
    """vLLM's counters until now: drafts, tokens drafted and accepted, and those accepted at each place."""
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    single = (metrics[f"vllm:spec_decode_num_{name}"].value for name in ("drafts", "draft_tokens", "accepted_tokens"))
    return np.array([*single, *metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values], int)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10, help=f"of {CHUNK} prompts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--answer", nargs=2, type=Path, metavar="FILE", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answer:
        question, counts = asked.answer
        counts.write_text(json.dumps([asdict(count) for count in answer(json.loads(question.read_text()))]))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    healthy, planted = folder_of(SMOLLM2), WORK / "planted"
    if not planted.exists():
        plant(healthy, planted, **PLANT)
    said, console, rows = prompts(healthy, asked.chunks * CHUNK), Console(), []
    for k, source in ((None, healthy), (PLANT["k"], planted)):
        for target, draft in PAIRS:
            counts = measure(made(source, target), None if draft == NGRAM else made(source, draft), said)
            found = summarize(counts)
            rows.append({"k": k, "target": target, "draft": draft, **asdict(found), "chunks": [*map(asdict, counts)]})
            console.print(
                f"k {k or 0:<5.0f} {target:<5} drafted by {draft:<7} accepted {found.rate:.2%} "
                f"({found.rate_interval[0]:.2%} to {found.rate_interval[1]:.2%}) length {found.length:.3f} "
                f"by place {' '.join(f'{share:.3f}' for share in found.positions)} "
                f"tokens a step {found.tokens_per_step:.3f}",
                highlight=False,
                soft_wrap=True,
            )
    if asked.json:
        weights = MODELS[SMOLLM2.name].weights
        sizes = {"prompts": len(said), "ahead": AHEAD, "answer_tokens": ANSWER_TOKENS}
        record.write(asked.json, rows, **sizes, weights=f"were {weights} once", computed="bfloat16")


if __name__ == "__main__":
    main()
