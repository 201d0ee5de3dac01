"""Tokens per second of whole engines: bf16, stock INT8 and ours, by vLLM's own `vllm bench`.

    python -m benchmarks.throughput [--model testbed|llama-1b ...] [--repeats N] [--json FILE]

Stock INT8 is the same checkpoint as ours, served by a vLLM that does not load this package. The arms take turns, so
that the machine's drift meets them alike; figures are medians over the repeats.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.demo import tool
from benchmarks.score import engine_environment
from benchmarks.testbed import PYTHON

WORK = Path("build/throughput")
# TinyLlama 1.1B's shape.
LLAMA_1B = dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
# Sizes of a throughput run: requests, tokens that each reads (of real text) and writes.
SIZES = {
    "testbed": {"num_prompts": 64, "input_len": 256, "output_len": 64},
    "llama-1b": {"num_prompts": 16, "input_len": 256, "output_len": 32},
}
# A latency run: one request after the other. `vllm bench latency` makes up token ids to 10000, which the test bed's
# vocabulary lacks; there it is a throughput run that takes one request at a time.
SINGLE = {"input_len": 32, "output_len": 32}
ARMS = {"bf16": {}, "stock INT8": {"VLLM_PLUGINS": ""}, "ours": {}}

console = Console()


def random_llama(folder: Path) -> Path:
    """A LLaMA of 1.1 billion random parameters, in bf16, with the test bed's tokenizer."""
    if not folder.exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        partial = folder.with_suffix(".partial")
        LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).to(torch.bfloat16).save_pretrained(partial)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(PYTHON.model / name, partial / name)
        partial.rename(folder)
    return folder


def checkpoints(model: str) -> dict[str, Path]:
    """arm -> folder; per-channel INT8 for the two INT8 arms."""
    WORK.mkdir(parents=True, exist_ok=True)
    source = PYTHON.model if model == "testbed" else random_llama(WORK / model)
    converted = WORK / f"{model}-int8"
    if not converted.exists():
        subprocess.run([tool("bismooth"), "convert", source, converted, "--method", "rtn"], check=True)
    return {"bf16": source, "stock INT8": converted, "ours": converted}


def requests(sizes: dict[str, int]) -> Path:
    """Stretches of the calibration text in the ShareGPT format, which `vllm bench` reads.

    Not its random dataset: decoding and encoding again changes the length of random tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PYTHON.model)
    ids = tokenizer(PYTHON.calibration.read_text())["input_ids"]
    step = len(ids) // sizes["num_prompts"]
    prompts = [tokenizer.decode(ids[i * step : i * step + sizes["input_len"]]) for i in range(sizes["num_prompts"])]
    turns = [[{"from": "human", "value": prompt}, {"from": "gpt", "value": prompt}] for prompt in prompts]
    path = WORK / f"{sizes['num_prompts']}-requests-of-{sizes['input_len']}.json"
    path.write_text(json.dumps([{"conversations": turn} for turn in turns]))
    return path


def dataset(sizes: dict[str, int]) -> dict:
    """Options that make `vllm bench throughput` send these requests."""
    asked = {"num_prompts": sizes["num_prompts"], "output_len": sizes["output_len"]}
    return {"dataset_name": "sharegpt", "dataset_path": requests(sizes), **asked}


def bench(kind: str, model: Path, environment: dict[str, str], options: dict, log: Path) -> dict:
    """One run of ``vllm bench throughput`` or ``latency``: the JSON that it writes.

    Raises:
        RuntimeError: it failed; the message ends with the tail of its log.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "out.json")
        command = [tool("vllm"), "bench", kind, "--model", str(model), "--dtype", "bfloat16", "--seed", "0"]
        command += ["--max-model-len", "512", "--output-json", str(output)]
        for name, value in options.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment
        with open(log, "wb") as sink:
            done = subprocess.run(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        if done.returncode or not output.exists():
            raise RuntimeError(f"vllm bench {kind} failed, see {log}:\n{log.read_text(errors='replace')[-3000:]}")
        return json.loads(output.read_text())


def measure(model: str, repeats: int) -> list[dict]:
    """A row for each arm: medians of total tokens per second, and of seconds per request at batch 1."""
    folders, sizes = checkpoints(model), SIZES[model]
    rates, latencies = {arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}
    for repeat in range(repeats):
        for arm, environment in ARMS.items():
            log = WORK / f"{model}-{arm.replace(' ', '-')}.log"
            console.print(f"{model}, {arm}, {repeat + 1} of {repeats}")
            result = bench("throughput", folders[arm], environment, dataset(sizes), log)
            rates[arm].append(result["tokens_per_second"])
            if model == "testbed":
                one_by_one = dataset(SINGLE | {"num_prompts": 16}) | {"max_num_seqs": 1}
                result = bench("throughput", folders[arm], environment, one_by_one, log)
                latencies[arm].append(result["elapsed_time"] / result["num_requests"])
            else:
                options = SINGLE | {"batch_size": 1, "num_iters_warmup": 2, "num_iters": 8}
                latencies[arm] += bench("latency", folders[arm], environment, options, log)["latencies"]
    return [
        {
            "model": model,
            "arm": arm,
            **sizes,
            "tokens_per_second": statistics.median(rates[arm]),
            "rates": rates[arm],
            "latency_seconds": statistics.median(latencies[arm]),
            "latency_range": [min(latencies[arm]), max(latencies[arm])],
        }
        for arm in ARMS
    ]


def show(rows: list[dict]) -> None:
    table = Table("model", "arm", "tokens/s", "x bf16", "x stock", "latency (1 x 32 + 32), s", "x bf16", "x stock")
    by = {(row["model"], row["arm"]): row for row in rows}
    for (model, arm), row in by.items():
        bf16, stock = by[model, "bf16"], by[model, "stock INT8"]
        rate, latency = row["tokens_per_second"], row["latency_seconds"]
        rates = [f"{rate / other['tokens_per_second']:.2f}" for other in (bf16, stock)]
        speeds = [f"{other['latency_seconds'] / latency:.2f}" for other in (bf16, stock)]
        table.add_row(model, arm, f"{rate:.0f}", *rates, f"{latency:.3f}", *speeds)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = []
    for model in arguments.model:
        rows += measure(model, arguments.repeats)
        show(rows)
        if arguments.json:  # after every model: a run that is cut short leaves what it has
            record.write(arguments.json, rows)


if __name__ == "__main__":
    sys.exit(main())
