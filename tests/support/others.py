"""Checkpoints as llm-compressor writes them: ``python -m tests.support.others PYTHON`` renews ``tests/data``.

PYTHON is the interpreter of an environment with llm-compressor. What is there was written by 0.14.0.1, with
compressed-tensors 0.19: ``configs.json`` holds the ``quantization_config`` of each of :data:`KINDS`, ``mixed`` a
checkpoint of :data:`MIXED`, its weights random.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.testbed import PYTHON
from tests.support.models import tiny_model, tiny_tokenizer

DATA = Path(__file__).parents[1] / "data"

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP8 = INT8 | {"type": "float"}
INT4 = INT8 | {"num_bits": 4}
CHANNEL, TENSOR, TOKEN, GROUP = (
    {"strategy": "channel"},
    {"strategy": "tensor"},
    {"strategy": "token", "dynamic": True},
    {"strategy": "group", "group_size": 32},
)
ASYMMETRIC = {"symmetric": False}


def group(weights: dict, activations: dict | None, target: str = "Linear", **more) -> dict:
    return {"targets": [target], "weights": weights, "input_activations": activations, **more}


KINDS = {
    "dynamic": group(INT8 | CHANNEL, INT8 | TOKEN),
    "static": group(INT8 | CHANNEL, INT8 | TENSOR),
    "tensor-dynamic": group(INT8 | TENSOR, INT8 | TOKEN),
    "tensor-static": group(INT8 | TENSOR, INT8 | TENSOR),
    "group": group(INT8 | GROUP, INT8 | TOKEN),
    "gptq": group(INT8 | CHANNEL, INT8 | TOKEN),
    "asymmetric-dynamic": group(INT8 | CHANNEL, INT8 | TOKEN | ASYMMETRIC),
    "asymmetric-static": group(INT8 | CHANNEL, INT8 | TENSOR | ASYMMETRIC),
    "asymmetric-weights": group(INT8 | CHANNEL | ASYMMETRIC, INT8 | TOKEN),
    "dynamic-tensor": group(INT8 | CHANNEL, INT8 | TENSOR | {"dynamic": True}),
    "group-static": group(INT8 | GROUP, INT8 | TENSOR),
    "outputs": group(INT8 | CHANNEL, INT8 | TENSOR, output_activations=INT8 | TENSOR),
    "w8a16": group(INT8 | CHANNEL, None),
    "w4a16": group(INT4 | GROUP, None),
    "w4a8": group(INT4 | GROUP, INT8 | TOKEN),
    "fp8": group(FP8 | CHANNEL, FP8 | TOKEN),
}
MIXED = {
    "qkv": group(INT8 | CHANNEL, INT8 | TENSOR, r"re:.*self_attn\.[qkv]_proj$"),
    "o": group(INT8 | TENSOR, INT8 | TOKEN, r"re:.*self_attn\.o_proj$"),
    "gate_up": group(INT8 | TENSOR, INT8 | TENSOR, r"re:.*mlp\.(gate|up)_proj$"),
    "down": group(INT8 | CHANNEL, INT8 | TOKEN, r"re:.*mlp\.down_proj$"),
}


def convert(python: str, source: Path, destination: Path, tokens: np.ndarray, kinds: dict[str, dict]) -> None:
    """Write ``destination/name`` for each of ``kinds``, name -> ``config_groups``; see
    :mod:`tests.support.workers.llm_compressor`."""
    with tempfile.TemporaryDirectory() as scratch:  # llm-compressor writes logs where it stands
        np.save(Path(scratch, "tokens.npy"), tokens)
        Path(scratch, "kinds.json").write_text(json.dumps(kinds))
        script = Path(__file__).with_name("workers") / "llm_compressor.py"
        command = [os.path.abspath(python), script, source.resolve(), destination.resolve(), "tokens.npy", "kinds.json"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)  # of this environment
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def tiny(folder: Path) -> Path:
    """A model whose linears with static activations have K = 80: with a multiple of 32, vLLM on a CPU with AMX
    quantizes their activations dynamically, whatever the checkpoint says."""
    sizes = dict(hidden_size=80, intermediate_size=112, num_attention_heads=2, num_key_value_heads=1, head_dim=80)
    model = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def main(python: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        convert(python, PYTHON.model, folder, PYTHON.heldout_windows(2), {n: {"group_0": g} for n, g in KINDS.items()})
        configs = {n: json.loads((folder / n / "config.json").read_text())["quantization_config"] for n in KINDS}
        lines = (f"{json.dumps(name)}: {json.dumps(config)}" for name, config in configs.items())
        DATA.mkdir(exist_ok=True)
        (DATA / "configs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        tokens = np.random.default_rng(0).integers(2, 160, (8, 32))
        convert(python, tiny(folder / "tiny"), folder, tokens, {"mixed": MIXED})
        shutil.rmtree(DATA / "mixed", ignore_errors=True)
        shutil.copytree(folder / "mixed", DATA / "mixed", ignore=shutil.ignore_patterns("recipe.yaml"))


if __name__ == "__main__":
    main(sys.argv[1])
