"""Speculative decoding: how many of a drafter's tokens a real model keeps, in bf16 and in INT8, in real vLLM.

    python -m benchmarks.real.drafters [--drafts DRAFT,...] [--prompts N] [--json FILE]

The model (SmolLM2-135M) answers greedily, and a drafter proposes three tokens a step: another checkpoint of the same
model, a head that reads the model's states (:mod:`benchmarks.real.eagle`), or a look-up of n-grams in what was said
before. What is counted is vLLM's own: ``vllm:spec_decode_*``. The draft in bf16 behind the model in bf16 is the upper
bound. ``coarse`` is a draft that errs by itself, as a trained drafter does: the model with weights of 4 bits. All
drafters but INT8 are made of the model in bf16. All is done twice: healthy, and with planted outliers (:data:`PLANT`).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import save_torch_state_dict
from rich.console import Console

import vllm_w8a8_bismooth as package
from benchmarks import record
from benchmarks.real import MODELS, SMOLLM2, eagle, texts
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
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128
NGRAM, EAGLE = "n-gram", "EAGLE"
PAIRS = (
    ("bf16", "bf16"),
    ("INT8", "bf16"),
    ("RTN", "bf16"),
    ("bf16", "INT8"),
    ("bf16", "coarse"),
    ("INT8", "coarse"),
    ("RTN", "coarse"),
    ("bf16", EAGLE),
    ("INT8", EAGLE),
    ("RTN", EAGLE),
    ("bf16", NGRAM),
    ("INT8", NGRAM),
)
"""What answers, and what drafts for it."""


@dataclass(frozen=True)
class Count:
    """What was counted while prompts were answered.

    Attributes:
        drafts: how often something was proposed.
        drafted, accepted: tokens.
        positions: accepted tokens by their place in a draft, ``[AHEAD]``.
        answers: of each prompt, how many tokens each step behind the first brought; the first reads the prompt, and
            knows no draft.
    """

    drafts: int
    drafted: int
    accepted: int
    positions: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Acceptance:
    """The figures of all prompts.

    Attributes:
        rate: share of the drafted tokens that was accepted.
        positions: share of drafts whose first, second, ... token was accepted.
        covered: share of the steps that had a draft; n-grams are not always found.
        length: tokens that a step brought, whether it had a draft or not; no measure of time.
        interval: of ``length``, 95 %, by drawing prompts anew.
        steps, prompts: how many there were.
    """

    rate: float
    positions: list[float]
    covered: float
    length: float
    interval: tuple[float, float]
    steps: int
    prompts: int


def summarize(count: Count) -> Acceptance:
    """All are ratios of sums; those of vLLM's counters also hold what a last step brought beyond its answer's end."""
    answers = [answer for answer in count.answers if answer]
    tokens, steps = (np.array([number(answer) for answer in answers], float) for number in (sum, len))
    draws = np.random.default_rng(0).multinomial(len(answers), [1 / len(answers)] * len(answers), size=10_000)
    low, high = np.quantile((draws @ tokens) / (draws @ steps), [0.025, 0.975])
    return Acceptance(
        rate=count.accepted / count.drafted,
        positions=[accepted / count.drafts for accepted in count.positions],
        covered=float(count.drafts / steps.sum()),
        length=float(tokens.sum() / steps.sum()),
        interval=(float(low), float(high)),
        steps=int(steps.sum()),
        prompts=len(answers),
    )


def coarsen(source: Path, destination: Path, bits: int = 4) -> None:
    """Write a copy in bf16 whose linears were rounded to a few bits, one step a row."""
    model, most = Source(source), 2 ** (bits - 1) - 1
    checkpoint = model.checkpoint
    tensors = {name: checkpoint.read(name) for name in checkpoint.headers}
    for index, layer in enumerate(model.layers):
        for linear in layer.linears:
            name = f"{checkpoint.names.block(index)}{linear}.weight"
            weight = tensors[name].float()
            step = weight.abs().amax(dim=1, keepdim=True) / most
            tensors[name] = dequantize_weight((weight / step).round(), step).bfloat16()
    destination.mkdir(parents=True)
    save_torch_state_dict(tensors, destination)
    for relative in (CONFIG, *companions(checkpoint.place)):
        shutil.copy(source / relative, destination / relative)


MAKERS = {"INT8": package.convert, "RTN": partial(package.convert, method="rtn"), "coarse": coarsen, EAGLE: eagle.fit}
"""How a folder is made of the source, which is itself called bf16. INT8 is the default conversion."""


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


def drafter(source: Path, kind: str) -> dict[str, Any]:
    """What vLLM is told of it."""
    if kind == NGRAM:
        return {"method": "ngram", "prompt_lookup_max": AHEAD}
    return {"method": "eagle" if kind == EAGLE else "draft_model", "model": str(made(source, kind))}


def prompts(folder: Path, count: int) -> list[list[int]]:
    """Tokens of chats that ask to go on with a text; one half programs, the other English."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = texts.heldout_windows(tokenizer, count, PROMPT_TOKENS)
    asked = [f"Continue this text:\n\n{tokenizer.decode(window)}" for window in windows]
    chats = [[{"role": "user", "content": content}] for content in asked]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def measure(target: Path, drafter: dict[str, Any], asked: list[list[int]], tokens: int = ANSWER_TOKENS) -> Count:
    """Let a checkpoint answer in a vLLM process of its own, with a drafter.

    Args:
        target: what answers.
        drafter: what drafts, see :func:`drafter`.
        asked: tokens of each prompt; all are answered at once.
        tokens: at most, of each answer.

    Raises:
        RuntimeError: the engine failed; the message is the end of its log.
    """
    request = {"model": str(target), "drafter": drafter, "prompts": asked, "tokens": tokens}
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "request.json"), Path(scratch, "count.json")
        question.write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--answer", str(question), str(answer)],
            env=engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if not answer.exists():  # not the exit code: vLLM sometimes aborts in the teardown, after all work is done
            raise RuntimeError(done.stdout.decode(errors="replace")[-3000:])
        return Count(**json.loads(answer.read_text()))


def answer(request: dict[str, Any]) -> Count:
    """What :func:`measure` asks for, in its process."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        model=request["model"],
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=len(request["prompts"]),
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config={"num_speculative_tokens": AHEAD, **request["drafter"]},
    ).llm_engine
    each_step = SamplingParams(temperature=0, max_tokens=request["tokens"], output_kind=RequestOutputKind.DELTA)
    for number, prompt in enumerate(request["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, each_step)
    answers: list[list[int]] = [[] for _ in request["prompts"]]
    while engine.has_unfinished_requests():
        for output in engine.step():
            answers[int(output.request_id)].append(len(output.outputs[0].token_ids))
    return Count(*_counters(engine), answers=[brought[1:] for brought in answers])


def _counters(engine) -> tuple[int, int, int, list[int]]:
    """vLLM's: drafts, tokens drafted and accepted, and those accepted at each place."""
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    single = (metrics[f"vllm:spec_decode_num_{name}"].value for name in ("drafts", "draft_tokens", "accepted_tokens"))
    return *single, metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--drafts", default=",".join(dict.fromkeys(draft for _, draft in PAIRS)))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--answer", nargs=2, type=Path, metavar="FILE", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answer:
        question, count = asked.answer
        count.write_text(json.dumps(asdict(answer(json.loads(question.read_text())))))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    healthy, planted = folder_of(SMOLLM2), WORK / "planted"
    if not planted.exists():
        plant(healthy, planted, **PLANT)
    said, console, rows = prompts(healthy, asked.prompts), Console(), []
    for k, source in ((None, healthy), (PLANT["k"], planted)):
        for target, draft in [pair for pair in PAIRS if pair[1] in asked.drafts.split(",")]:
            found = summarize(measure(made(source, target), drafter(source, draft), said))
            rows.append({"k": k, "target": target, "draft": draft, **asdict(found)})
            low, high = found.interval
            console.print(
                f"k {k or 0:<5.0f} {target:<5} drafted by {draft:<7} accepted {found.rate:.2%} "
                f"by place {' '.join(f'{share:.3f}' for share in found.positions)} in {found.covered:.0%} of steps; "
                f"{found.length:.3f} tokens a step ({low:.3f} to {high:.3f})",
                highlight=False,
                soft_wrap=True,
            )
    if asked.json:
        weights = MODELS[SMOLLM2.name].weights
        sizes = {"prompts": len(said), "ahead": AHEAD, "answer_tokens": ANSWER_TOKENS}
        record.write(asked.json, rows, **sizes, weights=f"were {weights} once", computed="bfloat16")


if __name__ == "__main__":
    main()
